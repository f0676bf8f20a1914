"""What a run survives.

    python benchmarks/faults.py [--kills [50]] [--soak [100]] [--seed 0]

Without an option: both parts. Kills: a job with 160 MB of state, saved after every step, is
killed in its saves. Soak: a small job with all that has a state meets faults of all kinds of
``FAULTS``. Both must end as the run that nothing disturbed, in every bit of the weights and every
record; exit code 1 if a promise was broken. On CPUs, Linux; full disks want root, who may mount
a small one.
"""

import argparse
import atexit
import errno
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP, SIGTERM, SIGUSR1
from typing import NamedTuple

import psutil
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}

from trainlib.checkpoint.layout import step_folders  # noqa: E402

HIDDEN = [3610, 3610]  # 13.3 M parameters
EVERY = 5  # steps between the soak's checkpoints
NAN = "a NaN"
IN_A_BLOCK = 16  # records that a full disk still takes: 4 KiB of at least 256 bytes
DISK_MIB = 32  # that the soak's run folder lies on
SOAK_JOB = (
    "--model.name resnet --model.args.width 8 --batch.micro_size 16 --data.in_memory false "
    "--data.workers 2 --data.augment.crop 1 --data.augment.mixup 0.2 --schedule.name plateau "
    f"--schedule.args.patience 0 --schedule.args.factor 0.8 --checkpoint.every {EVERY}~steps "
    "--optim.ema_half_life 5~steps --loop.eval_every 7~steps"
)


