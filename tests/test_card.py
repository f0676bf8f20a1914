"""The model card: what it says is so, and its program runs where nothing else is installed."""

import copy
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard as HubCard
from launching import export, train
from PIL import Image as image_module
from safetensors.torch import load_file

import distill
import train as script
from trainlib import config, data
from trainlib.card import ModelCard, add_exports
from trainlib.card.facts import hub_id, public
from trainlib.card.sections import PENDING
from trainlib.checkpoint import Checkpoints
from trainlib.data.reading import model_inputs
from trainlib.data.text import load_tokenizer
from trainlib.models import bundle, load_model
from trainlib.plots.records import read_json
from trainlib.tasks import TaskOptions

QUIET = ["--log.trackers", "[]", "--log.report", "false", "--loop.duration", "4 steps"]
OWN_NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, inputs, classes):
        super().__init__()
        self.layer = nn.Linear(inputs, sum(classes.values()))
        self.sizes = classes

    def forward(self, images):
        parts = self.layer(images.flatten(1)).split(list(self.sizes.values()), dim=1)
        return dict(zip(self.sizes, parts))
"""
TASKS = "{digit: {}, ink: {kind: regression}, quadrants: {kind: multilabel}}"
JOBS = {
    "mlp": ["--tasks", TASKS],
    "resnet": ["--model.name", "resnet", "--model.args.width", "16", "--model.channels_last"],
    "unet": ["--data.source", "builtin:digits_ink", "--tasks.mask",
             "{kind: segmentation, ignore_index: 255}", "--model.name", "unet",
             "--model.args.width", "4"],
    "one_logit": ["--data.source", "builtin:digits_ink", "--tasks.mask",
                  "{kind: segmentation, loss: bce, ignore_index: 255}", "--model.name", "unet",
                  "--model.args.width", "4"],
    "gpt": ["--data.source", "{folder}/notes.txt", "--data.tokenizer", "bytes", "--tasks.text.kind",
            "language_modeling", "--data.block_size", "16", "--model.name", "gpt",
            "--model.args", "{{width: 16, depth: 1, heads: 2}}"],
    "regression": ["--data.source", "builtin:diabetes", "--tasks.progression.kind", "regression",
                   "--optim.ema_half_life", "2 steps"],
    "own": ["--tasks", TASKS, "--model.name", "{folder}/net.py:Net"],
    "unscaled": ["--data.normalize", "false", "--tasks.quadrants",
                 "{kind: multilabel, thresholds: [0.3, 0.4, 0.5, 0.6]}"],
}
LIBRARIES = {
    "bert": ["--data.source", "{folder}/said.csv", "--data.input", "text", "--data.tokenizer",
             "{folder}/words.json", "--tasks.mood.target", "mood", "--model.name",
             "transformers:AutoModelForSequenceClassification", "--model.args.config",
             "{{model_type: bert, hidden_size: 8, num_hidden_layers: 1, num_attention_heads: 2, "
             "intermediate_size: 16, max_position_embeddings: 8}}"],
    "gpt2": ["--data.source", "{folder}/notes.txt", "--data.tokenizer", "{folder}/words.json",
             "--tasks.text.kind", "language_modeling", "--data.block_size", "8", "--model.name",
             "transformers:AutoModelForCausalLM", "--model.args.config",
             "{{model_type: gpt2, n_embd: 8, n_layer: 1, n_head: 2, n_positions: 16}}"],
    "timm": ["--model.name", "timm:resnet10t"],
    "torchvision": ["--model.name", "torchvision:shufflenet_v2_x0_5", "--data.channels", "3"],
}
# Runs the programs of the folders it is given and keeps their inputs and outputs. Nothing that was
# installed can be imported but torch, what torch itself needs, and safetensors.
ALONE = """
import importlib.abc, importlib.metadata, os, re, runpy, sys
allowed, waiting = set(), ["torch", "safetensors"]
while waiting:
    name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
    if name not in allowed:
        allowed.add(name)
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        waiting += [re.match(r"[\\w.-]+", need)[0] for need in needs if "extra ==" not in need]
refused = {module for module, owners in importlib.metadata.packages_distributions().items()
           if not allowed & {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners}}
