"""The text of a card about the training: what it was, from the loss to the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainlib import kd_losses
from trainlib.card.facts import plain_name

if TYPE_CHECKING:
    from trainlib.card.facts import Export, Facts

_LONG = 10  # numbers of a list; more are left to config.yaml
_WITHOUT_TEMPERATURE = {"logit_mse", *kd_losses.NUMBER_TERMS}


def training(facts: Facts, export: Export) -> str:
    """A list of what was set, and of what is unusual where it was."""
    config = facts.config
    batch, optim, schedule = config["batch"], config["optim"], config["schedule"]
    size, patience = batch["global_size"], config["loop"]["patience"]
    early = f", ends after {patience} evaluations without a new best" if patience else ""
    rate = "unknown" if export.peak_lr is None else f"{export.peak_lr:.4g}"
    origin = "as `config.yaml` has it"
    if optim["lr"] in (None, "auto"):
        origin = "found by a sweep before the first step"
    elif export.lr_search:
        origin = "as `lr_find.py` suggested"
    shape = {"final_fraction": schedule["final_fraction"]} if schedule["final_fraction"] else {}
    shape = _given("", {"warm-up": schedule["warmup"]} | shape | schedule["args"])
    layers = f"; each layer at {optim['layer_decay']} times the rate of the layer above it"
    machine = f"{facts.num_processes} process{'es' * (facts.num_processes > 1)} on {facts.device}"
    code = f", code at commit {export.commit}" if export.commit else ""
    return "\n".join([
        f"- Length: {export.step:,} step{'s' * (export.step != 1)}, "
        f"{export.step * size / facts.num_training:.3g} epochs "
        f"(the run: {facts.total_steps:,} steps{early})",
        f"- Batch: {size} samples, in micro-batches of {batch['micro_size']}",
        f"- Loss: {', '.join(_loss(name, task) for name, task in facts.tasks.items())}",
        *_distillation(facts),
        f"- Optimizer: {plain_name(optim['name'])} "
        f"({_given('', {'weight_decay': optim['weight_decay']} | optim['args'])})",
        f"- Gradients: {_clipping(optim)}",
        *([f"- Weights: averaged over the steps, half-life {optim['ema_half_life']}"]
          if optim["ema_half_life"] is not None else []),
        f"- Learning rate: peak {rate}, {origin}; {schedule['name']}, {shape}"
        + layers * (optim["layer_decay"] is not None),
        *(["- Updates with a spike of loss or gradient are left out"]
          if config["loop"]["on_spike"] == "skip" else []),
        f"- Seed: {config['seed']}",
        f"- Precision: {'fp32' if facts.precision == 'no' else facts.precision}",
        f"- Machine: {machine}",
        "- Versions: " + ", ".join(f"{name} {version}" for name, version in facts.versions.items())
        + code,
        "- All options: `config.yaml`, which is a recipe",
    ])


def _loss(name: str, task: dict[str, Any]) -> str:
    return (f"{plain_name(task['loss'])} ({name}, weight {task['weight']:g}"
            f"{_given(', ', task['loss_args'])})")


def _clipping(optim: dict[str, Any]) -> str:
    norm, value = optim["max_grad_norm"], optim["max_grad_value"]
    parts = [f"scaled down to a norm of {norm:g}"] if norm is not None else []
    parts += [f"each element clamped to plus or minus {value:g}"] if value is not None else []
    return ", then ".join(parts) or "not clipped"


def _distillation(facts: Facts) -> list[str]:
    """A line about what the teachers were asked for; nothing where there are none."""
    if not facts.teachers:
        return []
    distill, parts = facts.config["distill"], []
    if distill["kd_weight"] > 0:
        terms = {name: _term(distill, name, task) for name, task in facts.tasks.items()}
        named = ", ".join(f"{term}{_given(' with ', args)} ({name})"
                          for name, (term, args) in terms.items())
        parts.append(f"soft loss {named}, weight {distill['kd_weight']:g}")
        if {term for term, _ in terms.values()} - _WITHOUT_TEMPERATURE:
            parts.append(f"temperature {distill['temperature']:g}")
        if distill["standardize"]:
            parts.append("logits standardized")
        if len(facts.tasks) > 1:
            parts.append("each task only if a teacher has it")
    parts.append(f"loss against the targets, weight {distill['hard_weight']:g}")
    for pair, feature in distill["features"].items():
        of = f" (teacher {feature['teacher']})" if len(distill["teachers"]) > 1 else ""
        parts.append(f"features `{pair}` by {feature['loss']}, weight {feature['weight']:g}{of}")
    if len(distill["teachers"]) > 1:
        weights = ", ".join(f"{teacher['weight']:g}" for teacher in distill["teachers"])
        parts.append(f"{distill['average']} of the teachers averaged with the weights {weights}")
    if distill["warmup"].lstrip("0. ")[:1].isdigit():  # not 0 steps
        parts.append(f"soft losses and features rise over {distill['warmup']}")
    if distill["cache"] is not None:
        kept = distill["cache_top_k"]
        parts.append("outputs of the teachers kept in fp16"
                     + (f", {kept} classes of each item" if kept is not None else ""))
    return [f"- Distillation: {'; '.join(parts)}"]


def _term(distill: dict[str, Any], name: str, task: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The soft loss of a task and its arguments."""
    chosen = distill["tasks"].get(name) or {}
    chosen = chosen if chosen.get("loss") is not None else distill
    kind = task["kind"]
    if kind == "multilabel" or kind == "segmentation" and task["loss"] == "bce":
        fit = kd_losses.BINARY_TERMS
    else:
        fit = kd_losses.NUMBER_TERMS if kind == "regression" else kd_losses.CLASS_TERMS
    return chosen["loss"] or next(iter(fit)), chosen["loss_args"]


def _given(before: str, args: dict[str, Any]) -> str:
    """Arguments by name; a long list as its length."""
    if not args:
        return ""
    return before + ", ".join(
        f"{name} of {len(value):,} numbers" if isinstance(value, list) and len(value) > _LONG
        else f"{name} {value}" for name, value in args.items())
