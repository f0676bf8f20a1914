"""Every command in the README's blocks: run here in a small form, by a test that is named, or, with
the reason, not at all. So is the Python in its blocks."""

import re
import shlex
import shutil
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from PIL import Image
from sklearn.datasets import load_wine
from torch.distributed.run import get_args_parser

import distill
import lr_find
import train
from trainlib import config, export, predict
from trainlib.models import load_model
from trainlib.plots.__main__ import main as plot
from trainlib.runtime import RunFolder

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIRST_WORD = r"(?:[A-Z_]+=\S+ )?(?:python|accelerate|torchrun|pip|pytest|sbatch|wandb|ruff) "
COMMANDS = list(dict.fromkeys(
    command for line in re.findall(rf"^    ({FIRST_WORD}.*)$", README, re.MULTILINE)
    for command in re.split(r"\s+# ", line)[0].strip().split(" && ")
))
SCRIPTS = {"train.py": (train.main, train.TrainOptions),
           "distill.py": (distill.main, distill.StudentOptions),
           "lr_find.py": (lr_find.main, lr_find.FindOptions)}
MODULES = {"trainlib.plots": plot, "trainlib.predict": predict.main, "trainlib.export": export.main}

SHORT = ('--loop.duration "2 steps" --loop.eval_every "2 steps" --log.trackers [] '
         "--log.report false --batch.global_size 8 --batch.micro_size 4 ")
SWEEP = "--sweep.steps 30 --batch.global_size 8 --batch.micro_size 8"
TRAIN, LAUNCH = "python train.py ", "accelerate launch "
PREDICT = "python -m trainlib.predict "
# A command, what is added to it, and what it leaves (a file) or prints.
HERE = {
    f"{LAUNCH}train.py": (SHORT, "runs/default/final/model.safetensors"),
    f"{TRAIN}--help": ("", "--optim.layer_decay  ("),
    f"{LAUNCH}train.py --recipe recipes/digits_resnet.yaml": (SHORT, "runs/digits_resnet/final"),
    "*--run_dir runs/lr3e-3": (SHORT, "runs/lr3e-3/final"),
    "*--run_dir runs/focal": (SHORT, "runs/focal/final"),
    f"{TRAIN}--print_config": ("", "weight_decay:"),
    "*--run_dir runs/wine": (SHORT, "runs/wine/final"),
    "*--run_dir runs/photos": (SHORT, "runs/photos/final"),
    "*--run_dir runs/shards": (SHORT, "runs/shards/final"),
    f"{TRAIN}--recipe recipes/digits_multitask.yaml": (SHORT, "runs/digits_multitask/final"),
    "*--run_dir runs/houses": (SHORT, "runs/houses/final"),
    "*--run_dir runs/tags": (SHORT, "runs/tags/best/net.py"),
    "*--run_dir runs/scans": (SHORT + "--model.args.depth 1", "runs/scans/final"),
    "*--run_dir runs/notes": (SHORT + "--data.block_size 32 --model.args.depth 1",
                              "runs/notes/final"),
    "*--run_dir runs/my_net": (SHORT, "runs/my_net/best/net.py"),
    "*--run_dir runs/tuned": (SHORT, "runs/tuned/final"),
    "*--run_dir runs/poly": (SHORT, "runs/poly/final"),
    "*--diagnose": ("", "diagnosis"),
    "*--dry_run": ("", "dry run"),
    "*--run_dir runs/killed": (SHORT, "runs/killed/final"),
    f"{LAUNCH}distill.py": (SHORT, "runs/distill/distillation.json"),
    "*--distill.baseline": (SHORT, "runs/digits_mlp_from_resnet/distillation.json"),
    "*--distill.teachers *": (SHORT, "runs/mine/distillation.json"),
    "*--run_dir runs/rates": (SWEEP, "runs/rates/lr_find.png"),
    "*--run_dir runs/found": (SWEEP, "runs/found/lr_find.yaml"),
    "*--run_dir runs/auto": (SHORT, "runs/auto/final"),
    "python -m trainlib.plots runs/default": ("", "runs/default/report.html"),
    "python -m trainlib.plots runs/default runs/distill": ("", "comparison.png"),
    "*--run_dir runs/profiled": (SHORT.replace("2 steps", "30 steps"), "runs/profiled/profile.txt"),
    f"{PREDICT}runs/wine new_wine.csv": ("--device cpu", "predictions.csv"),
    f"{PREDICT}runs/photos photos/*": ("--device cpu", "out.csv"),
    f"{PREDICT}runs/wine": ("--device cpu", "predictions.csv"),
    "python -m trainlib.export *": ("", "runs/photos/best/model.pt2"),
}


