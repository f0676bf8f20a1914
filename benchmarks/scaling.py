"""Scaling on paper: what a step and a checkpoint cost by model size and process count.

    python benchmarks/scaling.py [--processes 4096] [--samples 1000000000000]

Bytes and messages of a step are counted on real runs of up to 3 processes, where each collective is
caught on its way, and put beside the formula that the table then uses for more. Checkpoints are
written at three sizes. The plan is simulated for every process of a large machine.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

import numpy as np  # noqa: E402
import torch  # noqa: E402

from trainlib import models, optim, plan, runtime  # noqa: E402
from trainlib.checkpoint import CheckpointOptions, Checkpoints  # noqa: E402
from trainlib.gradients import StepSums  # noqa: E402
from trainlib.progress import Progress  # noqa: E402

OTHER_SUMS = 3  # numbers that ride along in these jobs: one loss, two requests
HIDDEN = {"1.3 M": [1100, 1100], "13 M": [3610, 3610], "50 M": [7040, 7040]}
COUNTED = ("1.3 M", "13 M")
SIZES = {"10 M": 10**7, "100 M": 10**8, "1 G": 10**9, "7 G": 7 * 10**9}
MICRO_STEPS = 4


def build(hidden: list[int]) -> torch.nn.Module:
    torch.manual_seed(0)
    options = models.ModelOptions(args={"hidden": hidden})
    return models.build_model(models.complete(options, (1, 8, 8), 10))


# ---- bytes and messages ----


def count_messages(exact: bool, hidden: list[int]) -> None:
    """On every process of a launch: prints what one step of ``MICRO_STEPS`` micro-batches sends."""
    import torch.distributed

    accelerator = runtime.make_accelerator(False, 1)
    module = build(hidden)
    model = accelerator.prepare(module)
    sums = StepSums(accelerator, model, {"loss": 1, "requests": 2}, exact, MICRO_STEPS)
    sent = {"bytes": 0, "messages": 0}

    def note(tensor: torch.Tensor) -> None:
        sent["bytes"] += tensor.nbytes
        sent["messages"] += 1

    if accelerator.num_processes > 1:
        all_reduce = torch.distributed.all_reduce

        def noted(tensor, *args, **kwargs):
            note(tensor)
            return all_reduce(tensor, *args, **kwargs)

        def hook(_, bucket):
            note(bucket.buffer())
            future = all_reduce(bucket.buffer(), async_op=True).get_future()
            return future.then(lambda done: done.value()[0] / accelerator.num_processes)

        torch.distributed.all_reduce = noted
        model.register_comm_hook(None, hook)
    inputs = torch.zeros(16, 1, 8, 8)
    for _ in range(2):  # DDP lays out its buckets anew after the first
        sent.update(bytes=0, messages=0)
        sums.clear()
        for number in range(MICRO_STEPS):
            is_last = number == MICRO_STEPS - 1
            with sums.no_sync(is_last):
                accelerator.backward(sums.scaled(model(inputs).sum(), True))
            sums.add_gradients(True)
        sums.reduce()
        module.zero_grad(set_to_none=True)
    if accelerator.is_main_process:
        parameters = sum(p.numel() for p in module.parameters())
        print(json.dumps(sent | {"parameters": parameters}), flush=True)


def formula(parameters: int, num_tensors: int, exact: bool) -> int:
    """Bytes that each process puts into the sums of one step, if there are several processes."""
    if exact:
        return 8 * (parameters + num_tensors + OTHER_SUMS)
    return 4 * parameters + 8 * OTHER_SUMS


def message_tables() -> None:
    print("a step's sums, counted (4 micro-batches a process):")
    for name in COUNTED:
        hidden = HIDDEN[name]
        num_tensors = len(list(build(hidden).parameters()))
        for exact in (True, False):
            for processes in (1, 2, 3) if name == COUNTED[0] else (2,):
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node", str(processes), __file__, "--count", str(int(exact)),
                           *map(str, hidden)]
                result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
                line = next((line for line in result.stdout.splitlines() if line[:1] == "{"), None)
                if line is None:
                    sys.exit(result.stdout + result.stderr)
                found = json.loads(line)
                wanted = formula(found["parameters"], num_tensors, exact) if processes > 1 else 0
                verdict = "as the formula" if found["bytes"] == wanted else f"FORMULA {wanted}"
                print(f"  {name:>6} parameters, {processes} processes, "
                      f"{'exact' if exact else 'DDP  '}: {found['bytes']:>12,} bytes in "
                      f"{found['messages']} messages, {verdict}")
    print("each process sends and receives, a ring all-reduce (2 (W - 1) / W of the sums), GB a "
          "step:")
    worlds = (2, 8, 64, 512, 4096)
    print("  " + " " * 18 + "".join(f"{f'W = {world}':>10}" for world in worlds))
    for name, parameters in SIZES.items():
        for exact in (True, False):
            size = formula(parameters, 0, exact)
            numbers = "".join(f"{2 * (w - 1) / w * size / 1e9:>10.3f}" for w in worlds)
            print(f"  {name:>6} {'exact' if exact else 'DDP':<10} {numbers}")


# ---- checkpoints ----


def checkpoint_times(rounds: int) -> None:
    print(f"checkpoints of MLPs with AdamW, medians of {rounds}:")
    accelerator = runtime.make_accelerator(False, 1)
    for name, hidden in HIDDEN.items():
        module = build(hidden)
        optimizer = optim.build_optimizer(optim.OptimOptions(), module)
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            run.mkdir()
            checkpoints = Checkpoints(
                run, accelerator, CheckpointOptions(every="1 step", keep=1), 10**6, 64,
                {"batch.global_size": 64}, "")
            checkpoints.open(print, lambda: None)
            progress, stalls, wholes = Progress(), [], []
            for _ in range(rounds + 1):
                progress.step += 1
                started = time.perf_counter()
                checkpoints.save(module, optimizer, None, progress)
                stalls.append(time.perf_counter() - started)
                checkpoints.finish()
                wholes.append(time.perf_counter() - started)
            newest = sorted((run / "checkpoints").iterdir())[-1]
            size = sum(file.stat().st_size for file in newest.iterdir())
            started = time.perf_counter()
            checkpoints.find_start(module)
            verified = time.perf_counter() - started
        stall, whole = statistics.median(stalls[1:]), statistics.median(wholes[1:])
        print(f"  {name:>6} parameters, {size / 1e6:>7.1f} MB: the loop waits {stall * 1e3:>6.1f} "
              f"ms, written and hashed after {whole * 1e3:>7.1f} ms ({size / whole / 1e9:.2f} "
              f"GB/s), verified in {verified * 1e3:>7.1f} ms")


# ---- the plan ----


def plan_cost(processes: int, samples: int, micro_size: int = 32, micro_steps: int = 2) -> None:
    """The plan of every process, in turn, for two steps far inside the run."""
    global_size = processes * micro_size * micro_steps
    print(f"the plan at W = {processes:,}, N = {samples:,}, global batch {global_size:,} "
          f"(micro-batches of {micro_size}, {micro_steps} a process):")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planner = plan.BatchPlan(samples, global_size, 0)
    last_step = 3 * samples // global_size  # in the fourth epoch
    planner.block(0)  # numpy's own start
    times = []
    for step in (0, 1, last_step, last_step + 1, last_step + 2):
        started = time.process_time()
        block = planner.block(step // planner.steps_per_block)
        times.append((time.process_time() - started) / planner.steps_per_block)
    whole = [plan.assign(global_size, micro_size, rank, processes) for rank in range(processes)]
    used = np.zeros(global_size, dtype=np.uint8)
    for assignment in (each for own in whole for each in own):
        used[assignment.slots] += 1
    assert (used == 1).all()  # every slot on one process
    assert len(np.unique(block)) == block.size  # no sample twice within an epoch
    started = time.process_time()
    for _ in range(100):
        plan.assign(global_size, micro_size, processes - 1, processes)
    assigned = (time.process_time() - started) / 100
    tracemalloc.start()
    planner.block(last_step // planner.steps_per_block)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    nanoseconds = statistics.median(times) / global_size * 1e9
    print("  a step's samples, on each process, processor time: "
          f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f} ms, {nanoseconds:.0f} ns a sample, "
          f"peak {peak / 2**20:.1f} MiB; at step 0 as at step {last_step:,}")
    print(f"  its {len(whole[0])} micro-batches of them: {assigned * 1e6:.0f} microseconds, once")
    print(f"  the process has grown by {(after - before) / 1024:.0f} MiB, with all "
          f"{processes:,} processes' assignments")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=10**12)
    parser.add_argument("--rounds", type=int, default=5, help="saves of each size")
    parser.add_argument("--count", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.count:
        count_messages(bool(options.count[0]), options.count[1:])
        return
    plan_cost(options.processes, options.samples)
    message_tables()
    checkpoint_times(options.rounds)


if __name__ == "__main__":
    main()
