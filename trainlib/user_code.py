"""Classes and functions from outside this repository, by name; their errors in one line.

``file.py:Name`` is an object in a file, ``package.module:Name`` one in an importable module.
"""

import difflib
import hashlib
import importlib
import importlib.util
import re
import sys
import sysconfig
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

_SPEC = re.compile(r"(?P<module>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)")
# A traceback through these says nothing about the user's own code.
_NOT_THE_USERS = (str(Path(__file__).resolve().parent), sysconfig.get_path("stdlib"), "<frozen")
_SHOWN = 8  # names in a line


def is_object_spec(text: str) -> bool:
    """Whether the text reads like ``file.py:Name`` or ``package.module:Name``."""
    return _SPEC.fullmatch(text) is not None


def import_object(spec: str) -> Any:
    """The object that ``file.py:Name`` or ``package.module:Name`` names.

    Raises:
        ValueError: no such file, module or name, or the code raises; with its error and place.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise ValueError(f"{spec!r} reads neither like file.py:Name nor like package.module:Name")
    source, name = match["module"], match["name"]
    is_file = source.endswith(".py")
    module = _import_file(source) if is_file else import_package(source)
    try:
        return getattr(module, name)
    except AttributeError as error:
        # A file has what it defines, a package also what it gathers from its modules.
        names = [key for key, value in vars(module).items()
                 if callable(value) and not key.startswith("_")
                 and (not is_file or getattr(value, "__module__", None) == module.__name__)]
        near = difflib.get_close_matches(name, names, _SHOWN, cutoff=0)
        there = f"it has {', '.join(near)}" if near else "it defines no class or function"
        more = f" and {len(names) - len(near)} more" if len(names) > len(near) else ""
        raise ValueError(f"{source} has no {name!r}; {there}{more}") from error
    except Exception as error:  # of a package that imports its modules when they are asked for
        raise ValueError(f"{spec} cannot be imported: {describe_error(error)}") from error


def import_package(name: str) -> ModuleType:
    """An importable module.

    Raises:
        ValueError: it is not installed, or fails when it is imported.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        top = name.partition(".")[0]
        if missing != top and missing.partition(".")[0] == top:
            raise ValueError(f"there is no module {missing!r}") from error
        needs = f"{name} needs {missing!r}, which" if missing != top else f"the package {top!r}"
        raise ValueError(f"{needs} is not installed: pip install {missing}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{name} cannot be imported: {describe_error(error)}") from error


def _import_file(source: str) -> ModuleType:
    path = Path(source).resolve()
    if not path.is_file():
        raise ValueError(f"there is no file {source} (looked in {path.parent})")
    # Named by its path, so that two files of one name differ and one file is run once.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # as for a script: it may import its neighbours
    sys.modules[name] = module  # classes are found again here, in worker processes too
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script without a main guard may exit
        del sys.modules[name]
        raise ValueError(f"{source} cannot be imported: {describe_error(error)}") from error
    return module


def describe_error(error: BaseException) -> str:
    """An error in one line: the last place in the user's own code it came through, its cause."""
    said = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        said = error.msg
        place = f"{Path(error.filename or '').name}, line {error.lineno}: {error.text or ''}"
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__)
                  if not frame.filename.startswith(_NOT_THE_USERS)
                  and "site-packages" not in frame.filename]
        place = "".join(f"{Path(frame.filename).name}, line {frame.lineno}: {frame.line}"
                        for frame in frames[-1:])
    text = f"{type(error).__name__}: {said}".removesuffix(": ")
    text += f" ({place.strip()})" if place else ""
    return f"{text}, because of {describe_error(error.__cause__)}" if error.__cause__ else text
