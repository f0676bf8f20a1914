"""Groups of options: immutable, strict, and what ``--help`` and mistakes say of them."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator


class UserError(ValueError):
    """A mistake the user can mend: reported without a traceback, exit code 2."""

    exit_code = 2


class Options(BaseModel):
    """Base of every group of options: immutable, and strict about names."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _plain_values(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[info.field_name].annotation
        kinds = get_args(annotation) or (annotation,)
        if isinstance(value, bool) and bool not in kinds and {int, float} & set(kinds):
            raise ValueError("a number is needed")  # pydantic would read true as 1
        if value is None and (get_origin(annotation) is dict or group_of(annotation)[0]):
            return {}
        return value

    def replaced(self, values: Mapping[str, Any]) -> Self:
        """These options with other values, by dotted name, which are not checked."""
        options = self
        for name, value in values.items():
            group, _, rest = name.partition(".")
            value = getattr(options, group).replaced({rest: value}) if rest else value
            options = options.model_copy(update={group: value})
        return options


def nearest(name: str, candidates: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest candidate, or all candidates if none is close."""
    candidates = list(candidates)
    close = difflib.get_close_matches(name.lower(), candidates, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(candidates))}" if candidates else ""


def one_of(candidates: Iterable[str]) -> AfterValidator:
    """A validator for names: refuses a name that is not among the candidates, naming the nearest.

    The candidates are looked at when a name is read, so they may be registered later.
    """

    def check(name: str) -> str:
        if name not in candidates:
            raise ValueError(f"unknown{nearest(name, candidates)}")
        return name

    return AfterValidator(check)


def describe_options(
    options_class: type[Options], prefix: str = ""
) -> Iterator[tuple[str, str, Any, str]]:
    """Each option as (dotted name, type, default, sentence), groups flattened in order.

    A mapping of named groups shows as ``tasks.<name>.kind``.
    """
    for name, field in options_class.model_fields.items():
        group, is_mapping = group_of(field.annotation)
        if group is None:
            default = field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""
        else:
            inner = f"{prefix}{name}.<name>." if is_mapping else f"{prefix}{name}."
            yield from describe_options(group, inner)


def group_of(annotation: Any) -> tuple[type[Options] | None, bool]:
    """The class of a group of options that a field holds, if it does, and whether by name."""
    if isinstance(annotation, type) and issubclass(annotation, Options):
        return annotation, False
    if get_origin(annotation) is dict:
        value = get_args(annotation)[1]
        if isinstance(value, type) and issubclass(value, Options):
            return value, True
    return None, False


def _type_name(annotation: Any) -> str:
    arguments = get_args(annotation)
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        return " or ".join("none" if a is type(None) else _type_name(a) for a in arguments)
    if origin is Literal:
        return "|".join(str(a) for a in arguments)
    if origin is Annotated:
        return _type_name(arguments[0])
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    return "mapping" if origin is dict else getattr(annotation, "__name__", str(annotation))
