"""Options of distillation: teachers, soft losses, features, cache."""

from __future__ import annotations

import inspect
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from trainlib.config import Options, UserError, nearest, one_of
from trainlib.kd_losses import BINARY_TERMS, CLASS_TERMS, FEATURE_TERMS, NUMBER_TERMS
from trainlib.schedule import check_duration

TERMS = CLASS_TERMS | BINARY_TERMS | NUMBER_TERMS


class TeacherOptions(Options):
    """One teacher; in a list a text stands for ``run``, and ``ema`` for the student's average."""

    run: str | None = None
    """Folder of a run, whose best weights teach."""
    recipe: str | None = None
    """Recipe by which that run is made, if its folder is missing."""
    ema: bool = False
    """The average of the student's own weights; needs optim.ema_half_life."""
    model: dict[str, Any] | None = None
    """A net by name and args, as in the group model, instead of a run."""
    weights: str | None = None
    """Its weights: a .safetensors file or a folder; none: pretrained ones, by its args."""
    mean: list[float] | None = None
    """Of its inputs, by channel or column; none: that of the student's data."""
    deviation: list[float] | None = None
    """As mean."""
    weight: float = Field(1.0, ge=0)
    """Its share in the average of several teachers."""
    precision: Literal["run", "fp32", "bf16"] = "run"
    """run: as the student computes; fp32; or bf16, weights too."""
    compile: str | None = None
    """Backend of torch.compile for this teacher."""

    @model_validator(mode="before")
    @classmethod
    def _text_is_a_run(cls, given: Any) -> Any:
        if given == "ema":
            return {"ema": True}
        return {"run": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _is_one_teacher(self) -> TeacherOptions:
        given = [name for name in ("run", "ema", "model") if getattr(self, name)]
        if len(given) != 1:
            raise UserError("a teacher is one of run, ema or model, got "
                            f"{' and '.join(given) or 'none'}; give the folder of a run")
        for name, owner in (("recipe", "run"), ("weights", "model"), ("mean", "model"),
                            ("deviation", "model")):
            if getattr(self, name) is not None and owner not in given:
                raise UserError(f"{name}: belongs to a teacher with {owner}; leave it out")
        if self.ema and (self.precision != "run" or self.compile is not None):
            raise UserError("precision, compile: the average of the student has those of the run; "
                            "leave them out")
        if (self.mean is None) != (self.deviation is None):
            raise UserError("mean and deviation belong together; give both or none")
        return self


class TermOptions(Options):
    loss: Annotated[str, one_of(TERMS)] | None = None
    """Which soft loss: kl, reverse_kl, jsd, dkd, dist or logit_mse for classes (also of pixels and
    tokens); bernoulli_kl for labels; mse or bounded_mse for numbers; none: the first of its
    kind."""
    loss_args: dict[str, Any] = {}
    """Arguments of the soft loss, such as beta, alpha, gamma or margin."""

    @model_validator(mode="after")
    def _loss_takes_args(self) -> TermOptions:
        if self.loss is not None:
            # After student, teacher, target and temperature.
            takes = list(inspect.signature(TERMS[self.loss]).parameters)[4:]
            for name in self.loss_args:
                if name not in takes:
                    raise UserError(f"loss_args: {self.loss} does not take {name!r}"
                                    f"{nearest(name, takes)}")
        elif self.loss_args:
            raise UserError("loss_args: of which loss? Name it as loss, too")
        return self


class FeatureOptions(Options):
    loss: Annotated[str, one_of(FEATURE_TERMS)] = "mse"
    """mse, cosine, attention (channels may differ) or similarity (all but the samples may)."""
    weight: float = Field(1.0, gt=0)
    """Factor of the mean over samples in the total."""
    teacher: int = Field(0, ge=0)
    """Which teacher, counted from 0."""


class DistillOptions(TermOptions):
    teachers: list[TeacherOptions] | None = None
    """Folders of runs, or mappings with run, recipe, ema, model, weights, weight, precision and
    compile; none: of the built-in digits a small residual net, which is trained if need be."""
    average: Literal["probabilities", "logits"] = "probabilities"
    """What of several teachers is averaged."""
    temperature: float = Field(4.0, gt=0)
    """Divides the logits of both in the soft loss, which is multiplied by its square."""
    standardize: bool = False
    """Give both logits mean 0 and deviation 1 over the classes first."""
    kd_weight: float = Field(1.0, ge=0)
    """Factor of the soft loss; 0: the student learns alone, exactly as by train.py."""
    hard_weight: float = Field(1.0, ge=0)
    """Factor of the loss against the targets."""
    warmup: Annotated[str, AfterValidator(check_duration)] = "0 steps"
    """The weights of soft loss and features rise from 0 over so long, as "5%" or "1 epoch"."""
    tasks: dict[str, TermOptions] = {}
    """By task, loss and loss_args other than those above."""
    features: dict[str, FeatureOptions] = {}
    """By "student.module -> teacher.module": which features of both are compared, and how."""
    cache: Literal["logits"] | None = None
    """logits: compute the teachers' outputs once, before the training, and read them from disk in
    fp16; for inputs that are the same each time a sample is drawn."""
    cache_top_k: int | None = Field(None, ge=1)
    """Keep so many classes of each item and the mass of the rest; for large vocabularies."""
    cache_dir: str | None = None
    """Where; none: runs/teacher_outputs and what they depend on."""
    baseline: bool = False
    """Train the same student alone first, in RUN_DIR_alone, and say how much of the gap to the
    teacher is closed."""

    @field_validator("features")
    @classmethod
    def _names_two_modules(cls, features: dict[str, FeatureOptions]) -> dict[str, FeatureOptions]:
        for pair in features:
            if len([name for name in pair.split("->") if name.strip()]) != 2:
                raise ValueError(f"two modules by path, \"student.module -> teacher.module\", got "
                                 f"{pair!r}")
        return features

    @model_validator(mode="after")
    def _is_possible(self) -> DistillOptions:
        if self.hard_weight == 0 and not self.teaches:
            raise UserError("hard_weight, kd_weight: both are 0 and there are no features, so there"
                            " is no loss; give one of them")
        weights = [teacher.weight for teacher in self.teachers or []]
        if weights and sum(weights) == 0:
            raise UserError("teachers: their weights sum to 0; give one of them a weight above 0")
        if self.teaches and self.teachers == []:
            raise UserError("teachers: none given; name the folder of a run, or set kd_weight to 0")
        if self.cache_top_k is not None and self.cache is None:
            raise UserError("cache_top_k: is for a cache; give cache: logits, too")
        if self.cache_top_k is not None and self.standardize:
            raise UserError("cache_top_k: keeps some classes, standardize needs all of them; leave "
                            "out one of them")
        if self.cache and self.features:
            raise UserError("cache: keeps the teachers' outputs, not the features inside them; "
                            "leave out cache or features")
        if self.cache and any(teacher.ema for teacher in self.teachers or []):
            raise UserError("cache: an average of the student changes with every step, so its "
                            "outputs cannot be kept; leave out cache")
        return self

    @property
    def teaches(self) -> bool:
        """Whether any teacher is asked for anything."""
        return self.kd_weight > 0 or bool(self.features)