assert {"numpy", "accelerate", "huggingface_hub", "yaml"} <= refused
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused | {"trainlib", "train"}:
            raise ModuleNotFoundError(f"refused: {name}", name=name)
sys.meta_path.insert(0, Refuse())
import warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
import torch
for folder in sys.argv[1:]:
    os.chdir(folder)
    sys.path[0] = folder
    for name in ("net", "own_net"):
        sys.modules.pop(name, None)
    torch.manual_seed(0)
    found = runpy.run_path("program.py")
    outputs = found["output"]
    outputs = outputs if isinstance(outputs, dict) else {"": outputs}
    torch.save({"inputs": found["inputs"]} | {f"output {k}": v for k, v in outputs.items()},
               "said.pt")  # safetensors writes by numpy only
"""


def program(card: str) -> str:
    found, *_ = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    return found


def finish(folder: Path, flags: list[str], main=script.main) -> torch.nn.Module:
    """Trains in this process; returns a copy of the module that was exported as final."""
    kept, original = {}, Checkpoints.export

    def keep(checkpoints, name, module, *rest):
        kept[name] = copy.deepcopy(module).eval()
        return original(checkpoints, name, module, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "export", keep)
        main(["--run_dir", str(folder), *QUIET, *flags])
    return kept["final"]


def take(folder: Path, target: Path) -> Path:
    """The files of an export in an empty folder, and its card's program beside them."""
    shutil.copytree(folder / "final", target)
    (target / "program.py").write_text(program((target / "README.md").read_text()))
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card")
    (folder / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "said.csv").write_text("text,mood\n" + "the dog,good\na fox jumps high,bad\n" * 20)
    (folder / "net.py").write_text(OWN_NET)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setenv("XDG_CACHE_HOME", str(folder / "tokens"))
        datasets.disable_progress_bars()
        yield folder


@pytest.fixture(scope="module")
def said(folder):
    """By job, the module that was trained, and what the program of its card has said."""
    modules, alone = {}, folder / "alone.py"
    for job, flags in JOBS.items():
        flags = [flag.format(folder=folder) if "{folder}" in flag or "{{" in flag else flag
                 for flag in flags]
        modules[job] = finish(folder / job, flags)
        take(folder / job, folder / "taken" / job)
    alone.write_text(ALONE)
    folders = [str(folder / "taken" / job) for job in JOBS]
    result = subprocess.run([sys.executable, str(alone), *folders], capture_output=True, text=True,
                            timeout=120, cwd=folder)
    assert result.returncode == 0, result.stderr
    return {job: (modules[job], torch.load(folder / "taken" / job / "said.pt", weights_only=True))
            for job in JOBS}


@pytest.mark.parametrize("job", JOBS)
@torch.no_grad()
def test_the_program_alone_gives_the_bits_of_the_trained_module(said, job):
    module, found = said[job]
    inputs = found.pop("inputs")
    outputs = module(inputs)
    outputs = outputs if isinstance(outputs, dict) else {"": outputs}
    assert {f"output {name}" for name in outputs} == found.keys()
    for name, output in outputs.items():
        assert output.equal(found[f"output {name}"]) and output.isfinite().all()


