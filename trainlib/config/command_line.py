"""The command line of a script: recipes and flags, all mistakes at once, ``--help``."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import ValidationError

from trainlib import credentials
from trainlib.config.options import Options, UserError, describe_options, nearest
from trainlib.config.recipes import merge, parse_yaml, to_yaml

AnyOptions = TypeVar("AnyOptions", bound=Options)


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
