"""The text of a card, section by section; each says what is known and nothing else."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trainlib.card.facts import as_code
from trainlib.card.limits import not_tested
from trainlib.card.loading import EXPORTS, image_reader, program
from trainlib.card.training import training

if TYPE_CHECKING:
    from trainlib.card.facts import Export, Facts

PENDING = "- `distillation.json` in the run folder compares student and teachers, once it has ended"
_SHOWN = 20  # names in a line


def card_text(facts: Facts, export: Export) -> str:
    """Everything below the front matter."""
    return "\n\n".join([
        f"# {facts.name}", _summary(facts, export), "## Inputs and outputs", _inputs(facts, export),
        _outputs(facts, export), "## How to load it", _loading(facts, export), "### Other formats",
        _formats(), EXPORTS, "## Data", _data(facts), "## Training", training(facts, export),
        "## Evaluation", _evaluation(facts, export), "## Not tested", not_tested(facts),
        "## Lineage", _lineage(facts, export),
    ]) + "\n"


def _summary(facts: Facts, export: Export) -> str:
    tasks = " and ".join(f"{task['kind'].replace('_', ' ')} ({name})"
                         for name, task in facts.tasks.items())
    frozen = facts.num_parameters - facts.num_trained
    weights = (
        f"The weights with the best `{facts.config['loop']['monitor']}` of the run"
        if export.which == "best" else "The weights at the end of the run"
    )
    if facts.config["optim"]["ema_half_life"] is not None:
        weights += ", averaged over the steps"
    return (f"{weights}, after step {export.step:,} of {facts.total_steps:,}.\n\n"
            f"- Net: `{facts.net}`, {facts.num_parameters:,} parameters"
            f"{f', of which {frozen:,} were frozen' if frozen else ''}\n"
            f"- Task: {tasks}\n"
            "- Licence of the weights: none has been stated")


def _inputs(facts: Facts, export: Export) -> str:
    shape = ", ".join(map(str, facts.shape))
    made = f" of `{export.tokenizer}`" if export.tokenizer else ""
    made = ", the UTF-8 bytes of a text" if facts.data["tokenizer"] == "bytes" else made
    if facts.is_language_model:
        return (f"Inputs are token numbers{made}, int64 [batch, length]; trained on blocks of up "
                f"to {facts.shape[0]:,}.")
    if facts.form == "image":
        text = f"Inputs are images, fp32 [batch, {shape}] (channels, height, width) from 0 to 1"
        text += ", made from files by the function below" if facts.is_encoded else ""
    elif facts.is_float:
        text = f"Inputs are numbers, fp32 [batch, {shape}]"
        if facts.columns and facts.shape == (len(facts.columns),):
            text += f", the columns {_names(facts.columns)} in this order"
        elif facts.columns:
            text += f", the lists of the column {_names(facts.columns)}"
    else:
        text = f"Inputs are token numbers{made}, int64 [batch, {shape}]"
        text += (f", cut to that length or padded with {facts.pad_id}"
                 if facts.pad_id is not None else "")
    if facts.is_float:
        text += (". The model scales them itself, by the mean and deviation of the training split"
                 if facts.data["normalize"] else ". They are not scaled")
    return f"{text}."


def _outputs(facts: Facts, export: Export) -> str:
    lines = []
    for name, task in facts.tasks.items():
        labels = export.labels.get(name, [])
        names = labels["columns"] if isinstance(labels, dict) else labels
        what = {
            "classification": f"a logit for each of {len(names)} classes",
            "multilabel": f"a logit for each of {len(names)} labels, on from "
                          f"{task['thresholds']} (after the sigmoid)",
            "regression": "a number for each column, in deviations from its mean (`labels.json` "
                          "has both)",
            "segmentation": "a logit for each pixel and class, [batch, classes, height, width]"
            if task["loss"] != "bce" else "one logit for each pixel, on where it is above 0",
            "language_modeling": "logits of the next token at each place, [batch, length, tokens]",
        }[task["kind"]]
        lines.append(f"- Output `{name}`: {what}{f': {_names(names)}' if names else ''}.")
    return "\n".join(lines)


def _loading(facts: Facts, export: Export) -> str:
    notes = list(facts.portable.notes)
    if not facts.portable.lines:
        return "\n\n".join(notes)
    packages = facts.portable.packages + ["tokenizers"] * (export.tokenizer is not None)
    *most, last = ["torch", "safetensors", *packages]
    needs = f"{', '.join(most)} and {last}"
    if facts.data["tokenizer"] not in (None, "bytes") and export.tokenizer is None:
        notes.append(f"The tokenizer, {facts.data['tokenizer']}, is not in this folder.")
    return "\n\n".join([
        f"In this folder, with {needs}, and without the repository that trained it:",
        f"```python\n{program(facts, export)}\n```", *notes,
        *_image_files(facts),
        "With that repository, `trainlib.models.load_model(FOLDER)` does the same, and "
        "`python -m trainlib.predict RUN DATA` writes predictions for new data.",
    ])


def _image_files(facts: Facts) -> list[str]:
    """How the data were read, in words and as a program."""
    if not facts.is_encoded:
        return []
    channels, height, width = facts.shape
    size = (f"scaled (bilinear, both sides alike) to cover {height}x{width} pixels and cut about "
            "the centre" if facts.data["image_size"] is not None else
            f"not scaled (files of other sizes than {height}x{width} pixels were refused)")
    words = (f"From a file to an input, as in the training: Pillow decodes it, of several frames "
             f"the first; it is turned upright as its EXIF data say, made "
             f"{'grey' if channels == 1 else 'RGB'} (transparency is dropped), {size}; 0 to 255 "
             "become 0 to 1. Files of more than 8 bits a channel were refused.")
    return [words, f"```python\n{image_reader(facts)}\n```"]


def _formats() -> str:
    return ("`python -m trainlib.export RUN --to torch_export` and `--to onnx` write programs that "
            "need no source of the net.")


def _data(facts: Facts) -> str:
    share = facts.data["validation_split"]
    lines = [f"- Source: {facts.description}"]
    if facts.data["revision"] is not None:
        lines.append(f"- Revision: {facts.data['revision']}")
    lines += [
        f"- Samples: {facts.num_training:,} to train on, {facts.num_validation:,} to validate on"
        f"{f' (validation: {share})' if share is not None else ''}; there is no test split",
        *(f"- {line}" for line in facts.targets),
        f"- Fingerprint of both splits: `{facts.fingerprint}`",
    ]
    augment = {name: value for name, value in facts.data["augment"].items() if value}
    if augment:
        lines.append("- Augmentation in training: "
                     + ", ".join(f"{name} {value}" for name, value in augment.items()))
    return "\n".join(lines)


def _evaluation(facts: Facts, export: Export) -> str:
    rows = [f"| {key.removeprefix('eval/')} | {_number(value)} |"
            for key, value in export.metrics.items()]
    units = ("; errors of regressions are in the units of the data, their loss in deviations"
             if any(task["kind"] == "regression" for task in facts.tasks.values()) else "")
    precision = "" if facts.precision == "no" else (
        f" It was computed in {facts.precision}, by autocast; the program above computes in fp32.")
    return "\n".join([
        "| metric | validation split |", "|---|---|", *rows, "",
        f"Each of the {facts.num_validation:,} samples of the validation split counts once, in "
        f"eval mode, in batches of {facts.config['batch']['eval_size']}, without augmentation"
        f"{units}.{precision} `evaluation.json` has all digits, and results by class where there "
        "are classes.",
    ])


def _lineage(facts: Facts, export: Export) -> str:
    model, lines = facts.config["model"], []
    pretrained = model["args"].get("pretrained") or model["args"].get("weights")
    if model["init_from"] is not None:
        lines.append(f"- Started from the weights in `{model['init_from']}`")
    elif pretrained:
        lines.append(f"- Started from pretrained weights: `{pretrained}`")
    else:
        lines.append(f"- Started from fresh weights, by seed {facts.config['seed']}")
    if model["freeze"]:
        lines.append(f"- Frozen: {', '.join(f'`{each}`' for each in model['freeze'])}")
    for teacher in facts.teachers:
        metrics = ", ".join(
            f"{name} {_number(value)}" for name, value in teacher["metrics"].items()
        )
        lines.append(f"- Teacher: {teacher['what']}"
                     + (f"; its own evaluation: {metrics}" if metrics else ""))
    if facts.teachers:
        lines.append(PENDING)
    if export.lr_search:
        lines.append(f"- Learning rate finder (`lr_find.json`): {export.lr_search['verdict']}")
    continued = [f"step {start['step']:,} on {start['processes']} process"
                 f"{'es' * (start['processes'] > 1)}" for start in export.starts[1:]]
    lines.append(f"- Continued at {', '.join(continued)}" if continued else
                 "- Trained in one go")
    return "\n".join(lines)


def comparison(report: dict[str, Any]) -> str:
    """What takes the place of ``PENDING`` once student and teachers have been compared."""
    monitor = report["monitor"]
    sides = {"this model": report["student"], "the teachers": report["teachers"],
             "the same net without teachers": report["alone"]}
    found = [f"{who} {_number(metrics[monitor])}" for who, metrics in sides.items()
             if metrics is not None and metrics.get(monitor) is not None]
    same = [f"{key.removeprefix('eval/')} {_number(value)}"
            for key, value in report["agreement"].items() if value is not None]
    closed = report["gap_closed"]
    share = "" if closed is None else f"; {closed:.0%} of the gap to the teachers is closed"
    return (f"- Compared on the same samples (`distillation.json`), `{monitor}`: "
            f"{', '.join(found)}{share}; with the teachers: {', '.join(same) or 'not known'}")


def _names(names: list[Any]) -> str:
    shown = ", ".join(map(as_code, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"


def _number(value: float) -> str:
    return f"{value:.6g}" if math.isfinite(value) else str(value)
