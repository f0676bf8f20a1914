"""What is installed beside us: pinned, used, permitted, and at peace with each other."""

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Where the name to import is another.
IMPORTED_AS = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn"}
# Not imported: commands and plugins, and what another package imports for what we ask of it.
ASKED_FOR = {
    "ruff": (".ci/run", "ruff check"),
    "pytest-xdist": ("pyproject.toml", "-n 2"), "pytest-timeout": ("pyproject.toml", "--timeout"),
    "tensorboard": ("trainlib/trackers/others.py", 'name = "tensorboard"'),
    "onnx": ("trainlib/export.py", "torch.onnx"),
    "onnxscript": ("trainlib/export.py", "torch.onnx"),
}
# What others cannot do without, and so bring: from a package to the requirement that names it.
BROUGHT_BY = {"pandas": "datasets", "pyarrow": "datasets", "scipy": "scikit-learn"}
# Each lets everybody use, change and sell; MPL asks for changed files of its own only.
PERMISSIVE = ("apache", "mit", "bsd", "hpnd", "python software foundation", "psf", "mpl-2.0",
              "matplotlib")


def requirements() -> dict[str, str]:
    """Versions by name, of both files."""
    lines = [line for name in ("requirements.txt", "requirements-extra.txt")
             for line in (ROOT / name).read_text().splitlines() if line and line[0] not in "#-"]
    return dict(line.split("==") for line in lines)  # fails where a version is not exact


def imports() -> set[str]:
    """The first names of all that our files import."""
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    if not files.stdout:
        pytest.skip("not a git checkout")
    found = set()
    for file in files.stdout.split():
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.partition(".")[0])
    return found


def licence(name: str) -> str:
    about = metadata.metadata(name)
    # Some put the whole text there.
    stated = (about.get("License-Expression") or about.get("License") or "").splitlines()[:1]
    stated += [line for line in about.get_all("Classifier", []) if line.startswith("License")]
    return " ".join(stated)


def test_each_requirement_is_used():
    used = imports()
    for name in requirements():
        if name in ASKED_FOR:
            file, words = ASKED_FOR[name]
            assert words in (ROOT / file).read_text(), name
        else:
            assert IMPORTED_AS.get(name, name.replace("-", "_")) in used, name
    assert ASKED_FOR.keys() | IMPORTED_AS.keys() <= requirements().keys()


def test_what_is_imported_is_required_or_said_to_be_missing():
    required = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in requirements()}
    ours = {path.stem for folder in ("", "tests", "benchmarks", "recipes")
            for path in (ROOT / folder).glob("*.py")} | {"trainlib", "tests", "benchmarks",
                                                         "recipes"}
    others = imports() - required - ours - sys.stdlib_module_names
    # Imported where they are asked for, with a line that names the package if it is not there.
    assert others - {"timm", "torchvision", "trackio", "tokenizers", "_pytest"} == BROUGHT_BY.keys()
    for name, owner in BROUGHT_BY.items():
        assert any(re.match(rf"{name}\b(?!.*extra ==)", line) for line in metadata.requires(owner))


@pytest.mark.parametrize("name", requirements())
def test_its_licence_lets_everybody_use_it(name):
    try:
        stated = licence(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed: pip install -r requirements-extra.txt")
    words = re.sub(r"[\s_]+", " ", stated).lower()
    assert any(each in words for each in PERMISSIVE), stated
    assert not re.search(r"\b(a|l)?gpl|gnu|non-?commercial|proprietary", words), stated


def test_what_is_installed_agrees():
    result = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
