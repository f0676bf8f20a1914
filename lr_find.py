"""Find the learning rate: a sweep over the very job of a recipe, on any number of processes.

    accelerate launch lr_find.py                                     # the built-in job
    accelerate launch lr_find.py --recipe recipes/digits_resnet.yaml
    accelerate launch lr_find.py --recipe mine.yaml --sweep.repeats 3 --apply
    python lr_find.py --help

Every step trains at a higher rate than the one before, until the loss blows up; the answer is
half the rate at which it ceases to fall steeply. The run folder gets lr_find.json, .csv and .png,
and with --apply a copy of the recipe with the rate in it. Nothing else changes.
"""

import math
from functools import partial
from pathlib import Path

import torch
from pydantic import Field

from trainlib import data, lr_suggestion, lr_sweep, models, optim, plan, runtime, sharding, tasks
from trainlib.batchnorm import BatchStatistics
from trainlib.checkpoint import CheckpointOptions, undone
from trainlib.config import Options, UserError, read, recipe_name
from trainlib.data import BatchOptions, DataOptions
from trainlib.evaluate import evaluate, model_arguments, try_model
from trainlib.gradients import StepSums
from trainlib.guard import Guard
from trainlib.lr_report import SweepOptions, counted, swept, swept_loss, write_report
from trainlib.micro_size import settle_micro_size
from trainlib.models import ModelOptions
from trainlib.optim import OptimOptions, ScheduleOptions
from trainlib.progress import LoopOptions, plan_steps
from trainlib.runlog import LogOptions
from trainlib.schedule import duration_steps, lr_multiplier
from trainlib.shards import load_whole, whole
from trainlib.tasks import TaskOptions


class FindOptions(Options):
    run_dir: str | None = None
    """Folder that the answer is written to; none: runs/ and the recipe's name."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the weights, the order of the samples and dropout."""
    deterministic: bool = False
    """Use only algorithms that give the same bits each time; GPUs get slower."""
    cpu_threads: int = Field(1, ge=1, le=1024)
    """Threads of each process on a CPU."""
    apply: bool = False
    """Write lr_find.yaml, the recipe with the answer as optim.lr."""
    sweep: SweepOptions = SweepOptions()
    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    tasks: dict[str, TaskOptions] = {}
    batch: BatchOptions = BatchOptions()
    optim: OptimOptions = OptimOptions()
    schedule: ScheduleOptions = ScheduleOptions()
    loop: LoopOptions = LoopOptions()
    checkpoint: CheckpointOptions = CheckpointOptions()
    log: LogOptions = LogOptions()
    comm: runtime.CommunicationOptions = runtime.CommunicationOptions()