@pytest.mark.parametrize("job", LIBRARIES)
def test_the_program_uses_the_package_that_the_net_comes_from(folder, tmp_path, job, capsys):
    flags = [flag.format(folder=folder) for flag in LIBRARIES[job]]
    pytest.importorskip(job if job in ("timm", "torchvision") else "transformers")
    if "--data.tokenizer" in flags:
        tokenizers = pytest.importorskip("tokenizers")
        words = "the quick brown fox jumps over lazy dog a high . [UNK] [PAD]".split()
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(
            {word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
        made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        made.save(str(folder / "words.json"))
    module = finish(tmp_path / "run", flags)
    taken = take(tmp_path / "run", tmp_path / "taken")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(taken)
        patch.syspath_prepend(str(taken))
        patch.delitem(sys.modules, "net", raising=False)
        found = runpy.run_path("program.py")
        sys.modules.pop("net")
    with torch.no_grad():
        output, expected = found["output"], module(found["inputs"])
    logits = [each if torch.is_tensor(each) else each.logits for each in (output, expected)]
    assert logits[0].equal(logits[1])
    if "--data.tokenizer" in flags:
        copied = tokenizers.Tokenizer.from_file(str(taken / "tokenizer.json"))
        trained_with = load_tokenizer(str(folder / "words.json"), True)
        [numbers] = trained_with.encode(["the dog jumps over what"])
        assert copied.encode("the dog jumps over what").ids == numbers.tolist()


TWO_HEADS = """
from torch import nn
from transformers import AutoConfig, AutoModel

class Net(nn.Module):
    def __init__(self, vocab_size, classes):
        super().__init__()
        self.body = AutoModel.from_config(AutoConfig.for_model(
            "bert", vocab_size=vocab_size, hidden_size=8, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=16, max_position_embeddings=16))
        self.heads = nn.ModuleDict({name: nn.Linear(8, size) for name, size in classes.items()})

    def forward(self, tokens):
        first = self.body(tokens).last_hidden_state[:, 0]
        return {name: head(first) for name, head in self.heads.items()}
"""


@pytest.mark.parametrize("tasks, net", [
    # Two targets: the net's own two heads; one target, two losses: the only head of transformers.
    ("{mood: {}, score: {kind: regression}}", ["--model.name", "{folder}/heads.py:Net"]),
    ("{mood: {}, again: {target: mood, loss: focal}}", LIBRARIES["bert"][-4:]),
], ids=["two_heads", "one_head"])
def test_two_tasks_on_a_net_of_transformers_run_in_an_empty_folder(tmp_path, tasks, net):
    pytest.importorskip("transformers")
    (tmp_path / "said.csv").write_text(
        "text,mood,score\n" + "the dog,good,1.5\na fox,bad,2\nthe fox,bad,4\n" * 20)
    (tmp_path / "heads.py").write_text(TWO_HEADS)
    flags = [flag.format(folder=tmp_path) if "{" in flag else flag for flag in net]
    module = finish(tmp_path / "run", [
        "--data.source", str(tmp_path / "said.csv"), "--data.input", "text", "--data.tokenizer",
        "bytes", "--tasks", tasks, *flags])
    taken = take(tmp_path / "run", tmp_path / "taken")
    with (taken / "program.py").open("a") as file:
        file.write('\nparts = output if isinstance(output, dict) else {"logits": output.logits}\n'
                   'torch.save({"inputs": inputs, **parts}, "said.pt")\n')
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "heads.py").unlink()
    result = subprocess.run([sys.executable, "program.py"], cwd=taken, capture_output=True,
                            text=True, timeout=120, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr
    said = torch.load(taken / "said.pt", weights_only=True)
    with torch.no_grad():
        expected = module(said.pop("inputs"))
    assert said and all(expected[name].equal(output) for name, output in said.items())
    first, second = result.stdout.splitlines()
    number = expected["mood" if "mood" in said else "logits"].argmax(1)
    assert first == repr([["bad", "good"][number]])
    scale = json.loads((taken / "labels.json").read_text()).get("score")
    assert second == (first if scale is None else str(
        expected["score"] * torch.tensor(scale["deviation"]) + torch.tensor(scale["mean"])))


def test_the_front_matter_is_that_of_the_hub(said, folder):
    for job in JOBS:
        for which in ("best", "final"):
            card = HubCard.load(folder / job / which / "README.md")
            assert card.data.library_name == "pytorch" and card.data.license is None
            results = {each.metric_name: each.metric_value for each in card.data.eval_results}
            logged = [json.loads(line) for line in
                      (folder / job / "metrics.jsonl").read_text().splitlines()]
            last = [each for each in logged if "eval/loss" in each][-1]
            evaluated = read_json(folder / job / which / "evaluation.json")
            if len(evaluated) == 1:
                [own] = evaluated.values()
                assert "loss" in own.keys() & results.keys()
                assert all(results[name] == own[name] for name in own.keys() & results.keys())
            if which == "final":
                assert results == {key.removeprefix("eval/"): value for key, value in last.items()
                                   if key.startswith("eval/")}
            assert {each.dataset_split for each in card.data.eval_results} == {"validation"}
            assert card.data.model_name == job
    types = {each.task_type for each in HubCard.load(
        folder / "mlp" / "final" / "README.md").data.eval_results}
    assert types == {"image-classification", "other"}


def test_a_card_says_what_the_run_was(said, folder):
    text = (folder / "mlp" / "final" / "README.md").read_text()
    module, _ = said["mlp"]
    count = sum(parameter.numel() for parameter in module.parameters())
    assert f"`mlp`, {count:,} parameters" in text
    assert "1,437 to train on, 360 to validate on" in text and "Seed: 0" in text
    config = (folder / "mlp" / "config.yaml").read_text()
    assert "peak 0.001, as `config.yaml` has it; cosine" in text and "lr: 0.001" in config
    names = [f"`{number}`" for number in range(10)]
    assert f"10 classes: {', '.join(names)}" in text
    assert "averaged over the steps" in (folder / "regression" / "final" / "README.md").read_text()
    assert "16 tokens" in (folder / "gpt" / "final" / "README.md").read_text()


def lines(run: Path, start: str) -> list[str]:
    text = (run / "final" / "README.md").read_text()
    return [line.removeprefix("- ") for line in text.splitlines() if line.startswith(f"- {start}")]


def test_the_targets_are_counted(said, folder, tmp_path):
    [digits, ink, quadrants] = lines(folder / "mlp", "Target")
    assert digits.startswith("Target `digit`: training samples by class: `0` 142, `1` 146, ")
    assert sum(map(int, re.findall(r"` (\d+)", digits))) == 1437
    mean, deviation = (read_json(folder / "mlp" / "final" / "labels.json")["ink"][name][0]
                       for name in ("mean", "deviation"))
    assert ink == (f"Target `ink`: mean and deviation in training: `ink` {mean:.6g} and "
                   f"{deviation:.6g}")
    assert quadrants.startswith("Target `quadrants`: training samples with each label: `top left` ")
    assert lines(folder / "unet", "Target") == [
        "Target `mask`: 1,402,382 of 1,471,488 pixels in training count (95.3%)"]
    [tokens] = lines(folder / "gpt", "Target")  # of 1,800 bytes and the end
    assert tokens == "Target `text`: 1,616 tokens to predict in training, 184 in validation"
    # Many classes, and what is missing.
    rows = ["x,y,kind,price,size"]
    for number in range(300):
        kind = f"k{number % 24}" if number % 7 else ""
        rows.append(f"{number},{number % 7},{kind},{number % 5 or ''},{number % 4}")
    for name, more in (("train", []), ("held", ["1,1,k0,1,1"])):
        (tmp_path / f"{name}.csv").write_text("\n".join(rows + more) + "\n")
    finish(tmp_path / "run", [
        "--data.source", str(tmp_path / "train.csv"), "--data.validation_split",
        str(tmp_path / "held.csv"), "--tasks",
        "{kind: {}, size: {kind: regression, target: [price, size]}}"])
    found = Counter(row.split(",")[2] for row in rows[1:])
    missing = found.pop("")
    shown = found.most_common()
    kind, size = lines(tmp_path / "run", "Target")
    assert f"; {missing} of 300 samples have no such target" in kind and len(found) > 20
    assert all(f"`{name}` {count}" in kind for name, count in (shown[0], shown[-1]))
    assert kind.startswith("Target `kind`: training samples by class: most `k")
    assert "; least `k" in kind
    assert "`price` 2.5 and 1.11803 (60 missing), `size` 1.5 and 1.11803" in size


def test_what_is_set_for_the_training_is_said(said, folder, tmp_path):
    assert lines(folder / "mlp", "Loss") == [
        "Loss: cross_entropy (digit, weight 1), mse (ink, weight 1), bce (quadrants, weight 1)"]
    assert lines(folder / "mlp", "Gradients") == ["Gradients: scaled down to a norm of 1"]
    for start in ("Weights", "Updates", "Distillation"):
        assert lines(folder / "mlp", start) == []
    (tmp_path / "l.py").write_text(
        "from torch.nn.functional import cross_entropy\n"
        "def own(output, target):\n    return cross_entropy(output, target, reduction='none')\n")
    for job, flags in {
        "given": ["--tasks.digit.loss_args",
                  f"{{label_smoothing: 0.1, class_weights: {[1.0] * 10}}}", "--tasks.digit.weight",
                  "0.5", "--optim.args", "{betas: [0.9, 0.95]}", "--optim.max_grad_value", "0.25",
                  "--optim.ema_half_life", "2 steps", "--optim.layer_decay", "0.5", "--schedule",
                  "{name: polynomial, args: {power: 0.9}, final_fraction: 0.1}",
                  "--loop.patience", "3", "--loop.on_spike", "skip"],
        "own": ["--tasks.digit.loss", f"{tmp_path}/l.py:own", "--optim.max_grad_norm", "null",
                "--loop.duration", "1 step"],
    }.items():
        finish(tmp_path / job, flags)
    given = tmp_path / "given"
    [loss] = lines(given, "Loss")
    assert loss == ("Loss: cross_entropy (digit, weight 0.5, label_smoothing 0.1, class_weights "
                    f"{[1.0] * 10})")
    for line in ("Optimizer: adamw (weight_decay 0.01, betas [0.9, 0.95])",
                 "Gradients: scaled down to a norm of 1, then each element clamped to plus or "
                 "minus 0.25",
                 "Weights: averaged over the steps, half-life 2 steps",
                 "Learning rate: peak 0.001, as `config.yaml` has it; polynomial, warm-up 5%, "
                 "final_fraction 0.1, power 0.9; each layer at 0.5 times the rate of the layer "
                 "above it",
                 "Updates with a spike of loss or gradient are left out"):
        assert lines(given, line.partition(" ")[0]) == [line]
    [length] = lines(given, "Length")
    assert length.endswith("(the run: 4 steps, ends after 3 evaluations without a new best)")
    assert lines(tmp_path / "own", "Loss") == ["Loss: l.py:own (digit, weight 1)"]
    assert lines(tmp_path / "own", "Gradients") == ["Gradients: not clipped"]
    assert lines(tmp_path / "own", "Length")[0].startswith("Length: 1 step, 0.0445 epochs (")


def test_a_distilled_run_says_what_its_teachers_were_asked_for(tmp_path):
    small = ["--model.args.hidden", "[9]", "--tasks", "{digit: {}, ink: {kind: regression}}"]
    teacher = train(tmp_path / "teacher", "--loop.duration", "2 steps", *small)
    for job, flags, expected in (
        ("plain", [], "soft loss kl (digit), mse (ink), weight 1; temperature 4; each task only if "
         "a teacher has it; loss against the targets, weight 1"),
        ("two", ["--distill.teachers", f"[{teacher}, {{run: {teacher}, weight: 3}}]",
                 "--distill.tasks", "{digit: {loss: jsd, loss_args: {beta: 0.3}}, ink: {loss: "
                 "bounded_mse}}", "--distill.temperature", "2", "--distill.kd_weight", "0.5",
                 "--distill.hard_weight", "0.25", "--distill.warmup", "50%",
                 "--distill.features", '{"1 -> 1": {weight: 2, teacher: 1}}'],
         "soft loss jsd with beta 0.3 (digit), bounded_mse (ink), weight 0.5; temperature 2; each "
         "task only if a teacher has it; loss against the targets, weight 0.25; features "
         "`1 -> 1` by mse, weight 2 (teacher 1); probabilities of the teachers "
         "averaged with the weights 1, 3; soft losses and features rise over 50%"),
        ("cached", ["--distill.tasks", "{digit: {loss: logit_mse}}", "--distill.cache", "logits",
                    "--distill.cache_dir", str(tmp_path / "outputs")],
         "soft loss logit_mse (digit), mse (ink), weight 1; each task only if a teacher has it; "
         "loss against the targets, weight 1; outputs of the teachers kept in fp16"),
    ):
        finish(tmp_path / job, ["--distill.teachers", f"[{teacher}]", *small, *flags], distill.main)
        assert lines(tmp_path / job, "Distillation") == [f"Distillation: {expected}"]
    finish(tmp_path / "alone", [*small, "--distill.kd_weight", "0"], distill.main)
    assert lines(tmp_path / "alone", "Distillation") == []


def turned(side: int) -> image_module.Exif:
    exif = image_module.Exif()
    exif[0x0112] = side  # Orientation
    return exif


def write_images(folder: Path, size: tuple[int, int] | None) -> None:
    """Files of many kinds, each class the same; of one size (width, height) or of several."""
    generator = np.random.default_rng(0)

    def pixels(channels, width, height):
        shape = (height, width, channels) if channels > 1 else (height, width)
        return image_module.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))

    def sides(number):
        return size or (13 + 5 * number % 17, 11 + 7 * number % 19)

    images = {f"plain{number}.png": (pixels(3, *sides(number)), {}) for number in range(3)}
    images |= {"grey.png": (pixels(1, *sides(3)), {}), "alpha.png": (pixels(4, *sides(4)), {}),
               "grey_alpha.png": (pixels(4, *sides(5)).convert("LA"), {}),
               "bits.png": (pixels(1, *sides(6)).convert("1"), {}),
               "palette.png": (pixels(3, *sides(7)).quantize(16), {}),
               "transparent.png": (pixels(3, *sides(8)).quantize(9), {"transparency": 3}),
               "transparent.gif": (pixels(3, *sides(9)).quantize(9), {"transparency": 2}),
               "ink.jpg": (pixels(3, *sides(10)).convert("CMYK"), {}),
               "steps.webp": (pixels(3, *sides(11)), {}), "large.png": (pixels(3, 97, 41), {})}
    for number in range(1, 9):
        width, height = sides(number)
        width, height = (height, width) if number > 4 and size else (width, height)
        images[f"turned{number}.jpg"] = (pixels(3, width, height), {"exif": turned(number)})
        images[f"turned{number}.png"] = (pixels(1, width, height).quantize(9),
                                         {"exif": turned(number)})
        images[f"turned{number}.tif"] = (pixels(3, width, height), {"tiffinfo": {274: number}})
    if size:
        del images["large.png"]
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        for name, (image, options) in images.items():
            image.save(folder / kind / name, **options)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # Pillow's, of many frames
