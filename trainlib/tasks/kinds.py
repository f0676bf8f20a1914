"""The kinds of tasks, each with its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import functional

from trainlib import metrics
from trainlib.config import UserError
from trainlib.losses import cross_entropy, is_valid
from trainlib.tasks.task import Task

NUM_BINS = 15  # of the calibration error, as in Guo et al. 2017


@dataclass(frozen=True)
class Classification(Task):
    """One class of several."""

    top_k: int = 5
    kind = "classification"
    monitor = "accuracy"
    headline = ("accuracy",)

    @property
    def num_extra_counts(self) -> int:
        return self.num_outputs**2 + 1 + 2 * NUM_BINS

    num_extra_sums = NUM_BINS

    def extra(self, output, target, losses, dtype):
        output = self.pick(output)
        predicted = output.argmax(1)
        confidence = output.to(dtype).softmax(1).amax(1)
        confidence = confidence.where(is_valid(target), float("nan"))  # which is in no bin
        bins, confidences = metrics.calibration_bins(confidence, predicted == target, NUM_BINS)
        hits = (metrics.target_ranks(output, target) < self.top_k).sum()
        confusion = metrics.confusion_counts(predicted, target, self.num_outputs)
        return [confusion, hits, bins], [confidences]

    def interpret(self, counts, sums, num_items):
        confusion, hits, bins = counts.split([self.num_outputs**2, 1, 2 * NUM_BINS])
        confusion = confusion.view(self.num_outputs, -1)
        result = metrics.classification_metrics(confusion)
        if self.num_outputs > self.top_k:
            result[f"top{self.top_k}_accuracy"] = hits.item() / max(num_items, 1)
        result["calibration_error"] = metrics.calibration_error(bins.view(2, -1), sums)
        return {"confusion": confusion.tolist()} | result

    def logged(self, result):
        shown = [name for name in ("accuracy", f"top{self.top_k}_accuracy", "calibration_error")
                 if name in result]
        return {name: result[name] for name in shown} | {
            f"macro_{name}": value for name, value in result["macro"].items()}

    def report(self, result):
        return metrics.classification_report(result, self.label_names)


@dataclass(frozen=True)
class Multilabel(Task):
    """Several labels, each on or off."""

    thresholds: list[float] = field(default_factory=list)
    kind = "multilabel"
    monitor = "micro_f1"
    headline = ("micro_f1", "macro_f1")

    @property
    def num_extra_counts(self) -> int:
        return 4 * self.num_outputs

    def blank_target(self):
        return torch.zeros(2, self.num_outputs)

    def needs(self, target):
        return f"{tuple(target.shape)}: one logit for each of its {self.num_outputs} labels"

    def extra(self, output, target, losses, dtype):
        probabilities = self.pick(output).to(dtype).sigmoid()
        thresholds = torch.tensor(self.thresholds, dtype=dtype, device=target.device)
        return [metrics.multilabel_counts(probabilities >= thresholds, target)], []

    def interpret(self, counts, sums, num_items):
        return metrics.multilabel_metrics(counts.view(-1, 4))

    def logged(self, result):
        return {"accuracy": result["accuracy"]} | {
            f"{average}_{name}": value for average in ("micro", "macro")
            for name, value in result[average].items()}

    def report(self, result):
        return metrics.multilabel_report(result, self.label_names)


@dataclass(frozen=True)
class Regression(Task):
    """Numbers, of which the model predicts the distance from their mean in deviations."""

    mean: tuple[float, ...] = ()
    deviation: tuple[float, ...] = ()
    validation_mean: tuple[float, ...] = ()
    """In deviations from the mean: squares are summed about it, so that they do not cancel."""
    kind = "regression"

    @property
    def headline(self) -> tuple[str, ...]:
        """The metrics that the terminal shows."""
        return ("mae", "r2") if self.num_outputs == 1 else ("r2",)

    @property
    def num_extra_counts(self) -> int:
        return self.num_outputs

    @property
    def num_extra_sums(self) -> int:
        return 4 * self.num_outputs

    def output(self, output, target):
        return self.pick(output).view(target.shape)

    def prepare(self, target):
        return target.float()

    def blank_target(self):
        return torch.zeros(2, self.num_outputs, dtype=torch.float64)

    def fits(self, output, target):
        return output.shape == target.shape or (
            self.num_outputs == 1 and output.shape == target.shape[:1])

    def needs(self, target):
        return f"{tuple(target.shape)}: one number for each of {', '.join(self.label_names)}"

    def extra(self, output, target, losses, dtype):
        middle = torch.tensor(self.validation_mean, dtype=dtype, device=target.device)
        prediction = self.output(output, target).to(dtype)
        counts, sums = metrics.regression_sums(prediction - middle, target.to(dtype) - middle)
        return [counts], [sums]

    def interpret(self, counts, sums, num_items):
        deviation = torch.tensor(self.deviation, dtype=sums.dtype)
        return metrics.regression_metrics(counts, sums.view(4, -1), deviation)

    def logged(self, result):
        if self.num_outputs == 1:
            return {name: result[name] for name in ("mae", "rmse", "r2")}
        # Columns may have different units, in which a mean has none.
        return {"r2": result["r2"]} | {
            f"{column}_{name}": entry[name] for name in ("mae", "rmse")
            for column, entry in zip(self.label_names, result["columns"], strict=True)}

    def report(self, result):
        return metrics.regression_report(result, self.label_names)


@dataclass(frozen=True)
class Segmentation(Task):
    """A class for each pixel; outputs of another size are brought to that of the masks."""

    kind = "segmentation"
    monitor = "miou"
    headline = ("miou", "pixel_accuracy")

    @property
    def is_binary(self) -> bool:
        """Whether one logit decides between two classes."""
        return self.loss_name == "bce"

    @property
    def num_outputs(self) -> int:
        return 1 if self.is_binary else len(self.label_names)

    @property
    def num_extra_counts(self) -> int:
        return len(self.label_names) ** 2

    def output(self, output, target):
        logits = self.pick(output)
        if logits.shape[2:] == target.shape[1:]:
            return logits
        return functional.interpolate(
            logits.float(), target.shape[1:], mode="bilinear", align_corners=False
        )

    def prepare(self, target):
        if not self.is_binary:
            return target
        return target.float().where(is_valid(target), float("nan")).unsqueeze(1)

    def blank_target(self):
        return torch.zeros(2, 4, 4, dtype=torch.int64)

    def blank_output(self):
        return torch.zeros(2, self.num_outputs, 4, 4)

    def fits(self, output, target):
        return output.ndim == 4 and output.shape[:2] == (len(target), self.num_outputs)

    def needs(self, target):
        return (f"({len(target)}, {self.num_outputs}, height, width): {self.num_outputs} logits a "
                "pixel")

    def extra(self, output, target, losses, dtype):
        logits = self.output(output, target)
        predicted = (logits.squeeze(1) > 0).long() if self.is_binary else logits.argmax(1)
        return [metrics.confusion_counts(predicted, target, len(self.label_names))], []

    def interpret(self, counts, sums, num_items):
        confusion = counts.view(len(self.label_names), -1)
        return {"confusion": confusion.tolist()} | metrics.segmentation_metrics(confusion)

    def logged(self, result):
        return {name: result[name] for name in ("miou", "pixel_accuracy", "dice")}

    def report(self, result):
        return metrics.segmentation_report(result, self.label_names)


@dataclass(frozen=True)
class LanguageModeling(Task):
    """The next token at each place of a text."""

    vocab_size: int = 0
    bytes_per_token: float = 1.0
    """Of the text that is validated on."""
    may_fuse: bool = False
    """Whether the model may take the targets and return the losses, so that no logits are held."""
    kind = "language_modeling"
    headline = ("perplexity", "bits_per_byte")
    num_extra_counts = 1
    num_extra_sums = 1

    @property
    def num_outputs(self) -> int:
        return self.vocab_size

    def output(self, output, target):
        return self.pick(output).transpose(1, 2)  # classes come second

    def losses(self, output, targets, mix=None):
        if isinstance(output, Mapping) and "losses" in output:
            return output["losses"].float().where(is_valid(targets[self.name]), 0)
        return super().losses(output, targets, mix)

    def extra(self, output, target, losses, dtype):
        # Perplexity is the plain cross entropy's, whatever the loss is.
        entropy = losses if self.may_fuse else cross_entropy(self.output(output, target), target)
        return [is_valid(target).sum().view(1)], [entropy.to(dtype).sum().view(1)]

    def blank_target(self):
        return torch.zeros(2, 4, dtype=torch.int64)

    def blank_output(self):
        return torch.zeros(2, self.num_outputs, 4)

    def check_output(self, output, targets, tasks):
        if isinstance(output, Mapping) and "losses" in output:
            if output["losses"].shape == targets[self.name].shape:
                return
            raise UserError(f"the model's losses are {tuple(output['losses'].shape)}, task "
                            f"{self.name!r} needs {tuple(targets[self.name].shape)}")
        super().check_output(output, targets, tasks)

    def fits(self, output, target):
        # A net may have room for more tokens than there are.
        return (output.ndim == 3 and output.shape[:2] == target.shape
                and output.shape[2] >= self.vocab_size)

    def needs(self, target):
        return f"{(*target.shape, self.vocab_size)}: one logit for each token of the vocabulary"

    def interpret(self, counts, sums, num_items):
        return metrics.language_metrics(sums.item(), counts.item(), self.bytes_per_token)

    def logged(self, result):
        return {name: result[name] for name in ("perplexity", "bits_per_byte")}

    def report(self, result):
        return "\n".join(f"{name:>13} {value:10.4f}" for name, value in result.items())


KINDS = {task.kind: task for task in (
    Classification, Multilabel, Regression, Segmentation, LanguageModeling)}
