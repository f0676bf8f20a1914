"""Every kind of job: the same bits on 1, 2 and 3 processes, and what it learns."""

import json

import datasets
import numpy as np
import pytest
from launching import assert_same_run, losses, records, train
from warm import fork

from trainlib.models import load_model

SHORT = ["--loop.duration", "60 steps", "--log.every", "1", "--loop.eval_every", "20 steps",
         "--batch.global_size", "24", "--batch.micro_size", "8"]
GPT = ["--model.name", "gpt", "--model.args", "{depth: 1, width: 32, heads: 2, dropout: 0.1}",
       "--data.tokenizer", "bytes", "--data.block_size", "32"]
UNET = ["--model.name", "unet", "--model.args", "{width: 4, depth: 1}"]


@pytest.fixture
def sources(tmp_path, monkeypatch) -> dict[str, list[str]]:
    """By job, the flags of real sources and of tables with gaps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache" / "datasets"))
    random = np.random.default_rng(0)
    num_rows = 120
    inputs = random.normal(size=(num_rows, 4))
    has_number = random.random(num_rows) > 1 / 3  # a third of one task's targets is missing
    datasets.Dataset.from_dict({
        **{f"x{i}": inputs[:, i] for i in range(4)},
        "kind": [["low", "mid", "high"][int(v)] for v in np.digitize(inputs[:, 0], [-0.5, 0.5])],
        "number": [float(v) if has else None
                   for v, has in zip(inputs.sum(1), has_number, strict=True)],
        "label": [[float(a > 0), float(b > 0) if b < 1 else None] for a, b in inputs[:, 1:3]],
        "tokens": random.integers(-1, 9, (num_rows, 3)).tolist(),
        "rare": [1.0 * row if row < 60 and row % 10 == 0 else None for row in range(num_rows)],
    }).to_parquet(str(tmp_path / "gaps.parquet"))
    words = "the quick brown fox jumps over a lazy dog and runs away".split()
    texts = [" ".join(random.choice(words, random.integers(1, 9))) for _ in range(num_rows)]
    datasets.Dataset.from_dict({"text": texts}).to_parquet(str(tmp_path / "texts.parquet"))
    return {
        "multi_task": ["--data.source", f"{tmp_path}/gaps.parquet", "--tasks",
                       "{kind: {}, number: {kind: regression, weight: 0.5}, "
                       "label: {kind: multilabel}}", "--data.input", "[x0, x1, x2, x3]"],
        "tokens": ["--data.source", f"{tmp_path}/gaps.parquet", "--data.input", "tokens",
                   "--data.normalize", "false"],
        "texts_padded": ["--data.source", f"{tmp_path}/texts.parquet", "--tasks.text.kind",
                         "language_modeling", "--data.packing", "false", *GPT],
        "texts_packed": ["--data.source", f"{tmp_path}/texts.parquet", "--tasks.text.kind",
                         "language_modeling", *GPT],
        "segmentation": ["--data.source", "builtin:digits_ink", "--tasks.mask",
                         "{kind: segmentation, ignore_index: 255}", "--data.augment.crop", "2",
                         *UNET],
        "dice": ["--data.source", "builtin:digits_ink", "--tasks.mask",
                 "{kind: segmentation, ignore_index: 255, loss: dice}", *UNET],
        "regression": ["--data.source", "builtin:diabetes", "--tasks.progression.kind",
                       "regression"],
        "multilabel": ["--tasks.quadrants", "{kind: multilabel, loss_args: {pos_weight: 2.0}}"],
    }


@pytest.mark.parametrize("job", ["multi_task", "texts_padded", "segmentation", "regression"])
def test_one_two_and_three_processes_give_the_same_bits(tmp_path, sources, job):
    flags = [*SHORT, *sources[job]]
    if job == "segmentation":  # larger
        flags[1] = "12 steps"
    one, two, three = (train(tmp_path / str(n), *flags, processes=n) for n in (1, 2, 3))
    curve = losses(one)
    assert sum(curve[-5:]) < sum(curve[:5])
    assert_same_run(one, two)
    assert_same_run(one, three)


@pytest.mark.parametrize("job", ["texts_packed", "dice", "multilabel"])
def test_one_and_two_processes_give_the_same_bits(tmp_path, sources, job):
    flags = [*SHORT, *sources[job], "--loop.duration", "10 steps"]
    one, two = (train(tmp_path / str(n), *flags, processes=n) for n in (1, 2))
    assert_same_run(one, two)


def test_tokens_give_the_same_bits_in_memory_and_from_disk(tmp_path, sources):
    flags = [*SHORT, *sources["texts_packed"], "--loop.duration", "10 steps"]
    one, two = (train(tmp_path / where, *flags, "--data.in_memory", where)
                for where in ("true", "false"))
    assert_same_run(one, two)


@pytest.mark.parametrize("job", ["multi_task", "texts_padded", "regression"])
def test_another_micro_size_gives_one_curve_to_rounding(tmp_path, sources, job):
    """Divided by the true count of the step, wherever its items lie."""
    flags = [*SHORT, *sources[job]]
    dropout = "--model.args.dropout"
    whole, parts = (
        losses(train(tmp_path / size, *flags, dropout, "0", "--batch.micro_size", size))
        for size in ("24", "5")
    )
    assert max(abs(a - b) for a, b in zip(whole, parts, strict=True)) <= 1e-6


def test_ddps_own_sum_gives_the_same_curve_to_rounding(tmp_path, sources):
    """DDP averages over processes, of which each has other numbers of targets."""
    flags = [*SHORT, *sources["multi_task"], "--model.args.dropout", "0"]
    one = losses(train(tmp_path / "1", *flags))
    two = losses(train(tmp_path / "2", *flags, "--batch.exact_sum", "false", processes=2))
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) <= 1e-6


def test_the_run_holds_the_columns_that_were_found(tmp_path, sources):
    flags = [*SHORT, *sources["multi_task"], "--loop.duration", "2 steps"]
    named = flags.index("--data.input")
    del flags[named : named + 2]
    config = load_model(train(tmp_path / "run", *flags)).run_config
    assert config["data"]["input"] == ["tokens"]  # a list comes before numbers
    assert config["tasks"]["number"]["target"] == "number"


def test_every_term_of_several_tasks_is_logged(tmp_path, sources):
    run = train(tmp_path / "run", *SHORT, *sources["multi_task"])
    for record in records(run):
        kind = "train" if "train/loss" in record else "eval"
        parts = [record[f"{kind}/{task}/loss"] for task in ("kind", "number", "label")]
        assert record[f"{kind}/loss"] == pytest.approx(parts[0] + 0.5 * parts[1] + parts[2])
    assert {"eval/kind/accuracy", "eval/number/r2", "eval/label/micro_f1"} <= record.keys()


def test_a_step_without_a_target_of_a_task_has_no_loss_of_it(tmp_path, sources):
    run = train(tmp_path / "run", *SHORT, *sources["multi_task"], "--tasks.rare.kind", "regression",
                "--batch.global_size", "4", "--batch.micro_size", "2")
    rare = [record["train/rare/loss"] for record in records(run) if "train/loss" in record]
    assert None in rare and any(loss is not None and loss > 0 for loss in rare)
    assert all(loss is not None for loss in losses(run))


def test_a_loss_of_ones_own_on_numbers_gives_the_same_bits(tmp_path, sources):
    (tmp_path / "own.py").write_text("def loss(output, target): return (output - target).abs()")
    flags = [*SHORT, *sources["multi_task"], "--tasks.number.loss", f"{tmp_path}/own.py:loss",
             "--loop.duration", "10 steps"]
    assert_same_run(train(tmp_path / "1", *flags), train(tmp_path / "2", *flags, processes=2))


def test_missing_targets_change_nothing_of_the_other_tasks(tmp_path, sources):
    """Nothing of the net is shared, so a task learns as it would alone."""
    (tmp_path / "nets.py").write_text("""
