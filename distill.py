"""Distil: train a student on what frozen teachers say, on any number of processes.

    accelerate launch distill.py                          # the built-in job, and first its teacher
    accelerate launch distill.py --recipe mine.yaml --distill.teachers '[runs/large, runs/larger]'
    accelerate launch distill.py --recipe mine.yaml --distill.baseline    # and the student alone
    python distill.py --help

The loop is that of train.py, word for word; what differs is the objective above it. Every option
is in --help; with --distill.kd_weight 0 the weights are those of train.py, bit for bit.
"""

import time
from contextlib import nullcontext
from functools import partial

import torch
from pydantic import Field

from trainlib import data, distillation, models, optim, plan, predictions, runtime, sharding, tasks
from trainlib.batchnorm import BatchStatistics
from trainlib.card import ModelCard
from trainlib.checkpoint import CheckpointOptions, Checkpoints, identity, undone
from trainlib.config import Options, read, recipe_name, to_yaml
from trainlib.data import BatchOptions, DataOptions
from trainlib.distillation import DistillOptions
from trainlib.ema import Ema
from trainlib.evaluate import evaluate, inspect_step, model_arguments, try_model
from trainlib.gradients import StepSums
from trainlib.guard import Guard, Readback
from trainlib.lr_report import auto_rate
from trainlib.micro_size import settle_micro_size
from trainlib.models import ModelOptions
from trainlib.optim import OptimOptions, ScheduleOptions
from trainlib.profiling import ProfiledSteps, profile_steps
from trainlib.progress import LoopOptions, Progress, check_monitor, plan_steps
from trainlib.runlog import LogOptions, RunLog
from trainlib.schedule import duration_steps, is_time, lr_multiplier
from trainlib.shards import whole
from trainlib.tasks import TaskOptions
from trainlib.trackers import Trackers


class StudentOptions(Options):
    run_dir: str | None = None
    """Folder of the run; none: runs/ and the recipe's name."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights, the order of the samples and dropout."""
    deterministic: bool = False
    """Use only algorithms that give the same bits each time; GPUs get slower."""
    cpu_threads: int = Field(1, ge=1, le=1024)
    """Threads of each process on a CPU; like the micro size a part of the recipe, because they
    change the order of sums. To use more cores, launch more processes."""
    profile: ProfiledSteps = Field(None, exclude=True)
    """Profile so many steps of this start, as "20 steps": where their time goes."""
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    tasks: dict[str, TaskOptions] = {}
    distill: DistillOptions = DistillOptions()
    batch: BatchOptions = BatchOptions()
    optim: OptimOptions = OptimOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    loop: LoopOptions = LoopOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    log: LogOptions = LogOptions()
    comm: runtime.CommunicationOptions = runtime.CommunicationOptions()


def main(command_line: list[str]) -> None:
    """The teachers that are missing, the student alone if it is asked for, then the student."""
    options = read(StudentOptions, command_line, __doc__)
    run_dir = options.run_dir or f"runs/{recipe_name(command_line, 'distill')}"
    distillation.run_jobs(
        distillation.plan_jobs(options, run_dir), train_student, runtime.RunFolder
    )


