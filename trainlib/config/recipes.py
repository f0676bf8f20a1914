"""Recipes: options as YAML, read strictly and laid over one another."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

from trainlib.config.options import Options


class _RecipeLoader(yaml.SafeLoader):
    """YAML's safe loader, but 1e-3 is a number, a date a text, and a key given twice refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice in one mapping", node.start_mark
                )
        return super().construct_mapping(node, deep)


class _RecipeDumper(yaml.SafeDumper):
    """YAML's safe dumper, which quotes the texts that the loader would take for numbers."""


# YAML 1.1 wants both a dot and a sign; people write 1e-3 and 1.5e6, which are numbers in YAML 1.2.
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$")
for _yaml_class in (_RecipeLoader, _RecipeDumper):
    _yaml_class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))
# No option is a date, and a name may look like one, or like one that no calendar has.
_RecipeLoader.yaml_implicit_resolvers = {
    start: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for start, resolvers in _RecipeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str) -> Any:
    """The value of a YAML text, by the safe loader.

    Raises:
        yaml.YAMLError: the text is not YAML, or a mapping holds one key twice.
    """
    return yaml.load(text, Loader=_RecipeLoader)  # noqa: S506 - a subclass of SafeLoader


def to_yaml(options: Options, leave_out: Iterable[str] = ()) -> str:
    """The options, but for some at the top, as a recipe that reads back to the same options."""
    values = options.model_dump(mode="json", exclude=set(leave_out))
    return yaml.dump(values, Dumper=_RecipeDumper, sort_keys=False, allow_unicode=True)


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
