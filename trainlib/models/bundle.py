"""One file of Python, put together from definitions that stand in several of this package.

For whoever has a model and not this repository. Taken are the definitions that are asked for and
what they use, with the comments above them; statements that define nothing are not.
"""

import ast
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[1]
_OURS = "trainlib"


@dataclass
class _Module:
    """A file of ours, by statements at its top."""

    name: str
    lines: list[str]
    spans: list[tuple[int, int]] = field(default_factory=list)  # lines, with comments above
    nodes: list[ast.stmt] = field(default_factory=list)
    defines: dict[str, int] = field(default_factory=dict)  # names, by number of statement
    imports: dict[str, tuple[str, str | None]] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)
    uses: dict[str, None] = field(default_factory=dict)  # other modules, in the order of use


def bundle(wanted: Sequence[tuple[str, str]]) -> str:
    """The source of some definitions and of what they use, importing nothing of ours.

    Args:
        wanted: modules of this package, such as ``models.mlp``, and a name in each.

    Raises:
        ValueError: two definitions have one name, or one is reached as an attribute of a module.
        OSError: a file cannot be read.
    """
    modules: dict[str, _Module] = {}
    outside: dict[str, set[str | None]] = {}
    owners: dict[str, str] = {}

    def load(name: str) -> _Module:
        if name not in modules:
            modules[name] = _read(name)
        return modules[name]

    def take(module: _Module, name: str) -> None:
        if name in module.defines:
            number = module.defines[name]
            if owners.setdefault(name, module.name) != module.name:
                raise ValueError(f"{name} stands in {owners[name]} and in {module.name}")
            if number not in module.wanted:
                module.wanted.add(number)
                for node in ast.walk(module.nodes[number]):
                    if isinstance(node, ast.Name):
                        take(module, node.id)
        elif name in module.imports:
            source, original = module.imports[name]
            if source.partition(".")[0] != _OURS:
                outside.setdefault(source, set()).add(original)
            elif original is None or source == _OURS:
                raise ValueError(f"{module.name} uses {name} as a module")
            else:
                used = load(source.partition(".")[2])
                module.uses[used.name] = None
                take(used, original)

    def ordered(names: Iterable[str], found: dict[str, None]) -> dict[str, None]:
        for name in names:  # after those that it uses, which may derive classes from them
            if name not in found:
                ordered(modules[name].uses, found)
                found[name] = None
        return found

    for module_name, name in wanted:
        take(load(module_name), name)
    parts = [_imports(outside)]
    for module in map(modules.get, ordered((name for name, _ in wanted), {})):
        parts += ["\n".join(module.lines[slice(*module.spans[number])]).strip("\n")
                  for number in sorted(module.wanted)]
    return "\n\n\n".join(parts) + "\n"


def _read(name: str) -> _Module:
    path = _ROOT / f"{name.replace('.', '/')}.py"
    text = path.read_text(encoding="utf-8")
    module, end = _Module(name, text.splitlines()), 0
    for node in ast.parse(text).body:
        number, names = len(module.nodes), []
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                module.imports[alias.asname or alias.name] = (node.module or "", alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module.imports[alias.asname or alias.name.partition(".")[0]] = (alias.name, None)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [each.id for target in targets for each in ast.walk(target)
                     if isinstance(each, ast.Name)]
        module.nodes.append(node)
        module.spans.append((end, node.end_lineno))
        module.defines |= dict.fromkeys(names, number)
        end = node.end_lineno
    return module


def _imports(outside: dict[str, set[str | None]]) -> str:
    """Import statements: the standard library's first, as ruff sorts them."""
    groups: tuple[list[str], list[str]] = ([], [])
    for source, names in sorted(outside.items()):
        group = groups[source.partition(".")[0] not in sys.stdlib_module_names]
        if None in names:
            group.append(f"import {source}")
        if names - {None}:
            group.append(f"from {source} import {', '.join(sorted(names - {None}))}")
    texts = ["\n".join(sorted(group, key=lambda line: not line.startswith("import ")))
             for group in groups if group]
    return "\n\n".join(["from __future__ import annotations", *texts])
