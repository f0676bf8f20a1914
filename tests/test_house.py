"""The house: who imports whom, the README's tree, recipes, options."""

import ast
import re
import subprocess
from pathlib import Path

import pytest
from launching import recipes

from distill import StudentOptions
from lr_find import FindOptions
from train import TrainOptions
from trainlib import config

ROOT = Path(__file__).resolve().parent.parent
LEVEL_0 = {
    "config", "plan", "schedule", "losses", "metrics", "augment", "muon", "user_code", "agreement",
    "durable", "credentials", "lr_sweep", "lr_suggestion", "plots", "kd_losses", "terminal",
    "shards", "spikes", "journal", "memory", "pace", "layer_gradients", "exported", "claim",
}
# Started by python -m, they import like a script, and what they share: nothing below imports them.
PROGRAMS = {"predict": {"finished"}, "export": {"finished"}, "finished": set()}
SCRIPTS = {
    "train.py": (TrainOptions, 300), "distill.py": (StudentOptions, 370),
    "lr_find.py": (FindOptions, 230),
}


def modules() -> dict[str, list[Path]]:
    """Modules of trainlib by name; a folder is one module."""
    found: dict[str, list[Path]] = {}
    for path in (ROOT / "trainlib").rglob("*.py"):
        name = path.relative_to(ROOT / "trainlib").parts[0].removesuffix(".py")
        if name != "__init__":
            found.setdefault(name, []).append(path)
    return found


def imported(path: Path) -> set[str]:
    """Our modules and scripts that a file imports when it runs; not those for annotations."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "trainlib":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainlib."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("trainlib.").split(".")[0] for alias in node.names
                      if alias.name.split(".")[0] in ("trainlib", "train", "distill", "lr_find")}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} & {"train", "distill", "lr_find"}
    return names


def test_imports_go_down_the_house_only():
    for name, paths in modules().items():
        # What may stand in an option or a text is told by credentials, which imports nothing.
        lower = {"credentials"} if name in ("config", "terminal") else set()
        allowed = {name} | (lower if name in LEVEL_0 else LEVEL_0)
        if name in PROGRAMS:
            allowed |= (set(modules()) - PROGRAMS.keys()) | PROGRAMS[name]
        for path in paths:
            assert imported(path) <= allowed, path


def test_no_module_takes_a_private_name_of_another():
    for path in [*(ROOT / "trainlib").rglob("*.py"), *(ROOT / script for script in SCRIPTS)]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainlib"):
                assert not [a.name for a in node.names if a.name.startswith("_")], path


def test_scripts_never_import_each_other():
    for script in SCRIPTS:
        assert imported(ROOT / script) <= set(modules()) - PROGRAMS.keys(), script


def test_no_module_outgrows_its_room():
    for script, (_, limit) in SCRIPTS.items():
        assert len((ROOT / script).read_text().splitlines()) <= limit, script
    for paths in modules().values():
        for path in paths:
            assert len(path.read_text().splitlines()) <= 320, path


def fenced(script: str, what: str) -> str:
    text = (ROOT / script).read_text()
    return text.split(f"# {what}: begin")[1].split(f"# {what}: end")[0]


def test_the_loop_and_the_step_are_in_the_script_and_fit_in_eighty_lines():
    loop, step = fenced("train.py", "twin loop"), fenced("train.py", "twin step")
    assert len(loop.splitlines()) + len(step.splitlines()) <= 80
    for line in ("train_step(state.step, lr)", "evaluate(", "checkpoints.save("):
        assert line in loop
    for line in ("model(inputs, **arguments(targets))", "accelerator.backward(",
                 "accelerator.clip_grad_norm_(", "optimizer.step()"):
        assert line in step


def test_the_step_is_the_same_text_in_every_script():
    assert len({fenced(script, "twin step") for script in SCRIPTS}) == 1


def test_the_loop_is_the_same_text_where_a_model_is_trained():
    assert fenced("train.py", "twin loop") == fenced("distill.py", "twin loop")


def test_the_readme_tree_is_the_tree():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## Layout")[1]
    listed = {word.rstrip("/") for word in re.findall(r"^    (\S+)", tree, re.MULTILINE)}
    listed |= set(re.findall(r"^    .*?(\S+\.md)  (\S+\.md)  (\S+)  (\S+)", tree, re.MULTILINE)[0])
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    if not files:
        pytest.skip("not a git checkout")
    wanted = set()
    for file in map(Path, files.split()):
        if file.name.startswith(".") or file.parts[0].startswith("."):
            continue
        if file.parts[0] == "trainlib":
            wanted.add(str(Path(*file.parts[:2])))
        else:
            wanted.add(file.parts[0])
    wanted -= {"trainlib/__init__.py", "README.md"}
    assert wanted == listed


@pytest.mark.parametrize("recipe", recipes(), ids=lambda p: p.stem)
def test_every_recipe_parses_and_says_what_it_gave(recipe):
    options_class = StudentOptions if "\ndistill:" in recipe.read_text() else TrainOptions
    options = config.read(options_class, ["--recipe", str(recipe)], "")
    assert options.batch.micro_size
    header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
    assert any("Measured:" in line for line in header)
    assert len(recipe.read_text().splitlines()) <= 40


def test_the_digits_recipe_is_the_default():
    recipe = config.read(TrainOptions, ["--recipe", str(ROOT / "recipes/digits_mlp.yaml")], "")
    named = {"hidden": [256, 128], "dropout": 0.3}  # the net's own defaults, written out
    assert recipe.model.args == named
    assert recipe.model_copy(update={"model": TrainOptions().model}) == TrainOptions()


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_option_has_its_sentence(script):
    for name, _, _, sentence in config.describe_options(SCRIPTS[script][0]):
        assert sentence.strip().endswith("."), name


def test_nothing_runs_code_that_it_reads():
    for path in [*(ROOT / "trainlib").rglob("*.py"), *(ROOT / script for script in SCRIPTS)]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "")]
                assert "pickle" not in names, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "pickle.load"), path
                if called == "torch.load":  # which then builds nothing but tensors
                    assert "weights_only=True" in ast.unparse(node), path
                if called == "yaml.load":
                    assert "_RecipeLoader" in ast.unparse(node)
            if isinstance(node, ast.keyword):
                assert node.arg != "trust_remote_code", path