# A command that stands in the way of others here, and the test or file that runs it.
LAUNCHES = "tests/test_launch_configs.py::"
THERE = {
    "pip install -r requirements.txt": ".ci/run::pip install --quiet -r requirements.txt && pytest",
    "pytest": ".ci/run::pip install --quiet -r requirements.txt && pytest",
    f"{LAUNCH}*/cpu.yaml train.py": f"{LAUNCHES}test_the_configs_launch_on_a_cpu",
    f"{LAUNCH}*/single_gpu.yaml train.py": f"{LAUNCHES}test_the_configs_launch_on_a_cpu",
    f"{LAUNCH}*/multi_gpu.yaml train.py": f"{LAUNCHES}test_the_configs_launch_on_a_cpu",
    f"{LAUNCH}*/multi_node.yaml * --machine_rank 0 train.py":
        f"{LAUNCHES}test_two_launchers_of_the_config_for_several_machines_make_one_run",
    f"{LAUNCH}*/fsdp2.yaml train.py":
        "tests/test_fsdp.py::test_an_accelerate_config_switches_it_on",
    f"ACCELERATE_USE_CPU=true {LAUNCH}*/cpu_multi.yaml train.py":
        f"{LAUNCHES}test_the_configs_launch_on_a_cpu",
    "ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node 2 train.py":
        "tests/test_same_curve.py::test_the_launchers_thread_count_changes_no_bit",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun *":
        "tests/test_machines.py::test_a_machine_is_lost_and_the_other_goes_on_alone",
    "sbatch *": "tests/test_slurm.py::"
                "test_a_job_that_runs_out_of_time_is_queued_again_and_goes_on_to_the_same_bits",
    "python benchmarks/same_curve.py *":
        "tests/test_same_curve.py::test_the_benchmarks_command_trains_each_loop_and_draws",
}
NOWHERE = {
    "*--data.source uoft-cs/cifar10 *": "the data are on the Hub",
    "*--model.name timm:resnet18 *": "the weights are on the Hub, and timm is not ours",
    "*--model.args.pretrained google/vit-base-patch16-224 *": "the weights are on the Hub",
    "pip install transformers==*": "a test installs nothing",
}
MY_NET = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, inputs, classes, vocab_size=None, width=32):
        super().__init__()
        self.first = (nn.Linear(inputs, width) if vocab_size is None
                      else nn.EmbeddingBag(vocab_size, width))
        self.last = nn.Linear(width, classes)

    def forward(self, inputs):
        return self.last(torch.relu(self.first(inputs.flatten(1))))