@pytest.mark.parametrize("flags", [
    ["--data.channels", "3", "--data.image_size", "[10, 15]"],
    ["--data.channels", "1", "--data.image_size", "16"], ["--data.channels", "3"],
    ["--data.channels", "3", "--data.image_size", "40", "--data.in_memory", "false"],
], ids=["colour", "grey", "one_size", "enlarged"])
def test_an_image_file_becomes_the_input_of_the_training(tmp_path, flags):
    write_images(tmp_path / "images", None if "--data.image_size" in flags else (14, 9))
    flags = ["--data.source", str(tmp_path / "images"), *flags, "--data.workers", "0"]
    finish(tmp_path / "run", [*flags, "--loop.duration", "1 step"])
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    _, reader = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    assert "pillow " in lines(tmp_path / "run", "Versions")[0]
    defined = {}
    exec(compile(reader, "card", "exec"), defined)
    options = config.read(script.TrainOptions, flags, "")
    dataset = data.load(data.open_source(options.data), options.data,
                        {"label": TaskOptions(target="label")})
    seen = 0
    for split in (dataset.train, dataset.validation):
        inputs = model_inputs(split.read(np.arange(len(split)))[0])
        paths = [each["path"] for each in split.decode._encoded(split.rows.numpy())]
        for path, expected in zip(paths, inputs, strict=True):
            found = defined["read_image"](path)
            assert found.dtype == expected.dtype and found.equal(expected), path
            seen += 1
    assert seen == len(list((tmp_path / "images").rglob("*.*")))


