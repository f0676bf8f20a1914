"""What the evaluation of a run does not say, by what it was a run of."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainlib.card.facts import Facts

_INPUTS = {
    "image": "noise, blur, turned or shifted images, other light, cameras or resolutions",
    "numbers": "values outside the range of the training split, missing or wrong values, other "
               "units",
    "text": "other languages, misspelt texts, texts written to mislead the model",
    "tokens": "tokens that are rare or missing in the training split",
}
_KINDS = {
    "classification": "samples of none of the classes, of which it names one all the same; other "
                      "shares of the classes; how sure it is, beyond the calibration error above",
    "multilabel": "other thresholds; whether the probabilities are calibrated; labels that are "
                  "missing here",
    "regression": "how uncertain a prediction is, as it gives a number and no range; targets "
                  "beyond those of the training split",
    "segmentation": "edges and small objects by themselves, as every pixel counts the same; "
                    "classes that are missing here; whether the probabilities are calibrated",
    "language_modeling": "text that it generates, which was not looked at, neither for truth nor "
                         "for harm, repetition or training text that it knows by heart; "
                         "downstream tasks",
}
_FAIRNESS = "Fairness: the metrics are those of all samples together; none are of groups of them."
_FAIRNESS_OF_TEXT = ("Fairness: what it says of groups of people, and how well it predicts their "
                     "ways of writing.")


def not_tested(facts: Facts) -> str:
    """A list of what nobody has measured."""
    kinds = list(dict.fromkeys(task["kind"] for task in facts.tasks.values()))
    lines = [
        "Other data than this validation split. It is of the same origin as the training split; "
        "another source, place or time may look different.",
        f"An untouched test split: `best/` was chosen by `{facts.config['loop']['monitor']}` on "
        "these samples, so its numbers are on the bright side.",
        f"Robustness: {_INPUTS[facts.form]}.",
    ]
    lines += [f"{kind.replace('_', ' ').capitalize()}: {_KINDS[kind]}." for kind in kinds]
    if facts.is_language_model:
        lines.append(f"Contexts longer than {facts.shape[0]:,} tokens.")
    lines.append(_FAIRNESS_OF_TEXT if facts.is_language_model else _FAIRNESS)
    return "\n".join(f"- {line}" for line in lines)
