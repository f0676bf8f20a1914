"""The front matter of a card, which the Hugging Face Hub reads."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from huggingface_hub import EvalResult, ModelCardData

from trainlib.card.facts import hub_id, public

if TYPE_CHECKING:
    from trainlib.card.facts import Export, Facts

# The Hub's names of tasks, by kind and form of the inputs; it has none for the others.
_TASK_TYPES = {
    ("classification", "image"): "image-classification",
    ("classification", "text"): "text-classification",
    ("classification", "numbers"): "tabular-classification",
    ("multilabel", "image"): "image-classification",
    ("multilabel", "text"): "text-classification",
    ("multilabel", "numbers"): "tabular-classification",
    ("regression", "numbers"): "tabular-regression",
    ("segmentation", "image"): "image-segmentation",
    ("language_modeling", "text"): "text-generation",
    ("language_modeling", "tokens"): "text-generation",
}
# The Hub's names of metrics, where they are not ours.
_METRICS = {"miou": "mean_iou", "r2": "r_squared", "pixel_accuracy": "accuracy"}
_AVERAGES = ("macro_", "micro_")


def task_type(kind: str, form: str) -> str:
    """The Hub's name of a task."""
    return _TASK_TYPES.get((kind, form), "other")


def front_matter(facts: Facts, export: Export) -> str:
    """The YAML between the dashes; no licence, which only the owner can give."""
    types = {name: task_type(task["kind"], facts.form) for name, task in facts.tasks.items()}
    model, data = facts.config["model"], facts.data
    library, _, net = model["name"].partition(":")
    own = library.endswith(".py") or not net
    tags = ["one-curve", "safetensors", library if not net else "own-net" if own else library]
    tags += [] if own or library == "transformers" else [net]
    tags += sorted({task["kind"].replace("_", "-") for task in facts.tasks.values()})
    tags += ["knowledge-distillation"] if facts.teachers else []
    dataset = hub_id(data["source"])
    card = ModelCardData(
        library_name="pytorch",
        pipeline_tag=next((each for each in types.values() if each != "other"), None),
        tags=[public(tag) for tag in tags],
        datasets=[dataset] if dataset is not None else None,
        base_model=hub_id(model["args"].get("pretrained"))
        if library == "transformers" and model["args"].get("pretrained") else None,
        model_name=public(facts.name),
        eval_results=[_result(facts, types, key, value) for key, value in export.metrics.items()
                      if math.isfinite(value)],
    )
    return card.to_yaml()


def _result(facts: Facts, types: dict[str, str], key: str, value: float) -> EvalResult:
    task, data = next(iter(types)), facts.data
    name = key.removeprefix("eval/")
    metric = name
    # eval/accuracy, or of several tasks eval/TASK/accuracy and eval/loss, which is their sum's.
    if len(types) > 1 and name.partition("/")[0] in types:
        task, _, metric = name.partition("/")
    plain = next((metric.removeprefix(each) for each in _AVERAGES if metric.startswith(each)),
                 metric)
    source, split = facts.public(data["source"]), data["validation_split"]
    return EvalResult(
        task_type=types[task],
        task_name=" and ".join(name for name, each in types.items() if each == types[task]),
        dataset_type=source,
        dataset_name=source,
        dataset_config=data["subset"],
        dataset_split=facts.public(split) if isinstance(split, str) else "validation",
        dataset_revision=data["revision"],
        metric_type=_METRICS.get(plain, plain),
        metric_name=name,
        metric_value=value,
    )