"""


def block(first_line: str) -> str:
    """A block of the README, from its first line on."""
    text = README[README.index(f"    {first_line}"):]
    return re.match(r"(?:    .*\n|\n(?=    ))+", text)[0].replace("\n    ", "\n").strip() + "\n"


def parsed(command: str) -> tuple[str, list[str]]:
    """The script or module of a command and its arguments, as Python or the launcher sees them."""
    words = shlex.split(re.sub(r"^[A-Z_]+=\S+ ", "", command))
    match words:
        case ["python", "-m", module, *arguments]:
            return module, arguments
        case ["python", script, *arguments]:
            return script, arguments
        case ["accelerate", "launch", *rest]:
            known = launch_command_parser().parse_args(rest)
        case ["torchrun", *rest]:
            known = get_args_parser().parse_args(rest)
        case ["sbatch", *rest]:  # the file's own script unless it is told another
            file = next(k for k, word in enumerate(rest) if word.endswith(".sbatch"))
            return "train.py", rest[file + 1:]
        case _:
            return words[0], words[1:]
    return known.training_script, known.training_script_args


def make_images(folder: Path, random: np.random.Generator) -> None:
    for number in range(30):
        pixels = random.integers(0, 256, (70, 66 + number % 3, 3), dtype=np.uint8)
        file = folder / "photos" / "cat dog hen".split()[number % 3] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)


def make_files(folder: Path) -> None:
    """The files that the README's commands name as the reader's own."""
    random = np.random.default_rng(0)
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    (folder / "accelerate_configs").symlink_to(ROOT / "accelerate_configs")
    wine = load_wine(as_frame=True).frame
    wine.to_csv(folder / "wine.csv", index=False)
    wine[:5].to_csv(folder / "new_wine.csv", index=False)
    for name in ("mine.yaml", "recipes/mine.yaml"):
        shutil.copy(ROOT / "recipes" / "csv.yaml", folder / name)
    make_images(folder, random)
    (folder / "shards").mkdir()
    numbers = pandas.DataFrame(random.normal(size=(60, 2)), columns=["width", "height"])
    numbers["shape"] = np.where(numbers.width > numbers.height, "wide", "high")
    for k, file in enumerate(["shards/0.parquet", "shards/1.parquet", "holdout.parquet"]):
        numbers[k * 20: (k + 1) * 20].to_parquet(folder / file)
    houses = pandas.DataFrame({"rooms": random.integers(1, 9, 60), "area": random.normal(size=60)})
    houses.assign(price=1e5 * houses.rooms).to_csv(folder / "houses.csv", index=False)
    rude = random.integers(0, 2, 60)
    pandas.DataFrame({"text": np.where(rude, "go away", "buy this"), "rude": rude,
                      "spam": 1 - rude}).to_csv(folder / "comments.csv", index=False)
    images = [Image.fromarray(random.integers(0, 256, (16, 16), dtype=np.uint8)) for _ in range(20)]
    masks = [image.point(lambda grey: 255 if grey > 250 else int(grey > 128)) for image in images]
    datasets.Dataset.from_dict(
        {"image": images, "mask": masks},
        features=datasets.Features(image=datasets.Image(), mask=datasets.Image()),
    ).to_parquet(folder / "scans.parquet")
    (folder / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "my_net.py").write_text(MY_NET)
    (folder / "my_loss.py").write_text(block("import torch\n\n    def poly"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the files above and, by command, what each that has been run here has said."""
    folder = tmp_path_factory.mktemp("commands")
    make_files(folder)
    return folder, {}


@pytest.fixture
def run(made, monkeypatch, capsys):
    """Runs a command of the README, in its small form, after those whose runs it takes."""
    folder, said = made
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "tokens"))
    datasets.disable_progress_bars()
    monkeypatch.chdir(folder)
    threads = torch.get_num_threads()

    def once(command: str) -> str:
        if command not in said:
            for needed in takes(command):
                once(needed)
            capsys.readouterr()
            RunFolder.current = None
            script, arguments = parsed(command)
            main = MODULES[script] if script in MODULES else SCRIPTS[script][0]
            added = [flags for pattern, (flags, _) in HERE.items() if fnmatchcase(command, pattern)]
            try:
                code = main([*arguments, *shlex.split(" ".join(added or [SHORT]))])
            except SystemExit as end:
                code = end.code
            if RunFolder.current is not None:
                RunFolder.current.close(code or 0, "finished")
            assert not code, capsys.readouterr()
            said[command] = capsys.readouterr().out
        return said[command]

    yield once
    torch.set_num_threads(threads)


def takes(command: str) -> list[str]:
    """The commands that make the runs which this one takes."""
    runs = re.findall(r"(?<!--run_dir )\bruns/\w+", command)
    if "recipe mine.yaml" in command:  # with teachers of the reader's own
        return [f"python train.py --recipe mine.yaml --model.args.hidden [9] --run_dir {folder}"
                for folder in runs]
    runs += ["runs/digits_resnet"] if "distill.py" in command else []  # or it is made, in full
    return [other for folder in runs for other in COMMANDS for pattern, (_, leaves) in HERE.items()
            if fnmatchcase(other, pattern) and leaves.startswith(f"{folder}/") and other != command]


# ---- the commands ----

def test_every_command_is_run_here_or_there_or_said_why_not():
    assert len(COMMANDS) > 40
    patterns = [*HERE, *THERE, *NOWHERE]
    for command in COMMANDS:
        assert len([p for p in patterns if fnmatchcase(command, p)]) == 1, command
    for pattern in patterns:
        assert len([c for c in COMMANDS if fnmatchcase(c, pattern)]) == 1, pattern


@pytest.mark.parametrize("pattern", HERE)
def test_a_command_runs(run, pattern):
    command, = (command for command in COMMANDS if fnmatchcase(command, pattern))
    leaves = HERE[pattern][1]
    said = run(command)
    assert Path(leaves).exists() or leaves in said


