"""train.py --diagnose: each planted fault is named, and nothing is found in healthy jobs."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from launching import ROOT, recipes
from safetensors.torch import save_file
from warm import fork

import train
from train import TrainOptions
from trainlib import config, diagnosis, models
from trainlib.data.workers import Rows
from trainlib.diagnosis.dead_units import Alive
from trainlib.diagnosis.findings import Report
from trainlib.diagnosis.first_batches import Columns, judge_inputs
from trainlib.diagnosis.held_out import Attempt, rank_score
from trainlib.diagnosis.page import page
from trainlib.diagnosis.parameters import parameter_rows

PLANTED = str(Path(__file__).with_name("planted.py"))
HEALTHY = [recipe for recipe in recipes()
           if "builtin:" in recipe.read_text() and "\ndistill:" not in recipe.read_text()]
SMALL = ["--batch.global_size", "64", "--loop.duration", "20 epochs"]
NUMBERS = ["--tasks", "{target: {kind: regression}}"]


@pytest.fixture
def diagnosed(own_folder, tmp_path, monkeypatch, capsys):
    """From flags to the report of ``--diagnose`` in this process, exit code and folder checked."""
    def run(*flags: str) -> Report:
        seen = []
        show = diagnosis.page
        monkeypatch.setattr(diagnosis, "page",
                            lambda rows, report: seen.append(report) or show(rows, report))
        before = set(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as end:
            train.main(["--diagnose", "--run_dir", str(tmp_path / "run"), *flags])
        monkeypatch.setattr(diagnosis, "page", show)
        [report] = seen
        assert end.value.code == bool(report.findings)
        assert not {file for file in set(tmp_path.rglob("*")) - before
                    if not {"cache", "tokens", "__pycache__"} & set(file.parts)}
        said = capsys.readouterr().out
        for finding in report.findings:
            assert finding.name in said and finding.found.split()[0] in said
        return report

    return run


def job(source: str, *flags: str) -> list[str]:
    return ["--data.source", f"{PLANTED}:{source}", *SMALL, *flags]


def net(name: str, *flags: str) -> list[str]:
    return job("sound", "--model.name", f"{PLANTED}:{name}", *flags)


def labels(name: str) -> list[str]:
    return job("labels", "--tasks", "{target: {kind: multilabel}}",
               "--model.name", f"{PLANTED}:{name}")


@pytest.mark.parametrize("recipe", HEALTHY, ids=lambda recipe: recipe.stem)
def test_nothing_is_found_in_a_healthy_recipe(diagnosed, recipe):
    report = diagnosed("--recipe", str(recipe))
    assert report.findings == [] and report.cut_short == []
    assert report.spent < 30


@pytest.mark.parametrize("flags", [
    job("sound"), net("Net"), net("ZeroStart"), net("Net", "--optim.name", "sgd", "--optim.lr",
                                                    "0.1", "--schedule.warmup", "0 steps"),
    ["--batch.micro_size", "auto"], ["--optim.lr", "auto"],
    ["--data.augment.mixup", "0.4", "--tasks", "{digit: {loss_args: {label_smoothing: 0.1}}}"],
    job("unbalanced", "--tasks", "{target: {loss: focal}}"),
    labels("Positive"), ["--tasks.digit.loss", f"{PLANTED}:tiny_loss"],
    job("sound", "--model.args.hidden", "[]"), job("few_rows"), job("few_shared"),
    job("ten_classes", "--model.args.hidden", "[2]"), ["--model.args.hidden", "[2]"],
    job("noisy_numbers", *NUMBERS, "--model.args.hidden", "[]"),
    job("heavy_targets", *NUMBERS), job("heavy_inputs"),
    ["--recipe", f"{ROOT}/recipes/diabetes_regression.yaml", "--model.args.hidden", "[]"],
], ids=["table", "own net", "zeros", "sgd", "auto size", "auto rate", "smoothed", "handled",
        "positive", "tiny loss", "linear", "few rows", "few shared",
        "two units", "digits by two units", "noise", "heavy targets", "heavy inputs",
        "linear regression"])
def test_nothing_is_found_in_a_sound_job(diagnosed, flags):
    assert diagnosed(*flags).findings == []


@pytest.mark.parametrize("name, flags", [
    ("targets do not follow", job("shuffled")),
    ("targets do not follow", job("shuffled_numbers", "--tasks",
                                  "{target: {kind: regression, loss: l1}}")),
    ("targets do not follow", job("heavy_shuffled", *NUMBERS)),
    ("weight decay too high", ["--optim.weight_decay", "100"]),
    ("weight decay too high", job("sound", "--optim.weight_decay", "100")),
    ("weight decay too high", job("sound", "--optim.name", "sgd", "--optim.lr", "0.1",
                                  "--optim.weight_decay", "1")),
    ("weight decay too high", ["--optim.name", "sgd", "--optim.lr", "0.1",
                               "--optim.weight_decay", "1"]),
    ("inputs not normalised", ["--recipe", f"{ROOT}/recipes/diabetes_regression.yaml",
                               "--data.normalize", "false"]),
    ("inputs not normalised", net("Unscaled")),
    ("one column dominates", job("one_large_column", "--data.normalize", "false")),
    ("learning rate too high", ["--optim.lr", "1e3"]),
    ("learning rate too high", ["--recipe", f"{ROOT}/recipes/digits_resnet.yaml",
                                "--optim.lr", "1e3"]),
    ("learning rate too high", ["--recipe", f"{ROOT}/recipes/diabetes_regression.yaml",
                                "--optim.lr", "1e3"]),
    ("learning rate too high", ["--optim.lr", "0.3"]),
    ("learning rate too low", ["--optim.lr", "1e-7"]),
    ("non-finite loss", ["--tasks.digit.loss", f"{PLANTED}:nan_loss"]),
    ("dead units", net("Dead")), ("dead units", net("DeadFunction")),
    ("wrong output size", ["--model.args.classes", "7"]),
    ("samples in both splits", job("in_both")),
    ("samples in both splits", job("some_repeated")),
    ("samples in both splits", job("leak_of_two_percent")),
    ("class without validation samples", job("class_in_training_only")),
    ("frozen by mistake", net("Frozen")),
    ("frozen by mistake", ["--model.freeze", "[1.*]"]),
    ("unreached parameters", net("Unused")),
    ("labels unbalanced", job("unbalanced")),
    ("labels unbalanced", job("rare_label", "--tasks", "{target: {kind: multilabel}}")),
    ("class without samples", job("missing_class")),
    ("same inputs, other targets", job("contradicting")),
    ("vanishing gradients", net("Deep")),
    ("exploding gradients", net("Exploding")),
    ("initial loss", net("Confident")),
    ("probabilities as output", net("Softmax")),
    ("probabilities as output", labels("Sigmoid")),
    ("non-finite parameters", net("Broken")),
    ("constant parameters", net("Symmetric")),
    ("constant output", net("Blind")),
    ("non-finite output", net("Infinite")),
    ("does not learn", net("Detached")),
    ("model fails", net("Failing")),
    ("optimizer fails", job("sound", "--optim.name", f"{PLANTED}:Stepless")),
    ("model fails", net("Normed", "--batch.micro_size", "1")),
    ("model fails", net("Normed", "--batch.micro_size", "9")),
])
def test_a_planted_fault_is_named(diagnosed, name, flags):
    report = diagnosed(*flags)
    assert name in report.names, report.findings
    # In one breath with what follows from it at the most; the sound parts are not blamed.
    follows = {
        "dead units": {"vanishing gradients", "constant output"},
        "inputs not normalised": {"initial loss", "exploding gradients", "one column dominates"},
        "vanishing gradients": {"constant output"},
        "exploding gradients": {"initial loss"},
        "does not learn": {"unreached parameters"},
    }
    assert report.names <= {name} | follows.get(name, set()), report.findings


def test_a_finding_has_the_numbers_and_the_way_out(diagnosed):
    [finding] = diagnosed("--model.args.classes", "7").findings
    assert "(2, 7)" in finding.found and "(2, 10)" in finding.found and "10" in finding.advice
    [finding] = diagnosed("--optim.lr", "1e3").findings
    rate = float(finding.advice.split("--optim.lr ")[1].split(",")[0])
    assert diagnosed("--optim.lr", str(rate)).findings == []
    [finding] = diagnosed(*job("in_both")).findings
    assert finding.found.startswith("10 of 100") and "90 (training row 17)" in finding.found


def test_data_slower_than_the_step_are_found(diagnosed, monkeypatch):
    read = Rows.read
    monkeypatch.setattr(Rows, "read", lambda *args: time.sleep(0.03) or read(*args))
    flags = ["--data.in_memory", "false", "--data.workers", "0"]
    [finding] = diagnosed(*flags).findings
    assert finding.name == "slow data" and "--data.in_memory true" in finding.advice
    assert diagnosed().findings == []


class Clock:
    """Seconds that pass for samples alone."""

    now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_in(self, owner, name: str, seconds: float, monkeypatch) -> None:
        """Has each call of a method take so long for each sample of its last argument."""
        method = getattr(owner, name)

        def slow(*args):
            self.now += seconds * len(args[-1])
            return method(*args)

        monkeypatch.setattr(owner, name, slow)


@pytest.mark.parametrize("reading, forward", [(0.05, 0), (0.5, 0), (0, 0.02), (0.02, 0.2)])
@pytest.mark.parametrize("size", [8, 400])
def test_a_slow_job_is_asked_for_less(diagnosed, monkeypatch, reading, forward, size):
    clock = Clock()
    clock.pass_in(Rows, "read", reading, monkeypatch)
    clock.pass_in(torch.nn.Linear, "forward", forward / 2, monkeypatch)  # there are two of them
    monkeypatch.setattr(time, "perf_counter", clock)
    report = diagnosed("--data.in_memory", "false", "--data.workers", "0",
                       *net("Net", "--batch.global_size", "400", "--batch.micro_size", str(size)))
    assert report.spent < 1.25 * diagnosis.BUDGET_SECONDS
    assert report.names <= {"slow data"}, report.findings
    cut = " ".join(report.cut_short)
    if reading:
        assert "samples in both splits" in cut
    if size == 400:
        assert "micro-batches: of" in cut and "and not of 400" in cut
    if max(reading, forward) > 0.05:
        assert "held-out samples" in cut


def test_what_to_do_for_a_batch_norm_of_one_sample_is_said(diagnosed):
    for size in (1, 9):  # of 64
        [finding] = diagnosed(*net("Normed", "--batch.micro_size", str(size))).findings
        assert "Expected more than 1 value per channel" in finding.found
        assert "set --batch.micro_size to 2 or more" in finding.advice
    assert diagnosed(*net("Normed", "--batch.micro_size", "2")).findings == []


class Sequences(torch.nn.Module):
    """[N, 6] to ReLUs of [N, channels, positions] and of [N, positions, channels]."""

    def __init__(self, length: int):
        super().__init__()
        self.length = length
        self.conv, self.norm = torch.nn.Conv1d(1, 8, 1), torch.nn.BatchNorm1d(8)
        self.first, self.second, self.last = (torch.nn.ReLU() for _ in range(3))
        self.linear = torch.nn.Linear(8, 8)
        self.conv.bias.data.fill_(1.0)
        self.conv.weight.data.fill_(0.0)
        self.norm.bias.data.copy_(torch.tensor([-1.0] * 7 + [1.0]))

    def forward(self, inputs):
        hidden = self.norm(self.conv(inputs[:, None, : self.length]))
        hidden = torch.cat([self.first(hidden), hidden], 1)[:, :8]
        tokens = hidden.transpose(1, 2)
        self.second(tokens.clone() - 0.5)
        return self.last(self.linear(tokens) * 0 + torch.tensor([1.0, *[-1.0] * 7]))


@pytest.mark.parametrize("length", [6, 8])
def test_units_are_channels_behind_a_conv_and_last_behind_a_linear_layer(length):
    net, alive = Sequences(length), Alive()
    with alive.seen_in(net):
        net(torch.randn(4, 8))
    for name, awake in (("first", 7), ("second", 7), ("last", 0)):
        assert alive.seen[name].nonzero().flatten().tolist() == [awake], name


def test_a_heavy_tail_is_no_column_that_dominates():
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(512, 4, generator=random)
    net, found = torch.nn.Linear(4, 2), []
    for scale in (torch.ones(512), 20 * torch.ones(512), 400 * (torch.arange(512) == 7)):
        columns = Columns()
        with columns.seen_by(torch.nn.Sequential(net)), torch.no_grad():
            net(inputs * torch.stack([scale, *torch.ones(3, 512)], 1))
        report = Report(1.0)
        judge_inputs(SimpleNamespace(dataset=SimpleNamespace(inputs=None), options=SimpleNamespace(
            data=SimpleNamespace(normalize=True))), columns, report)
        found.append(report.names)
    assert found[0] == set() and "one column dominates" in found[1]
    assert "one column dominates" not in found[2]


def test_ranks_tell_whether_numbers_with_a_heavy_tail_follow():
    random = torch.Generator().manual_seed(0)
    own, noise = torch.randn(2, 200, 1, generator=random)
    target = torch.exp(4 * (own + noise))
    assert rank_score(own, target) > 3 > abs(rank_score(own, target.flip(0)))
    assert rank_score(torch.zeros(200, 1), target) == 0
    target[:150] = float("nan")
    assert rank_score(own, target) > 3
    attempt = Attempt(losses=[0.1] * 30, looks=[{"y": 0.5}], ranked={"y": 4.0}, constant=1.0)
    assert attempt.failed() == []
    assert replace(attempt, ranked={"y": 2.0}).failed() == ["y"]
    assert replace(attempt, losses=[5.0] * 30).failed() == ["y"]  # nothing has been learnt


def test_two_diagnoses_say_the_same(diagnosed):
    def said(report: Report) -> list:
        return [report.findings, [fact for fact in report.facts if fact[0] != "time of a step"]]

    flags = job("shuffled", "--model.args.dropout", "0.5")
    assert said(diagnosed(*flags)) == said(diagnosed(*flags))


def test_it_leaves_the_job_as_it_was(diagnosed, monkeypatch):
    jobs, real = [], diagnosis.diagnose

    def watched(job):
        before = copy.deepcopy(job.module.state_dict())
        modes = [module.training for module in job.module.modules()]
        report = real(job)
        jobs.append(job)
        assert [module.training for module in job.module.modules()] == modes
        after = job.module.state_dict()
        assert all(after[name].equal(value) for name, value in before.items())
        assert not job.optimizer.state and all(p.grad is None for p in job.module.parameters())
        return report

    monkeypatch.setattr(diagnosis, "diagnose", watched)
    diagnosed("--recipe", f"{ROOT}/recipes/digits_resnet.yaml")
    assert len(jobs) == 1


def test_without_time_little_is_done_and_nothing_is_found(diagnosed, monkeypatch):
    monkeypatch.setattr(diagnosis, "BUDGET_SECONDS", 0.0)
    report = diagnosed("--recipe", f"{ROOT}/recipes/digits_resnet.yaml")
    assert report.findings == []
    cut = " ".join(report.cut_short)
    for what in ("samples in both splits", "one batch by heart", "data time"):
        assert what in cut


def test_several_processes_are_refused(tmp_path):
    result = fork(["--diagnose", "--run_dir", str(tmp_path / "run")], processes=2)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "diagnose: it runs on one process" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_in_the_options_stays_one(tmp_path):
    result = fork(["--diagnose", "--run_dir", str(tmp_path / "run"), "--optim.name", "adamm"])
    assert result.returncode == 2 and list(tmp_path.iterdir()) == []


def test_it_is_no_part_of_a_recipe():
    options = config.read(TrainOptions, ["--diagnose"], "")
    assert options.diagnose and "diagnose" not in config.to_yaml(options)


def test_many_parameters_are_told_in_few_lines():
    deep = torch.nn.Sequential(*[torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.LayerNorm(8)) for _ in range(100)])
    rows = parameter_rows(deep)  # the biases of both have one pattern and one shape
    assert len(rows) == 3 and all("00 of them)" in row.name for row in rows)
    together = torch.cat([p.detach().flatten() for n, p in deep.named_parameters()
                          if p.ndim == 2]).double()
    [matrices] = [row for row in rows if row.shape == "8x8"]
    assert float(matrices.std) == pytest.approx(float(together.std(correction=0)), rel=1e-3)
    different = torch.nn.ParameterDict({chr(i): torch.nn.Parameter(torch.zeros(1))
                                        for i in range(200, 400)})
    assert len(parameter_rows(different)) <= 41


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_the_page_is_as_wide_as_the_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    report = Report(1.0)
    report.fact("a fact", "many words " * 30)
    report.error("a name of three", "found " * 40, "do this " * 40)
    report.cut("the rest " * 20)
    module = torch.nn.ModuleDict({"long_" * 30: torch.nn.Linear(1000, 3)})
    lines = page(parameter_rows(module), report).splitlines()
    assert max(map(len, lines)) <= min(columns, 120)
    assert "error" in "\n".join(lines) and "To do: do this" in "\n".join(lines)


def test_layers_that_are_frozen_on_purpose_are_no_finding(diagnosed, tmp_path):
    module = models.build_model(models.ModelOptions(args={"inputs": 64, "classes": 10}))
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    flags = ["--model.init_from", str(tmp_path / "model.safetensors"), "--model.freeze", "[1.*]"]
    assert diagnosed(*flags).findings == []
