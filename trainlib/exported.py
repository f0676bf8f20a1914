"""What an exported model says about itself, and programs of a few lines that load it without this
repository."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from trainlib.finished import Finished

ABOUT = "about.json"
"""Name of what is said about a model in its own file: input, tasks, labels."""
FILES = {"torch_export": "model.pt2", "onnx": "model.onnx"}

_LOADED = {
    "torch_export": '''\
import json
import torch

extra = {{"{about}": ""}}
model = torch.export.load({file!r}, extra_files=extra).module()
about = json.loads(extra["{about}"])
inputs = torch.zeros(3, *about["input"]["shape"], dtype=getattr(torch, about["input"]["dtype"]))
with torch.no_grad():
    outputs = model(inputs)  # yours in place of the zeros; of any number of samples
''',
    "onnx": '''\
import json
import numpy
import onnxruntime

model = onnxruntime.InferenceSession({file!r})
about = json.loads(model.get_modelmeta().custom_metadata_map["{about}"])
inputs = numpy.zeros((3, *about["input"]["shape"]), about["input"]["dtype"])
outputs = model.run(None, {{"inputs": inputs}})  # yours in place of the zeros
''',
}
_MEANING = {
    "classification": """\
task = about["tasks"][{name!r}]
print({name!r}, [task["labels"][k] for k in {output}.argmax(1)])
""",
    "multilabel": """\
task = about["tasks"][{name!r}]
for row in {output}:
    found = zip(task["labels"], row, task["least_logits"])
    print({name!r}, [label for label, logit, least in found if logit >= least])
""",
    "regression": """\
scale = about["tasks"][{name!r}]["labels"]
for row in {output}.reshape(len(inputs), -1).tolist():
    columns = zip(scale["columns"], row, scale["deviation"], scale["mean"])
    print({name!r}, {{column: x * deviation + mean for column, x, deviation, mean in columns}})
""",
    "segmentation": "print({name!r}, {output}.argmax(1).shape)  # a class for each pixel\n",
    "language_modeling": "print({name!r}, {output}[:, -1].argmax(-1))  # the next token\n",
}
_BINARY = "print({name!r}, ({output} > 0).shape)  # a class, 0 or 1, for each pixel\n"


def loading_snippet(
    to: str, tasks: Mapping[str, str], file: str | None = None, binary: frozenset[str] = frozenset()
) -> str:
    """A program that loads an exported model and says what its outputs mean.

    Args:
        to: ``torch_export``, which needs torch only, or ``onnx``, which needs onnxruntime only.
        tasks: by name, the kind.
        file: the exported model, from the folder that the program is started in.
        binary: segmentations of which one logit decides between two classes.
    """
    text = _LOADED[to].format(file=file or FILES[to], about=ABOUT)
    for number, (name, kind) in enumerate(tasks.items()):
        if to == "onnx":
            output = f"outputs[{number}]"
        else:
            output = "outputs" if len(tasks) == 1 else f"outputs[{name!r}]"
        text += (_BINARY if name in binary else _MEANING[kind]).format(name=name, output=output)
    return text


def describe(
    run: Finished, shape: list[int], dtype: str, output: Tensor | dict[str, Tensor]
) -> dict[str, Any]:
    """What stands in the file about it: input, and by task kind, shape of outputs and labels."""
    tasks = {}
    for name, found in by_task(output, run).items():
        kind, labels = run.kinds[name], run.labels[name]
        options = run.config["tasks"][name]
        tasks[name] = {"kind": kind, "labels": labels, "output_shape": list(found.shape[1:])}
        if kind == "multilabel":
            given = options.get("thresholds", 0.5)
            each = given if isinstance(given, list) else [given] * len(labels)
            tasks[name]["least_logits"] = [math.log(p / (1 - p)) for p in each]
    data = run.config.get("data") or {}
    columns = data.get("input")
    return {
        "input": {"name": "inputs", "shape": list(shape), "dtype": dtype,
                  "columns": [columns] if isinstance(columns, str) else columns,
                  "tokenizer": data.get("tokenizer")},
        "tasks": tasks, "model": run.config["model"]["name"],
    }


_GIVES = {
    "classification": "a logit for each class",
    "multilabel": "a logit for each label",
    "regression": "each number's distance from its mean, in deviations",
    "segmentation": "logits of each pixel",
    "language_modeling": "logits of the next token at each place",
}


def in_words(about: dict[str, Any]) -> list[str]:
    """Lines about what a model takes and gives, as ``describe`` has it."""
    given = about["input"]
    shape = ", ".join(map(str, ("batch", *given["shape"])))
    what = "numbers as they stand in the data; the scale is part of the model"
    if given["dtype"] == "int64":
        what = f"tokens of {given['tokenizer']}" if given["tokenizer"] else "tokens"
    elif len(given["shape"]) == 3:
        what = "images from 0 to 1; the scale is part of the model"
    elif given["columns"] and len(given["columns"]) == given["shape"][0] > 1:
        what = f"the columns {', '.join(given['columns'])}, {what}"
    lines = [f"takes inputs [{shape}] {given['dtype']}: {what}"]
    for name, task in about["tasks"].items():
        shape, labels = ", ".join(map(str, ("batch", *task["output_shape"]))), task["labels"]
        names = labels["columns"] if isinstance(labels, dict) else labels
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        lines.append(f"gives {name} [{shape}] float32: {_GIVES[task['kind']]}"
                     + (f" ({shown})" if shown else ""))
    return lines


def by_task(output: Tensor | dict[str, Tensor], run: Finished) -> dict[str, Tensor]:
    """A net's outputs by task, be there one or several."""
    return output if isinstance(output, dict) else {next(iter(run.kinds)): output}