@pytest.mark.parametrize("place", sorted(set(THERE.values())))
def test_what_runs_a_command_elsewhere_is_there(place):
    file, _, what = place.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    assert what in text.splitlines() or f"\ndef {what}(" in text


@pytest.mark.parametrize("command", COMMANDS)
def test_the_arguments_of_a_command_are_understood(made, monkeypatch, command):
    monkeypatch.chdir(made[0])
    script, arguments = parsed(command)
    if script in SCRIPTS:
        told = [word for word in arguments if word not in ("--help", "--print_config")]
        try:
            config.read(SCRIPTS[script][1], told, "")
        except config.UserError as error:  # of a package that is the user's to install
            assert re.fullmatch(r"model.name: the package \S+ is not installed: pip .*", str(error))
    elif script == "pip":
        pinned = (ROOT / "requirements-extra.txt").read_text().splitlines()
        assert "-r" in arguments or set(arguments[1:]) <= set(pinned)
    else:
        assert script in MODULES or script == "pytest" or (ROOT / script).is_file()


def test_the_commands_between_the_lines_name_files_that_are_there():
    quoted = re.findall(rf"`({FIRST_WORD}[^`]*)`", README)
    assert len(quoted) > 20
    for command in quoted:
        for word in command.split():
            if word.endswith((".py", ".txt")):
                assert (ROOT / word).is_file(), command


# ---- the other blocks ----

def test_a_run_is_loaded_and_the_net_of_its_card_too(run, monkeypatch):
    run(f"{LAUNCH}train.py")
    found = {"images": torch.rand(3, 1, 8, 8)}
    exec(block("import torch\n    from trainlib.models import load_model"), found)
    assert len(found["names"]) == 3 and set(found["names"]) <= set("0123456789")
    monkeypatch.chdir("runs/default/best")
    monkeypatch.syspath_prepend(".")
    monkeypatch.delitem(sys.modules, "net", raising=False)
    alone = {}
    exec(block("from net import MLP, load_weights"), alone)
    monkeypatch.delitem(sys.modules, "net")
    with torch.no_grad():
        assert alone["model"](found["images"]).equal(found["logits"])


def test_numbers_of_a_regression_are_in_the_targets_units_as_the_readme_says(run):
    run(next(command for command in COMMANDS if command.endswith("runs/houses")))
    text = block("import torch\n    from trainlib.models import load_model")
    lines = text.split("# of a regression:\n")[1].replace("\n# ", "\n").removeprefix("# ")
    model, houses = load_model("runs/houses"), pandas.read_csv("houses.csv")
    inputs = torch.tensor(houses[["rooms", "area"]].to_numpy(), dtype=torch.float32)
    with torch.no_grad():
        found = {"torch": torch, "model": model, "output": model(inputs)}
    exec(lines, found)
    asked = ["runs/houses", "houses.csv", "--device", "cpu", "--out", "prices.csv"]
    assert predict.main(asked) == 0
    told = pandas.read_csv("prices.csv").prediction.to_numpy()
    np.testing.assert_allclose(found["price"][:, 0].numpy(), told, rtol=1e-4)


def test_the_keys_of_fsdp2_are_those_of_its_file():
    wanted = yaml.safe_load(block("distributed_type: FSDP"))
    keys = yaml.safe_load((ROOT / "accelerate_configs" / "fsdp2.yaml").read_text())
    assert wanted.pop("fsdp_config").items() <= keys["fsdp_config"].items()
    assert wanted.items() <= keys.items()


def test_what_is_named_where_things_are_added_is_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where things")[1]
    for entry in text.split("\n- ")[1:]:
        names = re.findall(r"`([^`]+)`", entry)
        files = [ROOT / name for name in names if name.endswith(".py")]
        assert any(file.parent.name == "tests" for file in files)
        source = "".join(file.read_text(encoding="utf-8") for file in files)
        source += (ROOT / "trainlib" / "config" / "options.py").read_text(encoding="utf-8")
        source += (ROOT / "trainlib" / "tasks" / "task.py").read_text(encoding="utf-8")
        for name in names:
            if re.fullmatch(r"\w+(\.\w+)?", name) and name != "config.yaml":
                assert re.search(rf"\b{name.rpartition('.')[2]}\b", source), name