def main(command_line: list[str]) -> None:
    # ---- options and machine ----
    options = read(FindOptions, command_line, __doc__)
    recipe, sweep, batch, first_seed = options, options.sweep, options.batch, options.seed
    try:
        rates = lr_sweep.sweep_rates(sweep.lr_min, sweep.lr_max, sweep.steps, sweep.spacing)
    except ValueError as error:
        raise UserError(f"sweep: {error}") from error
    run_dir = Path(options.run_dir or f"runs/{recipe_name(command_line)}")
    folder = runtime.RunFolder(run_dir)
    folder.check_free()
    accelerator = runtime.make_accelerator(options.deterministic, options.cpu_threads, options.comm)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    device = accelerator.device

    # ---- data and tasks ----
    source = data.open_source(options.data)
    task_options = tasks.resolve(options.tasks, source.target_candidates, source.columns)
    dataset = data.load(source, options.data, task_options)
    example, example_targets = dataset.example()
    num_samples = len(dataset.train)
    total_steps, _, _ = plan_steps(
        options.loop, options.schedule.warmup, num_samples, batch.global_size
    )
    verify_steps = None if sweep.verify is None else max(1, duration_steps(
        sweep.verify, num_samples, batch.global_size, total_steps
    ))
    task_list = tasks.build_tasks(task_options, dataset.targets)
    augment = data.build_augment(options.data.augment, example, task_options)

    # ---- model and optimizer ----
    model_options = models.complete(options.model, example.shape[1:], tasks.num_outputs(task_list),
                                    dataset.token_range, dataset.pad_id)

    def build_module(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        module = models.build_model(model_options, dataset.mean, dataset.deviation)
        models.start_weights(module, options.model.init_from, options.model.freeze,
                             options.model.allow_pickle)
        return module

    module = build_module(first_seed)
    try_model(module, example, example_targets, task_list, batch.smallest_micro_batch)
    arguments = model_arguments(module, task_list)
    sharding.place(module, accelerator, options.model.sync_batch_norm)
    optimizer = optim.build_optimizer(options.optim, module)
    options, found = settle_micro_size(
        options, run_dir, accelerator, module, optimizer, (example, example_targets), augment,
        arguments, partial(tasks.losses_of_trial, task_list),
    )
    batch = options.batch

    # ---- the parts of a step ----
    num_micro_batches = plan.num_micro_batches(batch.global_size, batch.micro_size)
    model, module, optimizer = sharding.prepare(accelerator, module, optimizer)
    scaler = accelerator.scaler
    batch_statistics = BatchStatistics(module, num_micro_batches)
    if options.model.compile:
        module.compile(backend=options.model.compile, dynamic=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    max_grad_norm = options.optim.max_grad_norm or float("inf")
    seed_generators = runtime.make_seeder(device)
    assignments = plan.assign(batch.global_size, batch.micro_size, rank, world_size)
    items = {task.name: task.items(dataset.train.num_valid[task.name]) for task in task_list}
    sizes = {"loss": len(task_list), "batch_norm": batch_statistics.size,
             "requests": runtime.Requests.NUM}
    sums = StepSums(accelerator, model, sizes, batch.exact_sum, len(assignments))
    validation = data.EvalReader(dataset.validation, batch.eval_size, rank, world_size, device)
    guard = Guard(optimizer, device, scaler, lambda step: {})
    ema = None  # an average says nothing about a rate
    requests = runtime.hold_signals(accelerator, None)
    watchdog = runtime.watch(folder, options.comm, accelerator)

    def objective(output, targets, item_counts, mix, *_):
        """The micro-batch's share of the step's loss, whole and by task."""
        shares = [
            task.losses(output, targets, mix).sum() * (task.weight / max(item_counts[task.name], 1))
            for task in task_list
        ]
        return sum(shares[1:], start=shares[0]), shares

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

    loss_at = swept_loss(train_step, sums, guard, requests)

    def loss_after(peak: float, steps: int) -> float:
        """The evaluation loss of a short run from the start: a tenth of warm-up, then a cosine."""
        with undone(module, optimizer, batch_statistics, ema, scaler):
            for step in counted(steps, f"a run at {peak:.2g}"):
                lr = peak * lr_multiplier("cosine", step, steps, steps // 10, 0.0)
                if loss_at(step, lr) is None and scaler is None:  # which a run would not survive
                    return math.inf
            watchdog.begin("evaluation")
            results = evaluate(module, validation, task_list, accelerator, requests.agree)
        requests.leave_if_stopped()
        loss = tasks.logged_metrics(task_list, results)["eval/loss"]
        return loss if math.isfinite(loss) else math.inf

    # ---- sweep ----
    runs, verified = [], {}
    for seed in reversed(range(first_seed, first_seed + sweep.repeats)):  # the first one last
        options = recipe.replaced({"seed": seed})
        batch_plan = plan.BatchPlan(num_samples, batch.global_size, seed)
        reader = data.Reader(dataset.train, batch_plan, assignments, device, items)
        with undone(module, optimizer, batch_statistics, ema, scaler):
            if seed != first_seed:
                load_whole(module, build_module(seed).state_dict())
            runs.insert(0, swept(loss_at, rates, lr_sweep.StopRule(len(rates))))
    _, suggestion = lr_suggestion.combine(runs)
    if verify_steps is not None and suggestion.answer is not None:
        tried = [0.1, 0.3, 1.0, 3.0]
        while tried:
            lr = suggestion.answer * tried.pop(0)
            verified[lr] = loss_after(lr, verify_steps)
            # The best may lie beyond either end, but not outside the sweep.
            best, ends = min(verified, key=verified.get), (min(verified), max(verified))
            if not tried and best in ends:
                further = best * (0.3 if best == ends[0] else 3)
                tried += [further / suggestion.answer] * (rates[0] <= further <= rates[-1])
    if accelerator.is_main_process:
        said = write_report(run_dir, runs, suggestion, verified, recipe if recipe.apply else None)
        print(*found, said, sep="\n")
    if recipe.apply and suggestion.answer is None:
        raise UserError("apply: the sweep has no answer, so no recipe was written")


if __name__ == "__main__":
    runtime.run(main)
