"""One typed, strict mapping: defaults < recipes < flags.

Every module declares the options it reads as an ``Options`` class; the sentence under a field is
its documentation, in ``--help`` and nowhere else. This module merges recipes and flags as plain
mappings, validates once, and reports all mistakes together. It knows no option by name.
"""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from trainlib import credentials


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
        if value is None and (get_origin(annotation) is dict or _group_of(annotation)[0]):
            return {}
        return value


AnyOptions = TypeVar("AnyOptions", bound=Options)


class _RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader, with 1e-3 read as a number and a key given twice refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice in one mapping", node.start_mark
                )
        return super().construct_mapping(node, deep)


# YAML 1.1 wants a dot in a float; people write 1e-3, and YAML 1.2 reads it as a number.
_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, by the safe loader.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping holds one key twice.
    """
    return yaml.load(text, Loader=_RecipeLoader)  # noqa: S506 - a subclass of SafeLoader


def to_yaml(options: Options, leave_out: Iterable[str] = ()) -> str:
    """The options, but for some at the top, as a recipe that reads back to the same options."""
    values = options.model_dump(mode="json", exclude=set(leave_out))
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


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


def merge(base: dict, override: dict) -> dict:
    """``override`` laid over ``base``, mapping by mapping; ``null`` empties a mapping."""
    merged = dict(base)
    for key, value in override.items():
        if isinstance(merged.get(key), dict) and isinstance(value, dict | None):
            merged[key] = merge(merged[key], value) if value is not None else {}
        else:
            merged[key] = value
    return merged


def flatten(mapping: dict, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested mappings by dotted path; an empty mapping is a leaf."""
    leaves = {}
    for key, value in mapping.items():
        if isinstance(value, dict) and value:
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def read(options_class: type[AnyOptions], arguments: Sequence[str], script: str) -> AnyOptions:
    """The options that recipes and flags describe; answers ``--help`` and ``--print_config``.

    Args:
        options_class: the script's composed options.
        arguments: the command line after the script's name.
        script: the script's module docstring, shown above the options by ``--help``.

    Raises:
        UserError: all mistakes of all recipes and flags, a line each.
        SystemExit: after ``--help`` or ``--print_config``.
    """
    mistakes: list[str] = []
    merged: dict = {}
    flags: list[dict] = []
    print_config = False
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if word in ("--help", "-h"):
            _print_once(help_text(options_class, script))
            raise SystemExit(0)
        if not word.startswith("--"):
            mistakes.append(f"{word!r}: an option starts with --, as in --optim.lr 1e-3")
            continue
        name, has_value, text = word[2:].partition("=")
        if name == "print_config":
            print_config = True
            continue
        if not has_value:  # a flag without a value is a switch
            has_value = bool(queue) and not queue[0].startswith("--")
            text = queue.pop(0) if has_value else "true"
        if name == "recipe" and not has_value:
            mistakes.append("--recipe: give a file, as in --recipe recipes/digits_mlp.yaml")
        elif name == "recipe":
            merged = merge(merged, _read_recipe(text, mistakes))
        else:
            flags.append(_nested_flag(name, text, mistakes))
    for flag in flags:
        merged = merge(merged, flag)
    mistakes += credentials.mistakes(merged)
    try:
        options = options_class.model_validate(merged)
    except ValidationError as error:
        mistakes += [_describe(item, options_class) for item in error.errors()]
    if mistakes:
        raise UserError("\n".join(mistakes))
    if print_config:
        _print_once(to_yaml(options).rstrip())
        raise SystemExit(0)
    return options


def recipe_name(arguments: Sequence[str], otherwise: str = "default") -> str:
    """The stem of the last ``--recipe`` on the command line, if there is one."""
    paths = []
    for position, word in enumerate(arguments):
        if word.startswith("--recipe="):
            paths.append(word.partition("=")[2])
        elif word == "--recipe" and position + 1 < len(arguments):
            paths.append(arguments[position + 1])
    return Path(paths[-1]).stem if paths else otherwise


def is_first_process() -> bool:
    """Whether this process speaks for the run before an Accelerator exists."""
    return os.environ.get("RANK", "0") == "0"


def _print_once(text: str) -> None:
    if is_first_process():
        print(text)


def _read_recipe(path: str, mistakes: list[str]) -> dict:
    try:
        content = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        mistakes.append(f"--recipe {path}: cannot be read: {error.strerror}")
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mistakes.append(f"--recipe {path}: not valid YAML: {' '.join(str(error).split())}")
    else:
        if isinstance(content, dict):
            return content
        if content is not None:
            mistakes.append(f"--recipe {path}: a recipe is a mapping of options, got "
                            f"{type(content).__name__}")
    return {}


def _nested_flag(name: str, text: str, mistakes: list[str]) -> dict:
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        mistakes.append(f"--{name}: {text!r} is not valid YAML: {' '.join(str(error).split())}")
        return {}
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


def _describe(error: dict, options_class: type[Options]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        group, _, name = path.rpartition(".")
        # tasks.<name>.loss is shown with the name that was given.
        known = [_fill_names(leaf, path) for leaf, *_ in describe_options(options_class)]
        siblings = {leaf.rpartition(".")[2]: leaf for leaf in known
                    if leaf.rpartition(".")[0] == group}
        close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.7)
        if close:
            hint = f"; did you mean {siblings[close[0]]!r}?"
        elif siblings:
            hint = f"; known here: {', '.join(siblings.values())}"
        else:
            hint = nearest(path, known)
        return f"unknown option {path!r}{hint}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict) and error["type"] == "value_error":
        return f"{path}.{message}"  # a whole group was looked at; the message names the option
    given = "" if error["type"] == "missing" else f" (given: {error['input']!r})"
    return f"{path}: {message}{given}" if path else message


def _fill_names(leaf: str, path: str) -> str:
    parts, given = leaf.split("."), path.split(".")
    return ".".join(
        given[i] if part == "<name>" and i < len(given) else part for i, part in enumerate(parts)
    )


def describe_options(
    options_class: type[Options], prefix: str = ""
) -> Iterator[tuple[str, str, Any, str]]:
    """Each option as (dotted name, type, default, sentence), groups flattened in order.

    A mapping of named groups shows as ``tasks.<name>.kind``.
    """
    for name, field in options_class.model_fields.items():
        group, is_mapping = _group_of(field.annotation)
        if group is None:
            default = field.get_default(call_default_factory=True)
            yield f"{prefix}{name}", _type_name(field.annotation), default, field.description or ""
        else:
            inner = f"{prefix}{name}.<name>." if is_mapping else f"{prefix}{name}."
            yield from describe_options(group, inner)


def help_text(options_class: type[Options], script: str) -> str:
    """Every option with its type, default and sentence, grouped."""
    lines = [script.strip(), "", "--recipe FILE   a YAML recipe; repeatable, later ones win",
             "--print_config  print the resolved recipe and stop"]
    group = None
    for name, kind, default, sentence in describe_options(options_class):
        if group != (group := name.rpartition(".")[0]):
            lines += ["", f"{group or 'run'}:"]
        shown = "none" if default is None else default
        lines += [f"  --{name}  ({kind}, default: {shown})", f"      {' '.join(sentence.split())}"]
    return "\n".join(lines)


def _group_of(annotation: Any) -> tuple[type[Options] | None, bool]:
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
    if origin is not None and not isinstance(origin, type):  # Literal, Annotated
        return "|".join(str(a) for a in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    return "mapping" if origin is dict else getattr(annotation, "__name__", str(annotation))