class Life:
    """One start of a run's command, in a session of its own; what it says goes to a file."""

    def __init__(
        self, folder: Path, flags: list[str], processes: int = 1, nan_steps: tuple[int, ...] = ()
    ):
        self.folder, self.checkpoints, self.processes = folder, folder / "checkpoints", processes
        self.output = folder.parent.with_name(f"{folder.name}.output")  # on another disk
        folder.parent.mkdir(parents=True, exist_ok=True)
        self.is_new = not step_folders(self.checkpoints)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                    str(processes)] if processes > 1 else []
        with self.output.open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *launcher, "benchmarks/poisoned.py", "--run_dir", str(folder),
                 "--log.trackers", "[]", "--log.report", "false", "--log.every", "1", *flags],
                cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                env=os.environ | {"NAN_STEPS": ",".join(map(str, nan_steps))},
            )
        atexit.register(self.process.terminate)  # a session of its own hears no Ctrl-C

    @property
    def start(self) -> int | None:
        """The step it went on from; none: it has not begun to write."""
        said = self.output.read_text()
        if resumed := re.search(r"resumed at step (\d+) of", said):
            return int(resumed[1])
        return 0 if self.is_new and "data: " in said else None

    def wait_until(self, is_time: Callable[[], object]) -> None:
        """Returns when it is time; a life that ends before that ends the benchmark."""
        while not is_time():
            if self.process.poll() is not None:
                raise SystemExit(f"{self.output.read_text()}\nended: {self.process.returncode}")
            time.sleep(0.003)

    def wait_for_step(self, number: int) -> None:
        self.wait_until(lambda: self.start is not None)
        target = self.start + number
        self.wait_until(lambda: recorded_step(self.folder) >= target)

    def wait_for_words(self, words: str) -> None:
        self.wait_until(lambda: words in self.output.read_text())

    def wait_for_save(self) -> None:
        self.wait_until(lambda: self.start is not None)
        former = self.writing()
        self.wait_until(lambda: self.writing() - former)

    def leftovers(self) -> set[str]:
        """What is on its way into the folder of checkpoints, or out of it."""
        found = os.listdir(self.checkpoints) if self.checkpoints.exists() else []
        return {name for name in found if name.startswith(".tmp_")}

    def writing(self) -> set[str]:
        """What this life is writing."""
        return {name for name in self.leftovers() if name.endswith(f".{self.main_pid()}")}

    def main_pid(self) -> int:
        """The pid in the lock, 0 without one."""
        try:
            return json.loads((self.folder / "run.lock").read_text())["pid"]
        except (OSError, ValueError):
            return 0

    def tree(self) -> list[psutil.Process]:
        """All its processes, the launcher's and the data workers included."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def ranks(self) -> dict[int, int]:
        """The pids of the launcher's processes by rank."""
        return {int(process.environ()["RANK"]): process.pid
                for process in psutil.Process(self.process.pid).children()}

    def end(self, number: int, pid: int | None = None) -> float:
        """Signals a process, or all process groups, and returns the seconds until all are gone."""
        tree, started = self.tree(), time.perf_counter()
        if pid is None:  # a launcher gives each process a group of its own
            for group in {os.getpgid(process.pid) for process in tree if is_alive(process)}:
                os.killpg(group, number)
        else:
            os.kill(pid, number)
        while self.process.poll() is None or any(map(is_alive, tree)):
            time.sleep(0.01)
        return time.perf_counter() - started


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def records(folder: Path) -> list[dict]:
    """The whole lines of metrics.jsonl."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def recorded_step(folder: Path) -> int:
    return max((record["step"] for record in records(folder)), default=0)


def exit_code(folder: Path) -> int | None:
    file = folder / "exit.json"
    return json.loads(file.read_text())["code"] if file.exists() else None


def finished(life: Life) -> Path:
    life.process.wait()
    if exit_code(life.folder) != 0:
        raise SystemExit(life.output.read_text())
    return life.folder


def is_same_run(first: Path, second: Path) -> bool:
    """Prints how far the weights and records of two finished runs differ; whether they do not."""
    largest = 0.0
    for which in ("final", "best"):
        left, right = (load_file(run / which / "model.safetensors") for run in (first, second))
        largest = max(largest, *((left[name].double() - right[name].double()).abs().nan_to_num(
            float("inf")).max().item() for name in left | right))
    curves = [[{k: v for k, v in record.items() if not k.startswith(("speed/", "memory/"))}
               for record in records(run)] for run in (first, second)]
    num_equal = sum(a == b for a, b in zip(*curves, strict=False))
    print(f"  weights, final and best: {largest} from those of the undisturbed run; {num_equal} of "
          f"{len(curves[1])} losses and evaluations equal\n")
    return largest == 0.0 and curves[0] == curves[1]


def kill_in_saves(number: int, folder: Path, chance: random.Random) -> bool:
    """Whether a run survives so many kills in its saves, each the end of one that was resumed.

    At most two intervals are lost: before checkpoint k is copied, k - 1 may still be on its way to
    the disk, and the loop waits for it. Then k - 2 is the newest whole one, and step k is recorded.
    """
    flags = ["--model.args.hidden", str(HIDDEN), "--loop.duration", f"{3 * number + 10} steps",
             "--loop.eval_every", "10 steps", "--checkpoint.every", "1 step"]
    undisturbed, times = Life(folder / "undisturbed", flags), defaultdict(list)
    while undisturbed.process.poll() is None:
        for name in undisturbed.writing():
            times[name].append(time.perf_counter())
        time.sleep(0.003)
    save_seconds = statistics.median(seen[-1] - seen[0] for seen in times.values())
    num_resumed = num_writing = num_rotating = most_lost = most_left = 0
    life = Life(folder / "killed", flags)
    for _ in range(number):
        for _ in range(chance.randint(1, 3)):
            life.wait_for_save()
        own = f".{life.main_pid()}"  # a save clears away what others have left before it begins
        most_left = max(most_left, sum(own not in name for name in life.leftovers()))
        time.sleep(chance.uniform(0, 1.5 * save_seconds))  # the rename, the removal, the next copy
        life.end(SIGKILL)
        left, recorded = life.leftovers(), recorded_step(life.folder)
        num_writing += any(name.endswith(own) for name in left)
        num_rotating += any(name.endswith(".removed") for name in left)
        whole = [int(path.name[5:]) for path in step_folders(life.checkpoints)]
        life = Life(folder / "killed", flags)
        life.wait_for_step(0)
        num_resumed += life.start == max(whole, default=0)
        most_lost = max(most_lost, recorded - life.start)
    run = finished(life)
    most_left = max(most_left, len(list(run.rglob(".tmp_*"))))
    print(f"{number} x SIGKILL around a save, which takes {save_seconds:.2f} s\n"
          f"  resumed at the newest whole checkpoint: {num_resumed} of {number}\n"
          f"  in the middle of a write: {num_writing}, of a removal: {num_rotating}\n"
          f"  most steps lost: {most_lost} (bound: 2)\n"
          f"  leftovers after the next save: {most_left}")
    is_kept = num_resumed == number and most_lost <= 2 and most_left == 0
    return is_same_run(run, finished(undisturbed)) and is_kept


def strike_step(number: int, to_all: bool, life: Life, chance: random.Random) -> float:
    life.wait_for_step(chance.randint(0, 2 * EVERY))
    time.sleep(chance.uniform(0, 0.05))
    return life.end(number, None if to_all else life.main_pid())


def strike_save(number: int, life: Life, chance: random.Random) -> float:
    life.wait_for_save()
    time.sleep(chance.uniform(0, 0.03))
    return life.end(number)


def strike_start(number: int, life: Life, chance: random.Random) -> float:
    """At any moment from when Python has loaded what catches signals."""

    def catching() -> list[int]:
        texts = {process.pid: Path(f"/proc/{process.pid}/status").read_text()
                 for process in life.tree() if "torch.distributed.run" not in process.cmdline()}
        return [pid for pid, text in texts.items()
                if int(re.search(r"SigCgt:\s*(\w+)", text)[1], 16) >> (number - 1) & 1]

    life.wait_until(catching)
    time.sleep(chance.uniform(0, 0.3))
    return life.end(number, catching()[0])


def fill(folder: Path) -> Path:
    """Fills the disk that a folder is on; returns the file that has to go."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
    return filler


