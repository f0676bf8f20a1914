"""Additive statistics and what they say: exact on any number of processes.

Counts and sums are added up over batches and processes and turned into metrics once, at the
end. Nothing here averages an average. Statistics are computed on the device: none waits for it,
takes a shape from the data, or depends on an order of addition that a GPU leaves to chance.

A missing class number is negative, a missing value NaN; a ratio of 0 to 0 is 0, as with
scikit-learn's ``zero_division=0``.
"""

import math

import torch
from torch import Tensor


def sum_dtype(device: torch.device) -> torch.dtype:
    """float64, where sums of fp32 values are exact; fp32 on Apple GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def confusion_counts(predicted: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """[classes, classes] int64: items by true class (row) and predicted class (column).

    Args:
        predicted, target: class numbers, of one shape; a negative target leaves its item out.
    """
    predicted, target = predicted.flatten(), target.flatten()
    # Cell 0 takes what is left out; so a class number that is too high is refused, not counted.
    cell = (target * num_classes + predicted + 1).masked_fill(target < 0, 0)
    counts = torch.zeros(num_classes**2 + 1, dtype=torch.int64, device=target.device)
    return counts.scatter_add_(0, cell, torch.ones_like(cell))[1:].view(num_classes, num_classes)


def target_ranks(output: Tensor, target: Tensor) -> Tensor:
    """[items] int64: how many classes come before the target; the top k are the ranks below k.

    A class comes before another with a larger logit, or with an equal one and a lower number, as
    in argmax, to which NaN is the largest. A missing target comes after all classes.

    Args:
        output: [items, classes] logits.
        target: [items] class numbers, negative where missing.
    """
    output = output.nan_to_num(math.inf, math.inf, -math.inf)
    own, label = output.gather(1, target.clamp(min=0)[:, None]), target[:, None]
    classes = torch.arange(output.shape[1], device=output.device)
    return ((output > own) | ((output == own) & (classes < label)) | (label < 0)).sum(1)


def calibration_bins(
    confidence: Tensor, is_correct: Tensor, num_bins: int = 15
) -> tuple[Tensor, Tensor]:
    """Items, right ones, and confidence by bin of confidence, for ``calibration_error``.

    Args:
        confidence: [items] in [0, 1], floating point; NaN leaves its item out.
        is_correct: [items] bool.
        num_bins: bins of equal width, (low, high]; 0 lies in the first.

    Returns:
        [2, bins] int64 items and right ones; [bins] sums of confidence, in its dtype.
    """
    bins = torch.arange(num_bins, device=confidence.device)
    number = (confidence[:, None] > bins[1:].to(confidence.dtype) / num_bins).sum(1)
    is_inside = (number[:, None] == bins) & ~confidence.isnan()[:, None]
    counts = torch.stack([is_inside.sum(0), (is_inside & is_correct[:, None]).sum(0)])
    return counts, torch.where(is_inside, confidence[:, None], 0.0).sum(0)


def calibration_error(counts: Tensor, sums: Tensor) -> float:
    """Expected calibration error: how far accuracy is from confidence in an item's bin, on average.

    Args:
        counts, sums: [2, bins] and [bins], as from ``calibration_bins``.

    Source: Guo et al. 2017, arXiv:1706.04599, equation 3, with 15 bins as there.
    """
    counts, sums = counts.cpu().double(), sums.cpu().double()
    return _ratio((counts[1] - sums).abs().sum(), counts[0].sum()).item()


def multilabel_counts(predicted: Tensor, target: Tensor) -> Tensor:
    """[labels, 4] int64: true positives, false positives, false negatives, true negatives.

    Args:
        predicted: [items, labels] bool.
        target: [items, labels] in [0, 1], positive from 0.5 up, NaN where missing.
    """
    positive, negative = target >= 0.5, target < 0.5  # neither holds of NaN
    return torch.stack([predicted & positive, predicted & negative,
                        ~predicted & positive, ~predicted & negative], 2).sum(0)


def regression_sums(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Targets that are not missing, and sums over them, by column.

    Args:
        prediction: [items, columns] floating point.
        target: same shape, NaN where missing; float64 for sums that are exact.

    Returns:
        [columns] int64 counts; [4, columns] sums of the absolute error, squared error, target and
        squared target, in the target's dtype.
    """
    error, present = prediction.to(target.dtype) - target, ~target.isnan()
    values = torch.stack([error.abs(), error.square(), target, target.square()])
    return present.sum(0), torch.where(present, values, 0.0).sum(1)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """0 where both are 0; the denominator is a count."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1), 0.0)


def _scores(correct: Tensor, predicted: Tensor, support: Tensor) -> dict[str, Tensor]:
    return {"precision": _ratio(correct, predicted), "recall": _ratio(correct, support),
            "f1": _ratio(2 * correct, support + predicted)}


def _average(columns: dict[str, Tensor], weights: Tensor) -> dict[str, float]:
    return {name: _ratio((column * weights).sum(), weights.sum()).item()
            for name, column in columns.items()}


def _by_class(columns: dict[str, Tensor], support: Tensor) -> list[dict]:
    return [{name: column[k].item() for name, column in columns.items()}
            | {"support": int(support[k])} for k in range(len(support))]


def classification_metrics(counts: Tensor) -> dict:
    """Accuracy and per-class precision, recall, F1 and support, with their averages.

    Args:
        counts: [classes, classes], rows are true classes.

    Returns:
        ``accuracy``, ``macro`` and ``weighted`` (precision, recall, f1 each), and ``classes``: a
        list of precision, recall, f1, support.
    """
    counts = counts.cpu().double()
    correct, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    columns = _scores(correct, predicted, support)
    return {
        "accuracy": _ratio(correct.sum(), support.sum()).item(),
        # A class that is neither present nor predicted has no say in the macro average.
        "macro": _average(columns, (support + predicted > 0).double()),
        "weighted": _average(columns, support),
        "classes": _by_class(columns, support),
    }


def multilabel_metrics(counts: Tensor) -> dict:
    """Precision, recall, F1 and support of each label, with their averages.

    Args:
        counts: [labels, 4], as from ``multilabel_counts``.

    Returns:
        ``micro`` (of the counts of all labels together), ``macro`` (over all labels) and
        ``weighted`` (precision, recall, f1 each), ``accuracy`` (the share of right entries), and
        ``classes``: a list of precision, recall, f1, support.
    """
    counts = counts.cpu().double()

    def scores(counts: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        correct, wrong, missed, _ = counts.unbind(1)
        return _scores(correct, correct + wrong, correct + missed), correct + missed

    columns, support = scores(counts)
    total = counts.sum(0, keepdim=True)
    return {
        "accuracy": _ratio(total[0, 0] + total[0, 3], total.sum()).item(),
        "micro": {name: column.item() for name, column in scores(total)[0].items()},
        "macro": _average(columns, torch.ones_like(support)),
        "weighted": _average(columns, support),
        "classes": _by_class(columns, support),
    }


def regression_metrics(counts: Tensor, sums: Tensor, deviation: Tensor) -> dict:
    """Errors and the coefficient of determination of each column, with their means.

    Args:
        counts, sums: [columns] and [4, columns], as from ``regression_sums`` of standardised
            values: the mean taken out, so that the sum of squares about the mean keeps its digits.
        deviation: [columns], by which they were divided; mae and rmse are in the original unit.

    Returns:
        ``mae``, ``rmse``, ``r2``: means over the columns that have a target; and ``columns``: a
        list of mae, rmse, r2, support. Of targets that are all the same, or only one, r2 is 1 if
        every prediction is exact, else 0.
    """
    eps = torch.finfo(sums.dtype).eps
    counts, sums, deviation = counts.cpu().double(), sums.cpu().double(), deviation.cpu().double()
    absolute, squared, target, target_squared = sums
    spread = target_squared - target**2 / counts
    # Rounding leaves up to 1.5 n eps of the squares where the targets are all the same.
    is_constant = spread <= 2 * counts * eps * target_squared
    r2 = torch.where(is_constant, (squared == 0).double(), 1 - squared / spread)
    columns = {"mae": absolute / counts * deviation, "rmse": (squared / counts).sqrt() * deviation,
               "r2": torch.where(counts > 0, r2, math.nan)}
    means = {name: column[counts > 0].mean().item() for name, column in columns.items()}
    return means | {"columns": _by_class(columns, counts)}


def segmentation_metrics(confusion: Tensor) -> dict:
    """Intersection over union, Dice and support (in pixels) of each class, with their means.

    Args:
        confusion: [classes, classes], rows are true classes.

    Returns:
        ``miou`` and ``dice``: means over the classes that are present or predicted;
        ``pixel_accuracy``; and ``classes``: a list of iou, dice, support.
    """
    counts = confusion.cpu().double()
    correct, support, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    union = support + predicted - correct
    columns = {"iou": _ratio(correct, union), "dice": _ratio(2 * correct, support + predicted)}
    means = _average(columns, (union > 0).double())
    return {
        "miou": means["iou"],
        "pixel_accuracy": _ratio(correct.sum(), support.sum()).item(),
        "dice": means["dice"],
        "classes": _by_class(columns, support),
    }


def language_metrics(loss_sum: float, num_tokens: int, bytes_per_token: float) -> dict[str, float]:
    """Perplexity of a token and bits for a byte of text; NaN without tokens.

    Args:
        loss_sum: nats, over all tokens.
        bytes_per_token: mean length of a token in the text.
    """
    nats_per_token = loss_sum / num_tokens if num_tokens else math.nan
    try:
        perplexity = math.exp(nats_per_token)
    except OverflowError:
        perplexity = math.inf
    return {"perplexity": perplexity,
            "bits_per_byte": nats_per_token / math.log(2) / bytes_per_token}


def _table(headings: list[str], *groups: list[tuple[str, list]]) -> str:
    """Groups of named rows below headings, in scikit-learn's layout.

    A cell is a share (float), a count (int), or text.
    """
    width = max(len(name) for name in ["weighted avg", *(row[0] for g in groups for row in g)])

    def line(name: str, cells: list) -> str:
        texts = [f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in cells]
        return f"{name:>{width}} " + "".join(f" {text:>9}" for text in texts)

    bodies = ["\n".join(line(*row) for row in group) for group in groups]
    return "\n\n".join([line("", [*headings, "support"]), *bodies])


def _named(names: list[str], entries: list[dict]) -> list[tuple[str, list]]:
    return [(name, list(entry.values())) for name, entry in zip(names, entries, strict=True)]


def _averages(metrics: dict, *names: str) -> list[tuple[str, list]]:
    total = sum(entry["support"] for entry in metrics["classes"])
    return [(f"{name} avg", [*metrics[name].values(), total]) for name in names]


def classification_report(metrics: dict, label_names: list[str]) -> str:
    """The metrics of ``classification_metrics`` as text, in scikit-learn's layout."""
    averages = _averages(metrics, "macro", "weighted")
    accuracy = ("accuracy", ["", "", metrics["accuracy"], averages[0][1][-1]])
    return _table(["precision", "recall", "f1-score"], _named(label_names, metrics["classes"]),
                  [accuracy, *averages])


def multilabel_report(metrics: dict, label_names: list[str]) -> str:
    """The metrics of ``multilabel_metrics`` as text, in scikit-learn's layout."""
    return _table(["precision", "recall", "f1-score"], _named(label_names, metrics["classes"]),
                  _averages(metrics, "micro", "macro", "weighted"))


def regression_report(metrics: dict, column_names: list[str]) -> str:
    """The metrics of ``regression_metrics`` as text: four digits, as errors are of any size."""
    entries = [{name: value if name == "support" else f"{value:.4g}"
                for name, value in entry.items()} for entry in metrics["columns"]]
    return _table(["mae", "rmse", "r2"], _named(column_names, entries))


def segmentation_report(metrics: dict, label_names: list[str]) -> str:
    """The metrics of ``segmentation_metrics`` as text; the support is in pixels."""
    total = sum(entry["support"] for entry in metrics["classes"])
    return _table(["iou", "dice"], _named(label_names, metrics["classes"]),
                  [("accuracy", ["", metrics["pixel_accuracy"], total]),
                   ("mean", [metrics["miou"], metrics["dice"], total])])
