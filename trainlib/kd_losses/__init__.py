"""Unreduced distillation terms, each with its source: pure functions of student and teacher.

A term over logits takes ``(student, teacher, target, temperature, ...)``. The logits are divided by
the temperature (> 0), and the term is multiplied by its square, so that gradients keep their size
(Hinton et al. 2015, section 2), unless its docstring says otherwise. Only the terms in
``NEEDS_TARGET`` have values that depend on the target; the others take None as well. A term over
features takes ``(student, teacher)`` and returns one value a sample.

A term returns one value an item, in fp32 whatever the precision of the models. Nothing here
averages over items: the script divides one sum by the global count, once. Nothing detaches the
teacher, nothing waits for a GPU, and no shape depends on the data.

Terms over logits and numbers are in ``terms``, those that correlate in ``correlation``, those over
features in ``features``; ``teachers`` makes one teacher of several, and less of one.
"""

from trainlib.kd_losses.correlation import dist, standardize
from trainlib.kd_losses.features import (
    attention_transfer,
    feature_cosine,
    feature_mse,
    similarity_preserving,
)
from trainlib.kd_losses.teachers import average_logits, top_k, top_k_kl
from trainlib.kd_losses.terms import (
    IGNORED,
    bernoulli_kl,
    bounded_mse,
    dkd,
    jsd,
    kl,
    logit_mse,
    mse,
    reverse_kl,
)

CLASS_TERMS = {
    "kl": kl,
    "reverse_kl": reverse_kl,
    "jsd": jsd,
    "dkd": dkd,
    "dist": dist,
    "logit_mse": logit_mse,
}
BINARY_TERMS = {"bernoulli_kl": bernoulli_kl}
NUMBER_TERMS = {"mse": mse, "bounded_mse": bounded_mse}
FEATURE_TERMS = {
    "mse": feature_mse,
    "cosine": feature_cosine,
    "attention": attention_transfer,
    "similarity": similarity_preserving,
}
NEEDS_TARGET = frozenset({"dkd", "bounded_mse"})

__all__ = [
    "BINARY_TERMS", "CLASS_TERMS", "FEATURE_TERMS", "IGNORED", "NEEDS_TARGET", "NUMBER_TERMS",
    "attention_transfer", "average_logits", "bernoulli_kl", "bounded_mse", "dist", "dkd",
    "feature_cosine", "feature_mse", "jsd", "kl", "logit_mse", "mse", "reverse_kl",
    "similarity_preserving", "standardize", "top_k", "top_k_kl",
]