def train_student(options: StudentOptions, folder: runtime.RunFolder) -> None:
    runtime.release_signals()  # which the run before this one holds
    # ---- machine ----
    accelerator = runtime.make_accelerator(options.deterministic, options.cpu_threads, options.comm)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    device, batch = accelerator.device, options.batch

    # ---- data and tasks ----
    source = data.open_source(options.data)
    task_options = tasks.resolve(options.tasks, source.target_candidates, source.columns)
    dataset = data.load(source, options.data, task_options)
    example, example_targets = dataset.example()
    num_samples = len(dataset.train)
    task_list = tasks.build_tasks(task_options, dataset.targets)
    augment = data.build_augment(options.data.augment, example, task_options)
    monitor = options.loop.monitor or tasks.default_monitor(task_list)
    lower_is_better = check_monitor(monitor, tasks.metric_names(task_list))
    total_steps, eval_every, warmup_steps = plan_steps(options.loop, options.schedule.warmup,
                                                       num_samples, batch.global_size)
    rise_steps = duration_steps(
        options.distill.warmup, num_samples, batch.global_size, total_steps
    )
    schedule_args, half_life_steps = optim.resolve_lengths(
        options.schedule, options.optim, num_samples, batch.global_size, total_steps, warmup_steps
    )

    # ---- model and optimizer ----
    model_options = models.complete(options.model, example.shape[1:], tasks.num_outputs(task_list),
                                    dataset.token_range, dataset.pad_id)
    torch.manual_seed(options.seed)
    module = models.build_model(model_options, dataset.mean, dataset.deviation)
    notes = models.start_weights(module, options.model.init_from, options.model.freeze,
                                 options.model.allow_pickle)
    try_model(module, example, example_targets, task_list, batch.smallest_micro_batch)

    # ---- teachers: beside the student, never wrapped; without a trace on its random numbers ----
    distill = options.distill
    distillation.check_cache(distill, options.data.augment)
    teacher_list = distillation.build_teachers(
        distill, options.data.tokenizer, module, dataset, task_list, models
    )
    features = distillation.FeatureLosses(module, teacher_list, distill, options.seed, example)
    notes += sharding.place(module, accelerator, options.model.sync_batch_norm)
    optimizer = optim.build_optimizer(options.optim, module)
    teachers = distillation.Teachers(teacher_list, task_list, distill, accelerator)
    soft_losses = {task.name: distillation.SoftLoss(task, distill) for task in teachers.tasks}
    loss_parts = distillation.loss_parts(task_list, teachers.tasks, distill)
    arguments = distillation.student_arguments(module, teachers, model_arguments(module, task_list))
    options, found = settle_micro_size(
        options, folder.path, accelerator, module, optimizer, (example, example_targets), augment,
        arguments,
        partial(distillation.losses_of_trial, task_list, teachers, soft_losses, features),
        features.kept.clear,
    )
    batch, notes = options.batch, notes + found

    # ---- run folder: nothing is written before everything above has been accepted ----
    run_dir = folder.path
    config = to_yaml(options.replaced({"data.input": dataset.inputs, "model": model_options,
                                       "tasks": task_options, "loop.monitor": monitor}))
    labels = tasks.labels(task_list)
    fingerprint = data.fingerprint(dataset)
    if distill.cache is not None and teachers.tasks:
        teachers.stored = distillation.StoredOutputs(
            teachers, distill, dataset.train, fingerprint, batch.eval_size
        )
        teachers.stored.check()
    folder.open(accelerator, config, fingerprint, options.checkpoint.steal_lock)
    checkpoints = Checkpoints(run_dir, accelerator, options.checkpoint, total_steps, num_samples,
                              identity(options.seed, batch, fingerprint), config)
    start = checkpoints.find_start(module)
    state = Progress(**start.progress)
    folder.start(accelerator, config, state.step, start.log_sizes)
    trackers = Trackers(accelerator, run_dir, options.log, config, state.step)
    run_log = RunLog(accelerator, run_dir, options.log, trackers, total_steps, batch.global_size,
                     num_samples, state.step, eval_every, tasks.headline(task_list), monitor)
    model_card = ModelCard(run_dir, accelerator, config, dataset, fingerprint,
                           models.portable(model_options, module), module, state,
                           partial(tasks.logged_metrics, task_list), total_steps)
    checkpoints.open(run_log.say, folder.check_lock, model_card.texts)
    folder.at_exit = [checkpoints.wait, lambda: run_log.close(folder.exit_code)]
    idle = plan.idle_warning(batch.global_size, batch.micro_size, world_size)
    run_log.say(dataset.description, *notes, models.parameter_table(module), idle, *folder.notes,
                *start.notes, *teachers.notes)

    # ---- the parts of a step ----
    num_micro_batches = plan.num_micro_batches(batch.global_size, batch.micro_size)
    model, module, optimizer = sharding.prepare(accelerator, module, optimizer)
    # After prepare, which puts other buffers into the module.
    ema = Ema(module, half_life_steps) if half_life_steps else None
    averaged = ema.applied if ema else nullcontext
    scaler = accelerator.scaler
    start.restore(accelerator, module, optimizer, ema)
    teachers.follow(ema)
    batch_statistics = BatchStatistics(module, num_micro_batches)
    if options.model.compile:
        module.compile(backend=options.model.compile, dynamic=False)  # all shapes are fixed
    run_log.watch(module, optimizer, lambda: state.step)
    parameters = [p for p in model.parameters() if p.requires_grad]
    max_grad_norm = options.optim.max_grad_norm or float("inf")
    seed_generators = runtime.make_seeder(device)
    assignments = plan.assign(batch.global_size, batch.micro_size, rank, world_size)
    batch_plan = plan.BatchPlan(num_samples, batch.global_size, options.seed)
    items = {task.name: task.items(dataset.train.num_valid[task.name]) for task in task_list} | {
        distillation.kd_items(task): dataset.train.num_valid[task.name] for task in teachers.tasks}
    reader = data.Reader(dataset.train, batch_plan, assignments, device, items)
    validation = data.EvalReader(dataset.validation, batch.eval_size, rank, world_size, device)
    if teachers.stored is not None:
        teachers.stored.fill(rank, world_size, run_log.say)
    sizes = {"loss": len(loss_parts), "batch_norm": batch_statistics.size,
             "requests": runtime.Requests.NUM}
    sums = StepSums(accelerator, model, sizes, batch.exact_sum, len(assignments), run_log.say,
                    options.comm.slow_factor)
    guard = Guard(
        optimizer, device, scaler, partial(inspect_step, module, reader, task_list),
        run_dir / "bad_steps.jsonl" if accelerator.is_main_process else None,
        state.recent if options.loop.on_spike == "skip" else None,
    )
    readback = Readback(device)

    def peak_share(step: int) -> float:
        return state.lr_factor * lr_multiplier(
            options.schedule.name, step, total_steps, warmup_steps, **schedule_args
        )

    def rise(step: int) -> float:
        """The share of their weights that soft losses and features have, 1 after the warm-up."""
        is_sweep = options.optim.lr is None and state.peak_lr is None
        return 1.0 if is_sweep else min(1.0, (step + 1) / (rise_steps + 1))

    def objective(output, targets, item_counts, mix, inputs, micro_batch):
        """The micro-batch's share of the step's loss, whole and by part."""
        taught, share = teachers.teach(inputs, targets, micro_batch.samples), rise(state.step)
        hard, soft = [], []
        for task in task_list:
            count = max(item_counts[task.name], 1)
            if task.name not in taught:
                losses = task.losses(output, targets, mix)
            else:
                losses, soft_ones = soft_losses[task.name].losses(
                    output, taught[task.name], targets, mix
                )
                taught_count = max(item_counts[distillation.kd_items(task)], 1)
                soft.append(
                    soft_ones.sum() * (distill.kd_weight * share * task.weight / taught_count)
                )
            hard.append(losses.sum() * (distill.hard_weight * task.weight / count))
        for losses, weight in zip(features.losses(), features.weights, strict=True):
            soft.append(losses.sum() * (weight * share / batch.global_size))
        shares = hard + soft
        return sum(shares[1:], start=shares[0]), shares

    def compare():
        """The best weights beside the teachers and the student alone: records, and lines."""
        found = evaluate(
            distillation.Both(teachers, module), validation,
            [distillation.Comparison(task, teachers) for task in teachers.known], accelerator,
            say=run_log.say,
        )
        if found is None:
            return {}, None
        alone = distillation.results_alone(run_dir) if distill.baseline else None
        report, records, lines = distillation.summarize(
            monitor, lower_is_better, tasks.logged_metrics(task_list, state.best_results),
            *distillation.of_teachers(found, state.best_results, task_list, tasks.logged_metrics),
            alone and tasks.logged_metrics(task_list, alone),
        )
        folder.write("distillation.json", report)
        model_card.add_comparison(report)
        return records, lines

    losses_of = partial(distillation.logged_losses, loss_parts, rise, reader.item_counts)

    # From here on a signal is a request, which all processes meet at the same step.
    requests = runtime.hold_signals(accelerator, checkpoints.every_seconds)
    watchdog = runtime.watch(folder, options.comm, accelerator)

    # twin step: begin
    def train_step(step: int, lr: float) -> torch.Tensor:
        """One update; its losses and requests stay in ``sums``. Returns the gradient's norm."""
        watchdog.begin("step", step)
        optim.set_learning_rate(optimizer, lr)
        item_counts = reader.item_counts(step)
        sums.clear()
        batch_statistics.begin()
        for micro_batch in reader.take(step):
            seed_generators(plan.forward_seed(options.seed, step, micro_batch.number))
            inputs, targets, mix = augment(micro_batch.inputs, micro_batch.targets)
            with sums.no_sync(micro_batch.is_last):
                output = model(inputs, **arguments(targets))
                loss, parts = objective(output, targets, item_counts, mix, inputs, micro_batch)
                accelerator.backward(sums.scaled(loss, micro_batch.is_real))
            sums.add_gradients(micro_batch.is_real)
            sums.add("loss", parts, micro_batch.is_real)
            batch_statistics.add_to(sums["batch_norm"], micro_batch.is_real)
        requests.add_to(sums["requests"])
        sums.reduce()
        grad_norm = whole(accelerator.clip_grad_norm_(parameters, max_grad_norm))
        if options.optim.max_grad_value is not None:
            torch.nn.utils.clip_grad_value_(parameters, options.optim.max_grad_value)
        # For optimizers that draw: one key on all processes, of a micro-batch that is not there.
        seed_generators(plan.forward_seed(options.seed, step, num_micro_batches))
        if guard.allows(step, sums["loss"], grad_norm):
            if scaler is None:
                optimizer.step()
            else:  # fp16: the gradients were unscaled before clipping
                scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        batch_statistics.finish(sums["batch_norm"], guard.healthy)
        if ema is not None:
            ema.update(step, guard.healthy)
        return grad_norm
    # twin step: end

    # ---- learning rate ----
    if options.optim.lr is None and state.peak_lr is None:
        with undone(module, optimizer, batch_statistics, ema, scaler):
            state.peak_lr = auto_rate(run_log, train_step, sums, guard, requests)
    peak_lr = options.optim.lr or state.peak_lr

    # ---- loop ----
    sums.watch_layers(module, optim.parameter_layers(module), lambda: state.step)
    profile_steps(options.profile, folder, watchdog, accelerator, sums, reader, batch_statistics,
                  optimizer, run_log.say, teachers)
    # twin loop: begin
    while True:
        evaluates = is_time(state.step, eval_every, total_steps)
        if evaluates and state.evaluated_step < state.step and not requests.stop:
            watchdog.begin("evaluation")
            started = time.perf_counter()
            with averaged():
                results = evaluate(module, validation, task_list, accelerator, requests.agree)
                if results is None:  # asked to stop: it is done again after the resume
                    continue
                metrics = tasks.logged_metrics(task_list, results)
                improved = state.observe(metrics[monitor], lower_is_better, results)
                if improved:
                    checkpoints.export("best", module, labels, results)
            if options.schedule.name == "plateau":
                state.reduce_on_plateau(metrics[monitor], lower_is_better, **schedule_args)
            run_log.evaluation(state.step, metrics, improved, time.perf_counter() - started)
        is_over = state.is_over(total_steps, options.loop.patience)
        if checkpoints.is_due(state.step, is_over or requests.stop or requests.save):
            watchdog.begin("save")
            checkpoints.save(module, optimizer, ema, state)
            requests.saved()
        if is_over or requests.stop:
            break

        lr = peak_lr * peak_share(state.step)
        grad_norm = train_step(state.step, lr)
        state.step += 1
        folder.step = state.step

        flush = is_time(state.step, eval_every, total_steps) or checkpoints.is_due(state.step)
        for record in readback.push(
            state.step - 1, lr, sums["loss"], grad_norm, sums["requests"], flush
        ):
            run_log.say(guard.observe(record, state))
            run_log.training(record, losses_of)
            requests.take(record.requests)
    # twin loop: end

    # ---- end ----
    watchdog.begin("end")
    if is_over:
        with averaged():
            checkpoints.export("final", module, labels, state.results)
    checkpoints.finish()
    if not is_over:
        requests.leave_if_stopped(state.step, total_steps)
    lines = None
    if state.best_results:
        checkpoints.load_best(module)
    if teachers.are_others and state.best_results:
        results, lines = compare()
        run_log.results(state.step, results)
    if options.log.report and state.best_results:
        records = predictions.records(task_list, validation)
        said = evaluate(module, validation, records, accelerator, requests.agree, run_log.say)
        requests.leave_if_stopped(state.step, total_steps)
        predictions.write(run_dir, said, task_list, dataset, module, options.log, run_log)
    run_log.summary(state, task_list, monitor, options.loop.patience)
    run_log.say(lines)
    run_log.close()


if __name__ == "__main__":
    runtime.run(main)