from torch import nn

class Apart(nn.Module):
    def __init__(self, classes):
        super().__init__()
        classes = classes if isinstance(classes, dict) else {"kind": classes}
        self.parts = nn.ModuleDict({name: nn.Linear(4, n) for name, n in classes.items()})

    def forward(self, inputs):
        return {name: part(inputs) for name, part in self.parts.items()}
""")
    common = ["--data.source", f"{tmp_path}/gaps.parquet", "--data.input", "[x0, x1, x2, x3]",
              "--model.name", f"{tmp_path}/nets.py:Apart", "--optim.max_grad_norm", "null"]
    both = train(tmp_path / "both", *SHORT, *common, "--tasks",
                 "{kind: {}, number: {kind: regression}}")
    alone = train(tmp_path / "alone", *SHORT, *common, "--tasks", "{kind: {}}")
    shared = [record["train/kind/loss"] for record in records(both) if "train/loss" in record]
    assert shared == losses(alone)


def test_a_loaded_regression_gives_numbers_in_their_own_units(tmp_path, sources):
    import torch
    from launching import load

    from trainlib.tasks import TaskOptions

    run = train(tmp_path / "run", *SHORT, *sources["regression"])
    model = load_model(run / "final")
    scale = model.label_names["progression"]
    dataset = load(tasks={"progression": TaskOptions(kind="regression", target="progression")},
                   source="builtin:diabetes")
    with torch.no_grad():
        predicted = model(dataset.validation.inputs).double() * torch.tensor(scale["deviation"])
    info = dataset.targets["progression"]
    target = dataset.validation.targets["progression"] * torch.tensor(info.deviation)
    evaluation = json.loads((run / "final" / "evaluation.json").read_text())["progression"]
    assert (predicted - target).abs().mean().item() == pytest.approx(evaluation["mae"], rel=1e-6)
    assert 100 < scale["mean"][0] < 200  # the disease's progression is 25 to 346


def test_a_poisoned_pixel_names_its_row_in_any_kind_of_job(tmp_path, sources):
    """A loss of one's own that fails to be finite on one sample."""
    (tmp_path / "own.py").write_text("""
def loss(output, target):
    return ((output - target) ** 2).where(target < 1.5, float("nan"))
""")
    result = fork(["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", *SHORT,
                     *sources["regression"], "--tasks.progression.loss", f"{tmp_path}/own.py:loss"])
    assert result.returncode == 3 and "Traceback" not in result.stderr
    bad = [json.loads(line) for line in (tmp_path / "run/bad_steps.jsonl").read_text().splitlines()]
    assert bad[0]["suspects"]


