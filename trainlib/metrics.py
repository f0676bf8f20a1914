"""Additive statistics and what they say: exact on any number of processes.

Counts and sums are added up over batches and processes and turned into metrics once, at the
end. Nothing here averages an average.
"""

import torch
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, where sums of fp32 values are exact; fp32 on Apple GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def confusion_counts(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """[classes, classes] int64: items by true class (row) and predicted class (column).

    Args:
        predicted, target: [items] class numbers.
    """
    flat = target * num_classes + predicted
    return torch.bincount(flat, minlength=num_classes**2).view(num_classes, num_classes)


def classification_metrics(counts: Tensor) -> dict:
    """Accuracy and per-class precision, recall, F1 and support, with their averages.

    Args:
        counts: [classes, classes], rows are true classes.

    Returns:
        ``accuracy``, ``macro`` and ``weighted`` (precision, recall, f1 each), and ``classes``: a
        list of precision, recall, f1, support. A ratio of 0 to 0 is 0, as in scikit-learn.
    """
    counts = counts.double().cpu()
    correct, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)

    def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
        return torch.where(denominator > 0, numerator / denominator.clamp(min=1), 0.0)

    columns = {
        "precision": ratio(correct, predicted),
        "recall": ratio(correct, support),
        "f1": ratio(2 * correct, support + predicted),
    }
    total = support.sum()
    # A class that is neither present nor predicted has no say in the macro average.
    present = (support + predicted) > 0
    return {
        "accuracy": (correct.sum() / total).item(),
        "macro": {name: column[present].mean().item() for name, column in columns.items()},
        "weighted": {name: ((column * support).sum() / total).item()
                     for name, column in columns.items()},
        "classes": [
            {name: column[k].item() for name, column in columns.items()}
            | {"support": int(support[k])}
            for k in range(len(counts))
        ],
    }


def classification_report(metrics: dict, label_names: list[str]) -> str:
    """The metrics of ``classification_metrics`` as text, in scikit-learn's layout."""
    width = max(len("weighted avg"), *(len(name) for name in label_names))
    rows = [f"{'':>{width}}  precision    recall  f1-score   support", ""]

    def row(name: str, values: dict, support: int) -> str:
        numbers = "".join(f"{values[key]:10.4f}" for key in ("precision", "recall", "f1"))
        return f"{name:>{width}} {numbers}{support:10d}"

    total = sum(entry["support"] for entry in metrics["classes"])
    for name, entry in zip(label_names, metrics["classes"], strict=True):
        rows.append(row(name, entry, entry["support"]))
    rows += ["", f"{'accuracy':>{width}} {'':20}{metrics['accuracy']:10.4f}{total:10d}"]
    rows.append(row("macro avg", metrics["macro"], total))
    rows.append(row("weighted avg", metrics["weighted"], total))
    return "\n".join(rows)