def strike_disk(ends_full: bool, life: Life, chance: random.Random) -> float:
    """Fills the disk until a save has failed; killed then, or stopped after there is room again."""
    life.wait_for_step(chance.randint(1, EVERY))
    filler = fill(life.folder.parent)
    life.wait_for_words("not written: ")
    life.wait_for_words("metrics.jsonl: cannot be written")  # its last block had room for a while
    if ends_full:
        seconds = life.end(SIGKILL)
    filler.unlink()
    if not ends_full:
        life.wait_for_words("metrics.jsonl: can be written again; no record is missing")
        seconds = life.end(SIGTERM, life.main_pid())
    return seconds


def hang(life: Life, chance: random.Random) -> float:
    """Stops one process for good; the others notice, and a launcher ends them."""
    life.wait_for_step(chance.randint(0, 2 * EVERY))
    time.sleep(chance.uniform(0, 0.05))
    stopped = chance.choice(list(life.ranks().values()))
    os.kill(stopped, SIGSTOP)
    started = time.perf_counter()
    while exit_code(life.folder) is None:
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    life.end(SIGKILL, stopped)  # a launcher's SIGTERM does not reach it
    return seconds


def slow_down(life: Life, chance: random.Random) -> float:
    """Lets one process run for a part of the time only, until it has been named; then stops all."""
    life.wait_for_step(chance.randint(0, EVERY))
    rank, slow = chance.choice(list(life.ranks().items()))

    def is_named() -> object:
        os.kill(slow, SIGSTOP)
        time.sleep(0.06)
        os.kill(slow, SIGCONT)
        time.sleep(0.02)
        return re.search(rf"process {rank} on \S+ is slow", life.output.read_text())

    life.wait_until(is_named)
    return life.end(SIGTERM, life.main_pid())


def damage(spoil: Callable, life: Life, chance: random.Random) -> str:
    """Stops a run and spoils a file of its newest checkpoint."""
    life.wait_until(lambda: life.start is not None and len(step_folders(life.checkpoints)) > 1)
    strike_step(SIGTERM, False, life, chance)
    newest = step_folders(life.checkpoints)[-1]
    file = chance.choice(sorted(newest.iterdir()))
    spoil(file, chance)
    return f"checkpoints/{newest.name} is damaged and left out: {file.name}: "


def flip_bit(file: Path, chance: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)


class Fault(NamedTuple):
    """What ends a life, and what is promised of it."""

    strike: Callable[[Life, random.Random], float | str]
    """Returns when the life is over: the seconds that took, or what the next one has to say."""
    code: int | None  # of exit.json; none: nobody was left to write it
    most_lost: int  # recorded steps
    moves: bool = False  # the run goes on with another number of processes
    processes: int = 1  # at least
    flags: str = ""


