"""Predictions of a trained model for other data, and their evaluation where the target is there.

    python -m trainlib.predict runs/wine new_wine.csv                   # predictions.csv here
    python -m trainlib.predict runs/photos photos/ --out out.csv        # a folder, a file, a glob
    python -m trainlib.predict copied/best x.parquet --split test --out -
    python -m trainlib.predict runs/wine                                # the run's own validation

RUN is a run folder, or its best/ or final/ alone. DATA is whatever data.source of a recipe is, and
also images in no class folders. Without it the run's own validation split is predicted, to the last
bit what the run itself says. --split train and --split validation mean, of any DATA, what the
recipe means by them; other splits are the source's own.

A row is a line (of several tasks or numbers, several): row of the source, task, target and loss
where they are there, prediction, confidence, file, and, for a row that cannot be read, the error.
Such rows are told on stderr, too, the rest is predicted, and the exit code stays 0; it is 2 when
no row can be read, or for a mistake of yours.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO

import torch
from accelerate.utils import convert_outputs_to_fp32
from pydantic import ValidationError
from torch import Tensor

from trainlib import durable, memory, tasks
from trainlib.config import UserError
from trainlib.data import DataOptions, EvalReader
from trainlib.data.fresh import Fresh, Known, read_rows
from trainlib.evaluate import evaluate
from trainlib.finished import WEIGHTS, Finished
from trainlib.predictions.places import check_places, is_same_source, told
from trainlib.predictions.rows import Recorder, decided_pixels
from trainlib.predictions.table import NOT_FINITE, lines
from trainlib.tasks import Task
from trainlib.user_code import describe_error

_SHOWN = 20  # rows that cannot be read, on stderr; the file has all
_GONE = ("no file or folder", "no file matches", "No such file", "not found")
_PRECISIONS = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _Asked:
    """What ``evaluate`` wants of a task: its metrics and what is said to each sample, in one pass.

    Of a segmentation without masks there is also each class's share of the pixels, and the mean
    confidence.
    """

    def __init__(self, task: Task, reader: EvalReader):
        self.task, self.recorder, self.batch_size = task, Recorder(task, reader), reader.batch_size
        self.name, self.may_fuse, self.num_counts = task.name, task.may_fuse, task.num_counts
        self.num_shares = 0
        if task.kind == "segmentation":
            self.num_shares = self.batch_size * (len(task.label_names) + 1)
        self.num_sums = (task.num_sums + self.recorder.num_sums + self.num_shares
                         + self.batch_size)

    def statistics(self, output: Any, targets: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        counts, sums = self.task.statistics(output, targets)
        parts = [sums, self.recorder.statistics(output, targets)[1]]
        if self.num_shares:
            predicted, confidence = decided_pixels(self.task, output, targets[self.name])
            shares = [(predicted == k).flatten(1).double().mean(1)
                      for k in range(len(self.task.label_names))]
            shares = torch.stack([*shares, confidence.double().flatten(1).mean(1)], 1).flatten()
            parts.append(torch.nn.functional.pad(shares, (0, self.num_shares - len(shares))))
        not_finite = _not_finite(self.task, output, targets)
        parts.append(torch.nn.functional.pad(not_finite, (0, self.batch_size - len(not_finite))))
        return counts, torch.cat([part.to(sums.dtype) for part in parts])

    def result(self, counts: Tensor, sums: Tensor) -> dict[str, Any]:
        own, rows, shares, not_finite = sums.split(
            [self.task.num_sums, self.recorder.num_sums, self.num_shares, self.batch_size], 1)
        found = self.recorder.result(counts, rows.contiguous())
        found["not_finite"] = set(not_finite.flatten().nonzero().flatten().tolist())
        if self.num_shares:
            found["shares"] = shares.reshape(-1, len(self.task.label_names) + 1).cpu().tolist()
        if counts[0].item():  # contiguous, as the task's alone: the order of its sum is the same
            found["metrics"] = self.task.result(counts, own.contiguous())
        return found


def _not_finite(task: Task, output: Any, targets: Mapping[str, Tensor]) -> Tensor:
    """[samples] bool: whether an output says nothing; logits of -inf rule a class out."""
    if isinstance(output, Mapping) and "losses" in output:
        output = output["losses"]
    else:
        output = task.output(output, targets[task.name])
    is_bad = output.isnan() | (output == math.inf)
    if task.kind == "regression":
        is_bad |= output == -math.inf
    return is_bad.flatten(1).any(1)


def predict(
    run: Finished, options: DataOptions, which: str | None, batch_size: int | None = None,
    compiles: bool = False, precision: str | None = None,
) -> tuple[Fresh, list[Task], dict[str, dict]]:
    """What a run's net says to rows of a source, by the pass and the batches of its evaluation.

    Args:
        options: of the run's data, with the source.
        which: as ``read_rows`` has it.
        batch_size: samples per forward; none: the run's.
        compiles: whether the net is compiled as it was in training.
        precision: ``no``, ``bf16`` or ``fp16``; none: the run's, where its folder tells.

    Returns:
        The rows, the tasks, and by task ``rows`` as ``Recorder`` has them, ``not_finite``, the
        places among them of outputs that are NaN or infinite, and ``metrics`` where there are
        targets.

    Raises:
        UserError: no row can be read, the net cannot take them, or all it says is NaN.
    """
    task_options, module, device = run.tasks(), run.module, run.device
    known = Known(run.labels, run.model.input_shape, run.model.input_dtype, run.vocab_size)
    fresh = read_rows(options, task_options, known, which)
    task_list = tasks.build_tasks(task_options, fresh.targets)
    dtype = _PRECISIONS[precision or _precision_of(run)]
    if dtype is not None:  # as Accelerate does it
        module.forward = convert_outputs_to_fp32(
            torch.autocast(device.type, dtype=dtype)(module.forward))
    if compiles and run.model.compile:
        module.compile(backend=run.model.compile, dynamic=False)
    size = batch_size or run.batch().eval_size
    reader = EvalReader(fresh.split, size, 0, 1, device)
    alone = SimpleNamespace(device=device, num_processes=1)
    asked = [_Asked(task, reader) for task in task_list]
    try:
        said = evaluate(module, reader, asked, alone)
    except UserError:
        raise
    except Exception as error:  # of memory, and whatever a net of the user's own raises
        if memory.is_out_of_memory(error):
            raise UserError(f"out of memory at {size} samples a forward; give a smaller "
                            "--batch_size, or --device cpu") from error
        raise UserError(f"the net cannot take these inputs: {describe_error(error)}") from error
    if all(len(found["not_finite"]) == len(fresh.split) for found in said.values()):
        raise UserError(f"{NOT_FINITE} in all {len(fresh.split):,} rows: the training diverged, or "
                        "the inputs are far from its own; try --weights best, or --precision no")
    return fresh, task_list, said


def _precision_of(run: Finished) -> str:
    found = durable.read_json(run.folder.parent / "environment.json").get("mixed_precision")
    return found if found in _PRECISIONS else "no"


def evaluation(said: Mapping[str, dict]) -> dict[str, dict]:
    """Of the tasks with targets, what stands in evaluation.json of a run."""
    return {name: found["metrics"] for name, found in said.items() if "metrics" in found}


def _metrics(task_list: list[Task], said: Mapping[str, dict]) -> dict[str, float]:
    """``eval/*`` as the run logs them; of all tasks' loss only where all have targets."""
    found = evaluation(said)
    if len(found) == len(task_list):
        return tasks.logged_metrics(task_list, found)
    metrics = {}
    for task in task_list:
        if task.name in found:
            result = found[task.name]
            metrics |= {f"eval/{task.name}/{name}": value for name, value in
                        ({"loss": result["loss"]} | task.logged(result)).items()}
    return metrics


def _compared(run: Finished, found: dict[str, dict]) -> list[str]:
    """A line about the run's own evaluation of the same samples, if there is one."""
    file = run.folder / "evaluation.json"
    wanted = durable.read_json(file)
    if not wanted:
        return []
    if json.dumps(wanted) == json.dumps(found):
        return [f"the same as {file}, bit for bit"]
    return [f"not the bits of {file}: other data, another batch size, device, precision or "
            "version of torch, or a compiled net"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m trainlib.predict", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="a run folder, or its best/ or final/")
    add("data", nargs="?", metavar="DATA", help="default: the run's own validation split")
    add("--out", default="predictions.csv", metavar="FILE",
        help="the table (default: predictions.csv; -: stdout)")
    add("--evaluation", type=Path, metavar="FILE", help="also write the evaluation as JSON")
    add("--split", metavar="NAME", help="train, validation: by the recipe; or one of DATA's own")
    add("--weights", choices=WEIGHTS, help="of a run folder (default: best)")
    add("--batch_size", type=int, metavar="N", help="samples per forward (default: "
        "batch.eval_size of the run, on which the last bits depend)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help=f"cpu, cuda, cuda:1, ... (default here: {default})")
    add("--precision", choices=_PRECISIONS, help="of the forward (default: the run's)")
    add("--compile", action="store_true", help="compile the net if it was in training")
    return parser


def main(arguments: list[str]) -> int:
    """Returns the exit code: 2 for a mistake of the user, or where no row can be read."""
    options = _parser().parse_args(arguments)
    try:
        if options.batch_size is not None and options.batch_size < 1:
            raise UserError(f"--batch_size: 1 or more, got {options.batch_size}")
        run = Finished(options.run, options.weights, options.device)
        torch.set_num_threads(run.config.get("cpu_threads") or 1)  # the order of sums
        torch.use_deterministic_algorithms(bool(run.config.get("deterministic")))
        source, which = run.data(), options.split
        is_own = options.data is None or is_same_source(options.data, source.source)
        if options.data is None:
            which = which or "validation"
        elif not is_own:
            source = _with_source(source, options.data)
        places = {"--out": None if options.out == "-" else options.out,
                  "--evaluation": options.evaluation}
        places = {option: Path(file) for option, file in places.items() if file}
        check_places(places, run.folder, [source.source, source.validation_split])
        try:
            fresh, task_list, said = predict(run, source, which, options.batch_size,
                                             options.compile, options.precision)
        except UserError as error:
            if options.data is None and any(words in str(error) for words in _GONE):
                raise UserError(f"{error}; the run was trained on it: give DATA, wherever that "
                                "lies now") from error
            raise
        table = lines(fresh, task_list, said)
        out = sys.stdout
        if options.out == "-":
            out = sys.stderr
            csv.writer(sys.stdout, lineterminator="\n").writerows(table)
        else:
            with told("--out"), open(options.out, "w", encoding="utf-8", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows(table)
        if options.evaluation:
            with told("--evaluation"):
                options.evaluation.write_text(durable.as_json(evaluation(said)), encoding="utf-8")
    except UserError as error:
        _say(str(error))
        return 2
    _report(run, fresh, task_list, said, out, options, is_own)
    return 0


def _with_source(given: DataOptions, source: str) -> DataOptions:
    try:
        return DataOptions.model_validate(
            given.model_dump() | {"source": source, "revision": None, "subset": None})
    except ValidationError as error:
        said = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"DATA: {source}: {said}") from error


def _report(
    run: Finished, fresh: Fresh, task_list: list[Task], said: Mapping[str, dict], out: TextIO,
    options: argparse.Namespace, is_own: bool,
) -> None:
    for row in sorted(fresh.unread)[:_SHOWN]:
        why = fresh.unread[row]
        _say(f"{'' if f'row {row}' in why else f'row {row}: '}{why}")
    if len(fresh.unread) > _SHOWN:
        _say(f"and {len(fresh.unread) - _SHOWN:,} more rows, in the table")
    for note in fresh.notes:
        _say(note)
    for name, value in _metrics(task_list, said).items():
        print(f"{name} {value!r}", file=out)
    for task in task_list:
        bad = sorted(int(fresh.split.rows[place]) for place in said[task.name]["not_finite"])
        if bad:
            shown = ", ".join(map(str, bad[:_SHOWN])) + (", ..." if len(bad) > _SHOWN else "")
            _say(f"{task.name}: {NOT_FINITE} in {len(bad):,} rows, which have no "
                 f"prediction: {shown}")
    if is_own and options.data is not None and options.split is None:
        _say(f"{options.data} is what the run was trained on: these rows include those of "
             "the training, so the metrics flatter; --split validation has the others")
    if is_own and (options.split or options.data) in ("validation", None):
        for line in _compared(run, evaluation(said)):
            _say(line)
    for task in task_list:
        missing = int((fresh.split.num_valid[task.name] == 0).sum())
        if "metrics" in said[task.name] and missing:
            _say(f"{missing:,} rows without a {task.name} are predicted, not evaluated")
    unread = f"; {len(fresh.unread):,} rows cannot be read" if fresh.unread else ""
    _say(f"{len(fresh.split):,} of {fresh.num_rows:,} rows predicted by {run.folder} on "
         f"{run.device}{unread}" + ("" if options.out == "-" else f": {options.out}"))


def _say(line: str) -> None:
    print(f"predict: {line}", file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
