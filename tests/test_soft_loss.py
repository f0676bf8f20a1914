"""The soft loss of each kind of task, on outputs whose answer is computed another way."""

from functools import partial

import pytest
import torch
from torch.nn import functional

from trainlib import kd_losses
from trainlib.augment import Mix
from trainlib.config import UserError
from trainlib.distillation import DistillOptions, SoftLoss, objective
from trainlib.distillation.objective import Hidden, TopK, token_chunks
from trainlib.losses import IGNORED
from trainlib.tasks.kinds import KINDS
from trainlib.tasks.options import find_loss


def task_of(kind, loss, classes=5, **given):
    names = [f"label {number}" for number in range(classes)]
    if kind == "multilabel":
        given["thresholds"] = [0.5] * classes
    if kind == "language_modeling":
        given |= {"vocab_size": classes, "may_fuse": True}
    return KINDS[kind](name="y", label_names=names, weight=1.0, loss=partial(find_loss(loss)),
                       loss_name=loss, **given)


def options(**given):
    return DistillOptions(teachers=[], kd_weight=0.0, **given)


@pytest.mark.parametrize("name", kd_losses.CLASS_TERMS)
def test_missing_targets_count_for_neither_loss(name):
    torch.manual_seed(0)
    soft = SoftLoss(task_of("classification", "cross_entropy"), options(loss=name, temperature=3))
    student, teacher = torch.randn(2, 6, 5)
    student.requires_grad_()
    target = torch.tensor([0, IGNORED, 2, 3, IGNORED, 4])
    hard, found = soft.losses(student, teacher, {"y": target})
    assert (hard[[1, 4]] == 0).all() and (found[[1, 4]] == 0).all() and (found[[0, 2]] != 0).all()
    [gradient] = torch.autograd.grad(found.sum(), student)
    assert (gradient[[1, 4]] == 0).all() and gradient.isfinite().all()


def test_of_mixed_targets_each_has_its_share():
    soft = SoftLoss(task_of("classification", "cross_entropy"), options(loss="dkd"))
    student, teacher = torch.randn(2, 4, 5)
    target = torch.tensor([0, 1, IGNORED, 3])
    mix = Mix(torch.tensor([3, 0, 1, 2]), torch.tensor([0.2, 0.5, 0.7, 1.0]))
    _, found = soft.losses(student, teacher, {"y": target}, mix)
    own, other = (soft.losses(student, teacher, {"y": each})[1]
                  for each in (target, target[mix.partner]))
    torch.testing.assert_close(found, mix.share * own + (1 - mix.share) * other)


@pytest.mark.parametrize("num_tokens", [1, 7, 64, 65, 200])
@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd"])
def test_tokens_in_chunks_are_whole_logits_in_loss_and_gradient(num_tokens, name, monkeypatch):
    monkeypatch.setattr(objective, "_CHUNK_BYTES", 4 * 11 * 64)
    assert len(list(token_chunks(num_tokens, 11))) == -(-num_tokens // 64)
    torch.manual_seed(1)
    soft = SoftLoss(task_of("language_modeling", "cross_entropy", 11),
                    options(loss=name, temperature=2))
    target = torch.randint(11, (1, num_tokens))
    target[0, ::3] = IGNORED
    hidden, head = torch.randn(1, num_tokens, 4), torch.randn(11, 4)
    taught, matrices = torch.randn(2, 1, num_tokens, 6), torch.randn(2, 13, 6)
    average = lambda logits: kd_losses.average_logits(  # noqa: E731
        [one[:, :11] for one in logits], [1, 3], 2.0)

    def of_chunks(hidden, head):
        output = {"hidden": hidden, "head": head}
        return soft.losses(output, Hidden(list(taught), list(matrices), average), {"y": target})

    def of_all(hidden, head):
        logits, teachers = hidden[0] @ head.T, [(t[0] @ m.T) for t, m in
                                                zip(taught, matrices, strict=True)]
        hard = functional.cross_entropy(logits, target[0], reduction="none")
        found = kd_losses.CLASS_TERMS[name](logits, average(teachers), target[0], 2.0)
        return hard[None], found.where(target[0] != IGNORED, 0)[None]

    results = []
    for compute in (of_chunks, of_all):
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        losses = compute(*leaves)
        total = losses[0].sum() + 2 * losses[1].sum()
        gradients = torch.autograd.grad(total, leaves) if (target != IGNORED).any() else ()
        results.append((*(loss.detach() for loss in losses), *gradients))
    for chunked, whole in zip(*results, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)
    assert results[0][0].shape == target.shape


def test_a_net_that_gives_logits_only_has_the_same_losses():
    soft = SoftLoss(task_of("language_modeling", "cross_entropy", 11), options())
    hidden, head, teacher = torch.randn(2, 9, 4), torch.randn(11, 4), torch.randn(18, 11)
    target = {"y": torch.randint(11, (2, 9))}
    parts = soft.losses({"hidden": hidden, "head": head}, teacher, target)
    whole = soft.losses(hidden @ head.T, teacher, target)
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other)