def test_what_a_table_cannot_give_is_one_line_and_exit_code_2(tmp_path, sources):
    (tmp_path / "nets.py").write_text("""
from torch import nn

class Embedded(nn.Module):
    def __init__(self, vocab_size, classes):
        super().__init__()
        self.table, self.head = nn.Embedding(vocab_size, 4), nn.Linear(12, classes)

    def forward(self, tokens):
        return self.head(self.table(tokens).flatten(1))

class Single(nn.Linear):
    def __init__(self, classes):
        super().__init__(4, 3)
""")
    nets = f"{tmp_path}/nets.py"
    for flags, message in (
        ([*sources["tokens"], "--tasks.kind.kind", "classification", "--model.name",
          f"{nets}:Embedded"], "those of the data reach from -1 to 8"),
        ([*sources["multi_task"], "--model.name", f"{nets}:Single"],
         "the model's output is one tensor, (2, 3), task 'kind' needs (2, 3)"),
    ):
        result = fork(["--run_dir", str(tmp_path / "run"), "--log.trackers", "[]", *flags])
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags, message", [
    (["--tasks.digit", "{}", "--tasks.ink.kind", "regression", "--model.name", "unet"],
     "unet returns one tensor, the tasks are digit, ink"),
    (["--tasks.digit", "{}", "--tasks.ink.kind", "regression", "--model.name",
      "transformers:AutoModelForImageClassification", "--model.args.config.model_type", "vit"],
     "returns one tensor, the tasks are digit, ink"),
    (["--tasks.digit", "{}", "--tasks.inc.kind", "regression"],
     "name the column to predict; the source has digit, ink, quadrants"),
    (["--tasks.digit.target", "digitt"], "no column 'digitt'; did you mean 'digit'"),
    (["--data.source", "builtin:pydocs", "--tasks.text.kind", "language_modeling", *GPT,
      "--data.block_size", "1000000"], "less than one block of 1000000"),
    (["--data.source", "builtin:pydocs", "--tasks.text.kind", "language_modeling", *GPT,
      "--model.args.vocab_size", "100"],
     "room for tokens 0 to 99, those of the data reach from 0 to 255"),
    (["--data.source", "builtin:pydocs", "--tasks.text.kind", "language_modeling"],
     "data.tokenizer: text needs one"),
    (["--tasks.digit.thresholds", "0.3"], "thresholds: is for multilabel"),
    (["--tasks.ink", "{kind: regression, loss: cross_entropy}"],
     "cross_entropy is not for regression; use mse or l1 or huber"),
    (["--tasks.quadrants", "{kind: multilabel, thresholds: [0.5, 0.5]}"],
     "2 for 4 labels"),
    (["--tasks.ink.kind", "multilabel"], "is for regression, got multilabel"),
])
def test_what_does_not_fit_is_one_line_and_exit_code_2(tmp_path, sources, flags, message):
    run = tmp_path / "run"
    result = fork(["--run_dir", str(run), "--log.trackers", "[]", *flags])
    assert result.returncode == 2 and message in result.stderr
    assert "Traceback" not in result.stderr and not run.exists()