def test_lists_of_lists_are_not_called_images(tmp_path):
    rows = [{"field": [[[number, 2.0], [3.0, 4.0]]], "kind": number % 2} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    finish(tmp_path / "run", ["--data.source", str(tmp_path / "rows.jsonl"), "--tasks.kind.target",
                              "kind"])
    card = (tmp_path / "run" / "final" / "README.md").read_text()
    assert "Inputs are numbers, fp32 [batch, 1, 2, 2], the lists of the column `field`. The" in card
    assert "image" not in card


def test_an_export_with_a_card_is_loaded_as_before_and_is_small(said, folder):
    for job in JOBS:
        loaded = load_model(folder / job / "final").state_dict()
        assert all(value.equal(said[job][0].state_dict()[key]) for key, value in loaded.items())
        files = [file for file in (folder / job / "final").iterdir()
                 if file.suffix in (".py", ".md")]
        assert sum(file.stat().st_size for file in files) < 40_000


def test_the_net_of_the_users_own_is_copied_as_it_is(said, folder):
    assert (folder / "own" / "final" / "own_net.py").read_text() == OWN_NET
    card = (folder / "own" / "final" / "README.md").read_text()
    assert "own_net.py is the file net.py of the run" in card and str(folder) not in card


def test_cards_differ_only_in_what_is_true(tmp_path):
    flags = ["--loop.duration", "6 steps", "--checkpoint.every", "3 steps"]
    train(tmp_path / "a" / "run", *flags)
    train(tmp_path / "b" / "run", *flags)
    train(tmp_path / "two" / "run", *flags, processes=2)
    texts = {name: (tmp_path / name / "run" / "final" / "README.md").read_text()
             for name in ("a", "b", "two")}
    assert texts["a"] == texts["b"]
    different = [pair for pair in zip(texts["a"].splitlines(), texts["two"].splitlines(),
                                      strict=True) if pair[0] != pair[1]]
    assert different == [("- Machine: 1 process on cpu", "- Machine: 2 processes on cpu")]
    train(tmp_path / "two" / "run", *flags, "--loop.duration", "9 steps")
    longer = (tmp_path / "two" / "run" / "final" / "README.md").read_text()
    assert "- Continued at step 6 on 1 process\n" in longer and "after step 9 of 9" in longer
    assert "Trained in one go" in texts["two"] and "Continued" not in texts["two"]


def test_the_lineage_names_teachers_weights_and_the_rate_finder(tmp_path):
    small = ["--model.args.hidden", "[9]"]
    teacher = train(tmp_path / "teacher", "--loop.duration", "3 steps", *small)
    finish(tmp_path / "student", ["--distill.teachers", f"[{teacher}]", "--model.init_from",
                                  str(teacher), *small], distill.main)
    text = (tmp_path / "student" / "best" / "README.md").read_text()
    accuracy = read_json(teacher / "best" / "evaluation.json")["digit"]["accuracy"]
    assert "- Teacher: `teacher`, a `mlp`; its own evaluation: loss " in text
    assert f"accuracy {accuracy:.6g}" in text
    assert "- Started from the weights in `teacher`" in text and str(tmp_path) not in text
    compared = read_json(tmp_path / "student" / "distillation.json")
    both = [compared[who]["eval/accuracy"] for who in ("student", "teachers")]
    assert "`eval/accuracy`: this model {:.6g}, the teachers {:.6g}".format(*both) in text
    assert PENDING not in text and PENDING in (
        tmp_path / "student" / "final" / "README.md").read_text()
    assert "knowledge-distillation" in HubCard(text).data.tags


def test_the_lineage_says_how_the_rate_was_found(tmp_path):
    finish(tmp_path / "run", ["--optim.lr", "auto", "--loop.duration", "2 steps"])
    text = (tmp_path / "run" / "final" / "README.md").read_text()
    found = read_json(tmp_path / "run" / "lr_find.json")
    assert f"peak {found['suggestion']:.4g}, found by a sweep before the first step" in text
    assert f"- Learning rate finder (`lr_find.json`): {found['verdict']}" in text


def test_no_home_and_no_secret_stands_in_a_card(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12345678")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert public("runs at /home/jane/runs and /Users/jane.doe/x") == "runs at ~/runs and ~/x"
    assert public("C:\\Users\\jane\\x, /root/a, /srv/root/a") == "~\\x, ~/a, /srv/root/a"
    assert public(f"{tmp_path}/a and {tmp_path}b") == f"~/a and {tmp_path}b"
    assert public("key abcdefgh12345678 https://me:pw@host/x") == "key *** https://***@host/x"
    # In the front matter, where *** alone would be an alias of YAML.
    original = ModelCard.texts

    def texts(card, *given):  # as an option, earlier, it would be refused
        monkeypatch.setenv("OTHER_TOKEN", "secretly-named-run")
        return original(card, *given)

    monkeypatch.setattr(ModelCard, "texts", texts)
    finish(tmp_path / "secretly-named-run", [])
    text = (tmp_path / "secretly-named-run" / "final" / "README.md").read_text()
    assert HubCard(text).data.model_name == "***" and "secretly-named-run" not in text


def test_no_folder_of_the_machine_stands_in_a_card(tmp_path):
    rows = "a,b,kind\n" + "1,2,x\n2,1,one `of`  many\n" * 20
    for name in ("held.csv", "rows.csv"):
        (tmp_path / name).write_text(rows)
    (tmp_path / "own.py").write_text("def same(images):\n    return images\n")
    finish(tmp_path / "run", [
        "--data.source", f"{tmp_path}/r*.csv", "--data.validation_split", f"{tmp_path}/held.csv",
        "--data.augment.function", f"{tmp_path}/own.py:same", "--tasks.kind.target", "kind"])
    text = (tmp_path / "run" / "final" / "README.md").read_text()
    assert str(tmp_path) not in text and "function own.py:same" in text
    assert "- Source: r*.csv: 40 rows, validation from held.csv" in text
    assert "by class: `one 'of' many` 20, `x` 20" in text
    [result, *_] = HubCard(text).data.eval_results
    assert (result.dataset_name, result.dataset_split) == ("r*.csv", "held.csv")


def test_a_source_is_the_hubs_only_if_it_can_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub_id("uoft-cs/cifar10") == "uoft-cs/cifar10" and hub_id("imdb") == "imdb"
    for name in ("here", "builtin:digits", "a.csv", "shards/*.parquet", "/x", "f.py:make", "a/b/c"):
        assert hub_id(name) is None


def test_a_card_that_cannot_be_made_costs_no_weights(tmp_path, monkeypatch):
    said = []

    def opened(checkpoints, say, check_lock, describe=None, original=Checkpoints.open):
        original(checkpoints, said.append, check_lock, lambda *given: lambda: {}["missing"])

    monkeypatch.setattr(Checkpoints, "open", opened)
    export(tmp_path / "best", torch.nn.Linear(2, 2), "seed: 1\n", {}, {})
    assert load_file(tmp_path / "best" / "model.safetensors").keys() == {"weight", "bias"}
    assert not (tmp_path / "best" / "README.md").exists()
    [line] = said
    assert line.startswith("best/README.md: not written (KeyError: 'missing' ")


def test_programs_of_other_formats_stand_in_the_card_once(said, folder):
    card = (folder / "gpt" / "final" / "README.md").read_text()
    once = add_exports(card, {"model.pt2": "import torch\nprint(1)", "model.onnx": "print(2)\n"})
    assert once.count("```python") == card.count("```python") + 2
    assert "### model.pt2\n\n```python\nimport torch\nprint(1)\n```" in once
    assert add_exports(add_exports(once, {"other": "print(3)"}), {}) == add_exports(card, {})
    HubCard(once)
    with pytest.raises(ValueError, match="no line"):
        add_exports("# Another card\n", {})


def test_a_bundle_holds_what_is_used_after_what_it_uses(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "_ROOT", tmp_path)
    (tmp_path / "low.py").write_text(
        "import math\nimport os\n\n# Why it is two.\nTWO = 2\n\ndef unused():\n    os.abort()\n\n"
        "class Base:\n    size = math.floor(TWO)\n")
    (tmp_path / "high.py").write_text(
        "from trainlib.low import TWO, Base\n\ndef first():\n    return Child.size\n\n"
        "class Child(Base):\n    other = TWO\n")
    text = bundle.bundle([("high", "first")])
    found = {}
    exec(compile(text, "bundle", "exec"), found)
    assert found["first"]() == 2 and found["Child"].other == 2
    assert "# Why it is two." in text and "unused" not in text and "import os" not in text
    (tmp_path / "twice.py").write_text("from trainlib.low import Base\nTWO = 3\nx = (TWO, Base)\n")
    with pytest.raises(ValueError, match="TWO stands in twice and in low"):
        bundle.bundle([("twice", "x")])
    (tmp_path / "whole.py").write_text("from trainlib import low\nx = low.TWO\n")
    with pytest.raises(ValueError, match="whole uses low as a module"):
        bundle.bundle([("whole", "x")])