def test_top_k_of_all_is_the_whole():
    soft = SoftLoss(task_of("classification", "cross_entropy"), options(temperature=4))
    student, teacher = torch.randn(2, 6, 5)
    target = {"y": torch.tensor([0, 1, 2, 3, 4, IGNORED])}
    whole = soft.losses(student, teacher, target)[1]
    some = TopK(*kd_losses.top_k(teacher, 5, 4.0))
    torch.testing.assert_close(soft.losses(student, some, target)[1], whole)
    few = TopK(*kd_losses.top_k(teacher, 2, 4.0))
    assert (soft.losses(student, few, target)[1] <= whole + 1e-6).all()


@pytest.mark.parametrize("kind, loss, output, target", [
    ("multilabel", "bce", (3, 5), torch.randint(2, (3, 5)).float()),
    ("regression", "mse", (3, 5), torch.randn(3, 5)),
    ("segmentation", "cross_entropy", (3, 5, 4, 4), torch.randint(5, (3, 4, 4))),
])
def test_each_kind_has_one_value_an_entry_and_none_for_itself(kind, loss, output, target):
    soft = SoftLoss(task_of(kind, loss), options())
    student, teacher = torch.randn(2, *output)
    hard, found = soft.losses(student, teacher, {"y": target})
    assert found.shape == soft.task.prepare(target).shape and (found > 0).all()
    assert soft.losses(student, student, {"y": target})[1].abs().max() < 1e-6
    expected = soft.task.losses(student, {"y": target})
    assert hard.equal(expected)


def test_standardized_logits_have_no_scale():
    soft = SoftLoss(task_of("classification", "cross_entropy"),
                    options(standardize=True, temperature=2))
    student, teacher = torch.randn(2, 6, 5)
    target = {"y": torch.zeros(6, dtype=torch.int64)}
    one = soft.losses(student, teacher, target)[1]
    other = soft.losses(7 * student + 3, 0.1 * teacher - 1, target)[1]
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind, loss, given, message", [
    ("regression", "mse", {"loss": "kl"}, "kl is not for regression"),
    ("segmentation", "cross_entropy", {"loss": "dist"}, "dist is not for segmentation"),
    ("multilabel", "bce", {"standardize": True}, "standardize"),
    ("classification", "cross_entropy", {"loss": "jsd", "loss_args": {"beta": 3}}, "beta"),
    ("classification", "cross_entropy",
     {"loss": "dkd", "cache": "logits", "cache_top_k": 2}, "keeps what kl needs"),
])
def test_what_does_not_fit_is_refused(kind, loss, given, message):
    with pytest.raises(UserError, match=message):
        SoftLoss(task_of(kind, loss), options(**given))
