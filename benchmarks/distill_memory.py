"""Peak memory of a language model's distillation step, in chunks against logits all at once.

    python benchmarks/distill_memory.py [--vocab 32000] [--width 128] [--teacher_width 256]
        [--batch 8] [--length 256] [--rounds 3]

``chunks`` is what distill.py does: student and teacher give hidden states, ``SoftLoss`` makes the
logits of both a few tokens at a time, and again in the backward pass. ``plain`` holds the logits of
both nets, and takes torch's cross entropy and the divergence of two log-softmaxes of them. Both
sides have the same nets and give the same loss; the teacher's forward pass belongs to both. Each
is measured in a fresh process, after a small step that loads what torch loads late. On a GPU the
figure is the most that torch's allocator held above what it held before the step; on a CPU how far
the resident memory of the process rose (Linux: VmHWM). The sides alternate, each going first every
other round; the ratios are medians over the rounds.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from gpt_memory import growth
from torch.nn import functional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from trainlib import distillation, runtime, tasks  # noqa: E402
from trainlib.data import TargetInfo  # noqa: E402
from trainlib.distillation.objective import Hidden  # noqa: E402
from trainlib.distillation.options import TeacherOptions  # noqa: E402
from trainlib.distillation.teacher import Teacher  # noqa: E402
from trainlib.models.gpt import GPT  # noqa: E402

SIDES = ("plain", "chunks")
BYTES_IN_MIB = 2**20
TEMPERATURE = 2.0


class Plain:
    """The loss with the logits of both nets held at once."""

    def __init__(self, student: GPT, teacher: GPT):
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        with torch.no_grad():
            teacher = self.teacher(tokens).flatten(0, 1)
        student = self.student(tokens).flatten(0, 1)
        hard = functional.cross_entropy(student, targets.flatten())
        soft = functional.kl_div(
            functional.log_softmax(student / TEMPERATURE, 1),
            functional.log_softmax(teacher / TEMPERATURE, 1), reduction="batchmean",
            log_target=True,
        )
        loss = hard + TEMPERATURE**2 * soft
        loss.backward()
        return loss.item()


class Chunks:
    """The loss by the parts that distill.py puts together."""

    def __init__(self, student: GPT, teacher: GPT, vocab_size: int):
        options = tasks.resolve(
            {"text": tasks.TaskOptions(kind="language_modeling")}, ["text"], ["text"]
        )
        [task] = tasks.build_tasks(options, {"text": TargetInfo([], vocab_size=vocab_size)})
        chosen = distillation.DistillOptions(temperature=TEMPERATURE)
        one = Teacher(teacher, TeacherOptions(model={"name": "gpt"}), [task], "teacher")
        accelerator = runtime.make_accelerator(False, 1)
        self.student, self.soft_loss = student, distillation.SoftLoss(task, chosen)
        self.teachers = distillation.Teachers([one], [task], chosen, accelerator)
        self.arguments = distillation.student_arguments(student, self.teachers, lambda targets: {})

    def step(self, tokens: torch.Tensor, targets: torch.Tensor) -> float:
        by_task = {"text": targets}
        output = self.student(tokens, **self.arguments(by_task))
        taught = self.teachers.teach(tokens, by_task, np.arange(len(tokens)))["text"]
        assert isinstance(taught, Hidden)
        hard, soft = self.soft_loss.losses(output, taught, by_task)
        loss = (hard.sum() + soft.sum()) / targets.numel()
        loss.backward()
        return loss.item()


def measure(arguments: argparse.Namespace) -> tuple[int, float, float]:
    """Bytes and seconds of one step of the side asked for, and its loss."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (GPT(arguments.vocab, depth=arguments.depth, width=width).to(device)
                        for width in (arguments.width, arguments.teacher_width))
    shape = (2, arguments.batch, arguments.length)
    tokens, targets = torch.randint(arguments.vocab, shape, device=device)
    side = (Plain(student, teacher) if arguments.side == "plain"
            else Chunks(student, teacher, arguments.vocab))
    side.step(tokens[:1, :8], targets[:1, :8])
    student.zero_grad()
    losses = []
    peak, seconds = growth(lambda: losses.append(side.step(tokens, targets)), device)
    return peak, seconds, losses[0]


def measured(side: str) -> list[float]:
    """The figures of a side, from a process of its own."""
    command = [sys.executable, *sys.argv, "--side", side]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr}")
    return [float(figure) for figure in result.stdout.split()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("vocab", 32000), ("depth", 4), ("width", 128), ("teacher_width", 256),
                          ("batch", 8), ("length", 256), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--side", choices=SIDES, help="measure this one in this process")
    arguments = parser.parse_args()
    if arguments.side:
        print(*measure(arguments))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU, one thread"
    print(f"torch {torch.__version__}, {device}; vocabulary {arguments.vocab:,}, depth "
          f"{arguments.depth}, width {arguments.width} and {arguments.teacher_width} of the "
          f"teacher, batch {arguments.batch} x {arguments.length} tokens, fp32, "
          f"{arguments.rounds} rounds")
    rounds = []
    for number in range(arguments.rounds):
        order = SIDES[:: -1 if number % 2 else 1]
        rounds.append({side: measured(side) for side in order})
    for side in SIDES:
        sizes, times, losses = zip(*(figures[side] for figures in rounds), strict=True)
        mib = [size / BYTES_IN_MIB for size in sizes]
        print(f"{side:8}{statistics.median(mib):8.0f} MiB ({min(mib):.0f} to {max(mib):.0f})"
              f"{statistics.median(times):8.2f} s ({min(times):.2f} to {max(times):.2f}), "
              f"loss {losses[0]:.6f}")
    for index, what in enumerate(("memory", "time")):
        ratios = [figures["chunks"][index] / figures["plain"][index] for figures in rounds]
        print(f"{what:8}{statistics.median(ratios):8.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