FAULTS = {
    "SIGKILL": Fault(partial(strike_step, SIGKILL, True), None, 2 * EVERY),
    "SIGKILL in a save": Fault(partial(strike_save, SIGKILL), None, 2 * EVERY),
    "SIGKILL, then moved": Fault(partial(strike_step, SIGKILL, True), None, 2 * EVERY, True),
    "SIGTERM": Fault(partial(strike_step, SIGTERM, False), 75, 0),
    "SIGUSR1, then moved": Fault(partial(strike_step, SIGUSR1, False), 75, 0, True),
    "SIGINT to all": Fault(partial(strike_step, SIGINT, True), 75, 0),
    "SIGTERM at start-up": Fault(partial(strike_start, SIGTERM), 75, 0),
    "a flipped bit": Fault(partial(damage, flip_bit), 75, EVERY),
    "a truncated file": Fault(partial(damage, lambda file, chance: os.truncate(
        file, chance.randrange(file.stat().st_size))), 75, EVERY),
    "a missing file": Fault(partial(damage, lambda file, chance: file.unlink()), 75, EVERY),
    "a full disk": Fault(partial(strike_disk, False), 75, 0),
    "SIGKILL on a full disk": Fault(partial(strike_disk, True), None, 2 * EVERY + IN_A_BLOCK),
    "a slow process": Fault(slow_down, 75, 0, processes=2),
    "a hung process": Fault(hang, 5, 2 * EVERY, processes=2, flags=(
        "--comm.hang_after 5~seconds --comm.start_timeout 30~seconds")),
}


def spaced(flags: str) -> list[str]:
    return [flag.replace("~", " ") for flag in flags.split()]


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """Mounts a small disk there; whether that could be done."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "tmpfs", str(folder)]
    is_mounted = subprocess.run(mount, capture_output=True).returncode == 0
    if not is_mounted:
        print("full disks are left out: they want root, who may mount a small one")
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def soak(number: int, folder: Path, has_small_disk: bool, chance: random.Random) -> bool:
    """Whether a run survives so many faults, of all kinds in turn, in random order."""
    struck = folder / "struck"
    faults = {kind: fault for kind, fault in FAULTS.items() if has_small_disk or "disk" not in kind}
    every_kind = [*faults, NAN]
    kinds = [every_kind[index % len(every_kind)] for index in range(number)]
    total_steps = 4 * EVERY * number + 20
    nan_steps = tuple(sorted(chance.sample(range(total_steps), kinds.count(NAN))))
    flags = [*spaced(SOAK_JOB), "--loop.duration", f"{total_steps} steps"]
    undisturbed = finished(Life(folder / "undisturbed", flags, nan_steps=nan_steps))
    strikes = [kind for kind in kinds if kind != NAN]
    chance.shuffle(strikes)
    kept, lost, seconds = defaultdict(list), defaultdict(list), defaultdict(list)
    processes, pending = 1, None
    for kind in [*strikes, None]:
        fault = faults.get(kind)
        processes = max(processes, fault.processes if fault else 1)
        life = Life(struck, [*flags, *spaced(fault.flags if fault else "")], processes, nan_steps)
        result = fault.strike(life, chance) if fault else finished(life)
        if pending and life.start is not None:
            former, recorded, expected = pending
            lost[former].append(recorded - life.start)
            kept[former].append(expected in life.output.read_text()
                                and lost[former][-1] <= faults[former].most_lost)
            pending = None
        if fault is None:
            break
        kept[kind].append(exit_code(life.folder) == fault.code)
        if isinstance(result, float):
            seconds[kind].append(result)
        if life.start is not None:
            pending = kind, recorded_step(life.folder), result if isinstance(result, str) else ""
        if fault.moves:
            processes = chance.choice([count for count in (1, 2, 3) if count != processes])
    skipped = [json.loads(line)["step"]
               for line in (struck / "bad_steps.jsonl").read_text().splitlines()]
    kept[NAN] = [skipped == list(nan_steps)]
    print(f"{'fault':24}{'times':>6}{'as promised':>13}{'most steps lost':>17}{'seconds':>9}")
    for kind in every_kind:
        bound = f"{max(lost[kind], default=0)} (bound: {faults[kind].most_lost})" if (
            kind in faults) else ""
        print(f"{kind:24}{kinds.count(kind):>6}{'yes' if all(kept[kind]) else 'NO':>13}{bound:>17}"
              f"{f'{max(seconds[kind]):.1f}' if seconds[kind] else '':>9}")
    return is_same_run(struck, undisturbed) and all(all(each) for each in kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=0, nargs="?", const=50)
    parser.add_argument("--soak", type=int, default=0, nargs="?", const=100)
    parser.add_argument("--seed", type=int, default=0, help="of what happens when")
    options = parser.parse_args()
    if not (options.kills or options.soak):
        options.kills, options.soak = 50, 100
    is_kept, chance = True, random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.kills:
            is_kept &= kill_in_saves(options.kills, folder / "kills", chance)
        if options.soak:
            with small_disk(folder / "soak") as is_mounted:
                is_kept &= soak(options.soak, folder / "soak", is_mounted, chance)
    sys.exit(0 if is_kept else 1)


if __name__ == "__main__":
    main()
