"""A student's training on the outputs of frozen teachers.

``options`` say what is wanted, ``jobs`` in which order runs are made. ``teacher`` and ``teachers``
are the frozen nets, ``stored`` and ``cache`` their outputs on disk, ``objective`` the soft losses,
``features`` the losses of inner features, ``comparison`` and ``report`` what has come of it.
"""

from trainlib.distillation.comparison import Both, Comparison
from trainlib.distillation.features import FeatureLosses
from trainlib.distillation.jobs import plan_jobs, run_jobs
from trainlib.distillation.objective import SoftLoss
from trainlib.distillation.options import DistillOptions
from trainlib.distillation.report import (
    kd_items,
    logged_losses,
    loss_parts,
    of_teachers,
    results_alone,
    summarize,
)
from trainlib.distillation.stored import StoredOutputs, check_cache
from trainlib.distillation.teacher import build_teachers
from trainlib.distillation.teachers import Teachers, losses_of_trial, student_arguments

__all__ = [
    "Both", "Comparison", "DistillOptions", "FeatureLosses", "SoftLoss", "StoredOutputs",
    "Teachers", "build_teachers", "check_cache", "kd_items", "logged_losses", "loss_parts",
    "losses_of_trial", "of_teachers", "plan_jobs", "results_alone", "run_jobs",
    "student_arguments", "summarize",
]
