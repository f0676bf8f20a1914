"""Trackers mirror metrics.jsonl: every record once, whatever happens, and never a secret."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
import yaml
from launching import ROOT, assert_same_run, records, train
from PIL import Image
from warm import fork

from train import TrainOptions
from trainlib import config, credentials
from trainlib.runlog import LogOptions
from trainlib.trackers import Trackers
from trainlib.trackers.histograms import Histograms
from trainlib.trackers.weights_and_biases import WeightsAndBiases

SHORT = ["--batch.micro_size", "16", "--loop.duration", "60 steps", "--loop.eval_every", "7 steps",
         "--log.every", "2", "--checkpoint.every", "11 steps"]


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> Path:
    """A run without trackers."""
    return train(tmp_path_factory.mktemp("bare") / "run", *SHORT)


def contents(folder: Path) -> list[dict]:
    """What a run's sessions left in W&B's files, in order, through W&B's own reader."""
    found = []
    for file in sorted(folder.glob("wandb/*run-*/run-*.wandb")):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
        output = subprocess.run(command, capture_output=True, check=True, timeout=60).stdout
        found += [json.loads(line) for line in output.splitlines()]
    return found


def of_type(items: list[dict], kind: str) -> list[dict]:
    return [item[kind] for item in items if item["type"] == kind]


def history(folder: Path) -> list[dict]:
    items = [record["item"] for record in of_type(contents(folder), "history")]
    return [{k: v for k, v in item.items() if not k.startswith("_")} for item in items]


def numbers(folder: Path) -> list[dict]:
    """The history without pictures, tables and histograms."""
    return [row for row in history(folder) if not any(key.endswith("._type") for key in row)]


def summary(folder: Path) -> dict:
    merged = {}
    for item in of_type(contents(folder), "summary"):
        merged |= item.get("update", {})
    return merged


def assert_every_record_once(run: Path) -> None:
    """W&B's history and metrics.jsonl hold the same keys at the same steps, each once, and the
    same numbers but for clocks, of which a replayed step has two."""
    def plain(rows):
        return sorted(
            json.dumps({k: v for k, v in row.items() if not k.startswith(("speed/", "memory/"))},
                       sort_keys=True)
            for row in rows
        )

    def keys(rows):
        return Counter((row["step"], frozenset(row)) for row in rows)

    logged = numbers(run)
    assert keys(logged) == keys(records(run)) and max(keys(logged).values()) == 1
    # JSON of W&B writes 1.0 as 1.
    assert [json.loads(row) for row in plain(logged)] == [
        json.loads(row) for row in plain(records(run))
    ]


def stand_ins(folder: Path, trackers: str, *flags: str, **environment: str):
    names = [words.split()[0] for words in trackers.split(",")]
    return fork(["--run_dir", str(folder), "--log.trackers", f"[{', '.join(names)}]", *SHORT,
                 *flags], script="tests/fake_trackers.py", TRACKERS=trackers, **environment)


def test_a_run_is_in_wandb_as_it_is_in_its_folder(tmp_path, bare):
    named = ["--log.project", "digits", "--log.name", "first", "--log.group", "sizes",
             "--log.job_type", "train", "--log.tags", "[small, quick]", "--log.notes", "a note",
             "--log.upload_model", "--log.histograms", "20 steps"]
    run = tmp_path / "run"
    result = fork(["--run_dir", str(run), *SHORT, *named], XDG_DATA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert_same_run(bare, run)
    items = contents(run)
    [described] = of_type(items, "run")
    given = {"project": "digits", "display_name": "first", "run_group": "sizes",
             "job_type": "train", "tags": ["small", "quick"], "notes": "a note"}
    assert {name: described.get(name) for name in given} == given
    assert described["run_id"] == json.loads((run / "wandb_run.json").read_text())["id"]
    stored = {name: value for item in of_type(items, "config")
              for name, value in item["update"].items() if not name.startswith("_wandb")}
    assert stored.pop("environment") == json.loads((run / "environment.json").read_text())
    assert stored == yaml.safe_load((run / "config.yaml").read_text())
    metrics = of_type(items, "metric")
    assert any(m.get("glob_name") == "*" and m["step_metric"] == "step" for m in metrics)

    logged = numbers(run)
    assert [row["step"] for row in logged] == [record["step"] for record in records(run)]
    for row, record in zip(logged, records(run), strict=True):
        assert row == pytest.approx(record, rel=0, abs=0)
    pictured = [row for row in history(run) if any("gradients/" in key for key in row)]
    assert [row["step"] for row in pictured] == [20, 40, 60]
    assert any(key.startswith("parameters/1.weight") for key in pictured[0])

    last = summary(run)
    evaluations = [record for record in records(run) if "eval/accuracy" in record]
    best = max(evaluations, key=lambda record: record["eval/accuracy"])  # the first of equals
    assert last["best/step"] == best["step"]
    assert last["best/eval/accuracy"] == best["eval/accuracy"]
    assert last["best/eval/loss"] == best["eval/loss"]
    assert last["eval/loss"] == evaluations[-1]["eval/loss"]
    models = [item for item in of_type(items, "artifact") if item["type"] == "model"]
    assert [set(model["aliases"]) for model in models] == [{"final", "latest"}, {"best", "latest"}]
    assert all(model["name"] == "first-model" for model in models)
    assert str(best["eval/accuracy"])[:8] in json.dumps(models[1])
    assert [item["exit_code"] for item in of_type(items, "exit")] == [0]
    environment = json.dumps(of_type(items, "environment"))
    assert '"git"' not in environment
    assert not list(run.glob("wandb/*run-*/files/*.py"))


def test_what_is_seen_of_a_run_is_in_wandb_too(tmp_path):
    run = tmp_path / "run"
    flags = ["--loop.duration", "60 steps", "--optim.lr", "auto", "--log.examples", "5"]
    result = fork(["--run_dir", str(run), *flags], XDG_DATA_HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    seen = {key.removesuffix("._type") for row in history(run) for key in row
            if key.endswith("._type") and row["step"] == 60}
    assert {"curves", "confusion_matrix", "lr_find", "per_class", "predictions/digit"} <= seen
    tables = [json.loads(file.read_text())
              for file in run.glob("wandb/*run-*/files/media/table/**/*.table.json")]
    by_columns = {tuple(table["columns"]): table["data"] for table in tables}
    evaluation = json.loads((run / "best" / "evaluation.json").read_text())["digit"]
    confusion = by_columns["Actual", "Predicted", "nPredictions"]
    assert {(true, said): count for true, said, count in confusion} == {
        (str(true), str(said)): count for true, row in enumerate(evaluation["confusion"])
        for said, count in enumerate(row)}
    sweep = json.loads((run / "lr_find.json").read_text())
    assert [row[:2] for row in by_columns["lr", "loss", "curve"]] == [
        pytest.approx(pair) for pair in zip(sweep["lrs"], sweep["losses"], strict=True)]
    [classes] = [rows for columns, rows in by_columns.items() if "recall" in columns]
    assert len(classes) == 10 and classes[3][1] == "3"
    [examples] = [rows for columns, rows in by_columns.items() if columns[0] == "image"]
    kept = json.loads((run / "examples" / "examples.json").read_text())
    assert [row[1:5] for row in examples] == [
        [entry[name] for name in ("target", "prediction", "confidence", "loss")] for entry in kept]
    sent = [entry["path"] for artifact in of_type(contents(run), "artifact")
            for entry in artifact["manifest"]["contents"]]
    assert len({path for path in sent if path.endswith(".png")}) == len(
        {(run / "examples" / entry["image"]).read_bytes() for entry in kept}) > 5


def test_classes_columns_and_labels_of_several_tasks_stand_in_one_table(tmp_path):
    run = tmp_path / "run"
    result = fork(["--recipe", "recipes/digits_multitask.yaml", "--run_dir", str(run),
                   "--loop.duration", "20 steps", "--loop.eval_every", "10 steps"],
                  XDG_DATA_HOME=str(tmp_path))
    assert result.returncode == 0 and "tracker:" not in result.stdout, result.stdout
    seen = {key.removesuffix("._type") for row in history(run) for key in row}
    assert {"per_class", "predictions/digit", "predictions/ink", "predictions/quadrants"} <= seen
    assert [item["exit_code"] for item in of_type(contents(run), "exit")] == [0]


def test_a_table_that_a_tracker_does_not_take_costs_only_itself(tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    said: list[str] = []
    trackers = Trackers(Accelerator(cpu=True), tmp_path, LogOptions(), "{a: 1}", 0)
    trackers.start(said.append)
    trackers.table("mixed", ["column"], [[1.0], ["a text"]])
    trackers.table("whole", ["column"], [[1.0], [2.0]])
    trackers.log({"step": 5, "epoch": 0.5, "train/loss": 1.0})
    trackers.close(0)
    lines = [line for line in said if line.startswith("tracker:")]
    assert len(lines) == 1 and lines[0].startswith("tracker: wandb does not take mixed (")
    assert any("whole._type" in row for row in history(tmp_path))
    assert numbers(tmp_path)[-1]["train/loss"] == 1 and of_type(contents(tmp_path), "exit")


def test_the_newest_session_tells_what_is_there_whatever_its_mode(tmp_path, monkeypatch):
    from trainlib.trackers import weights_and_biases

    for name in ("run-20261124_010000-abc", "offline-run-20261124_020000-abc",
                 "offline-run-20261124_030000-abc"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
        (tmp_path / "wandb" / name / "run-abc.wandb").touch()
    found = {"01": [{"step": 16, "a": 1}], "03": [],
             "02": [{"step": 39, "a": 1}, {"step": 40, "a": 1},
                    {"step": 40, "confusion/digit_table._type": "table-file"}]}
    monkeypatch.setattr(weights_and_biases, "_history",
                        lambda file: found[file.parent.name.split("_")[1][:2]])
    last, keys = weights_and_biases._last_written(tmp_path, "abc")
    assert last == 40 and {"a", "confusion/digit"} <= keys


@pytest.mark.parametrize("pause", ["0", "8"], ids=["killed at once", "killed after a while"])
def test_a_killed_and_continued_run_has_every_step_once(tmp_path, bare, pause):
    """W&B's process keeps records for a second and dies with the run: on an idle machine those of
    the killed session are lost in one case, and are there beyond the checkpoint in the other.
    Killed at once it may have been either, so there only what comes of it is asserted. The service
    of the tests' own process, which its children would inherit, must not be used: it outlives them.
    """
    wandb.setup()
    assert os.environ["WANDB_SERVICE"]
    run = tmp_path / "run"
    for step in (6, 37, 52):  # before the first checkpoint, and twice after one
        killed = fork(["--run_dir", str(run), *SHORT], script="tests/struck_train.py",
                      STRIKE=f"SIGKILL step {step}", PAUSE=pause)
        assert killed.returncode == -9, killed.stderr
        if pause != "0":  # eight times as long as W&B's process keeps records
            assert max(row["step"] for row in history(run)) >= step - 2
    result = fork(["--run_dir", str(run), *SHORT])
    assert result.returncode == 0, result.stderr
    assert_same_run(bare, run)
    assert_every_record_once(run)
    assert len(list(run.glob("wandb/*run-*"))) == 4
    runs = of_type(contents(run), "run")
    assert len({item["run_id"] for item in runs}) == 1 and all(item["resume"] for item in runs)
    assert summary(run)["best/step"] <= 60


def test_a_stopped_run_is_marked_as_preempted_and_goes_on(tmp_path, bare):
    run = tmp_path / "run"
    stopped = fork(["--run_dir", str(run), *SHORT], script="tests/struck_train.py",
                   STRIKE="SIGTERM step 30")
    assert stopped.returncode == 75, stopped.stderr
    items = contents(run)
    assert [item["exit_code"] for item in of_type(items, "exit")] == [75]
    assert any(item["type"] == "preempting" for item in items)
    assert fork(["--run_dir", str(run), *SHORT]).returncode == 0
    assert_same_run(bare, run)
    assert_every_record_once(run)


def test_a_tracker_that_is_added_later_gets_what_it_missed(tmp_path, bare):
    run = tmp_path / "run"
    fork(["--run_dir", str(run), *SHORT, "--log.trackers", "[]"], script="tests/struck_train.py",
         STRIKE="SIGKILL step 50")
    assert fork(["--run_dir", str(run), *SHORT]).returncode == 0
    assert_same_run(bare, run)
    assert_every_record_once(run)


class Server:
    """What a resumed online run knows of itself."""

    def __init__(self, step: int | None):
        self.resumed, self.summary = step is not None, {"step": step}
        self.offline, self.config = False, {}
        self.tracker = self

    def define_metric(self, *_, **__):
        pass


@pytest.mark.parametrize("known", [None, 0, 4, 9])
def test_online_the_server_says_what_reached_it(tmp_path, monkeypatch, known):
    """Not tried with a real server: none can be reached from here."""
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_API_KEY", "CANARY" * 7)
    tracker = WeightsAndBiases(tmp_path, LogOptions(), 6)
    assert tracker.settings()["id"] == WeightsAndBiases(tmp_path, LogOptions(), 0).settings()["id"]
    tracker._last_known, tracker._last_keys = 9, {"step", "epoch", "train/loss"}
    tracker.started(Server(known))
    for step in range(12):
        training = {"step": step, "epoch": 0.0, "train/loss": 1.0}
        evaluation = {"step": step, "epoch": 0.0, "eval/loss": 1.0}
        assert tracker.has(training) == (known is not None and step <= known)
        assert tracker.has(evaluation) == (known is not None and step < known)


@pytest.mark.parametrize("trackers, said", [
    ("wandb start", "tracker: wandb not started (no such server"),
    ("wandb log", "tracker: stopped: wandb (no such server"),
    ("wandb finish", "tracker: could not finish: wandb (no such server"),
    ("wandb hang start", "tracker: wandb not started (no answer within 2 s)"),
    ("wandb hang finish", "tracker: could not finish: wandb (no answer within 2 s)"),
])
def test_a_tracker_that_fails_or_hangs_changes_no_bit_and_one_line_says_so(
    tmp_path, bare, trackers, said
):
    run = tmp_path / "run"
    result = stand_ins(run, trackers)
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith("tracker:")]
    assert line.startswith(said) and "CANARY" not in result.stdout + result.stderr
    assert_same_run(bare, run)
    assert json.loads((run / "exit.json").read_text())["code"] == 0


STOPPED = """
import os, signal, sys
sys.path.insert(0, {root!r})
import train
from trainlib import data, runtime
from trainlib.trackers import mirror

mirror._FINISH_SECONDS = 3
take = data.Reader.take

def stopping(self, step):
    if step == 20:
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{{pid}}/stat") as stat, open(f"/proc/{{pid}}/cmdline") as words:
                    parent, command = int(stat.read().rsplit(")", 1)[1].split()[1]), words.read()
            except OSError:
                continue
            if parent == os.getpid() and "wandb-core" in command:
                with open(sys.argv[2] + ".pid", "w") as file:
                    file.write(pid)
                os.kill(int(pid), signal.SIGSTOP)
    return take(self, step)

data.Reader.take = stopping
runtime.run(train.main)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_the_process_ends_though_wandbs_hangs(tmp_path, bare):
    """As on a dead disk: W&B's own exit handler would wait for its process without end."""
    script, run = tmp_path / "stopped.py", tmp_path / "run"
    script.write_text(STOPPED.format(root=str(ROOT)))
    said = tmp_path / "said.txt"
    try:
        with said.open("w") as file:  # a pipe would stay open in W&B's process
            code = subprocess.run(
                [sys.executable, str(script), "--run_dir", str(run), *SHORT, "--log.report",
                 "false"], cwd=ROOT, stdout=file, stderr=file, timeout=120).returncode
        assert code == 0, said.read_text()
        assert "tracker: could not finish: wandb (no answer within 3 s)" in said.read_text()
        assert_same_run(bare, run)
    finally:
        os.kill(int((tmp_path / "run.pid").read_text()), signal.SIGKILL)


def test_each_of_several_trackers_gets_every_record_and_fails_alone(tmp_path, bare):
    run = tmp_path / "run"
    result = stand_ins(run, "tensorboard,wandb log,trackio")
    assert result.returncode == 0, result.stderr
    lines = [line for line in result.stdout.splitlines() if line.startswith("tracker:")]
    assert len(lines) == 1 and "wandb" in lines[0]
    assert_same_run(bare, run)
    for name in ("tensorboard", "trackio"):
        written = (tmp_path / f"run.{name}.jsonl").read_text().splitlines()
        written = [json.loads(line) for line in written]
        assert [line["point"] for line in (written[0], written[-1])] == ["start", "finish"]
        logged = [line for line in written if line["point"] == "log" and "epoch" in line["values"]]
        assert [(line["at"], float(line["values"].get("train/loss", 0))) for line in logged] == [
            (record["step"], record.get("train/loss", 0)) for record in records(run)
        ]


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    import accelerate.tracking
    from accelerate import Accelerator

    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    said: list[str] = []
    options = LogOptions(trackers=["wandb", "trackio", "tensorboard", "wandb"])
    trackers = Trackers(Accelerator(cpu=True), tmp_path, options, "{}", 0)
    trackers.start(said.append)
    assert not trackers and [line.split()[1] for line in said] == options.trackers[:3]
    assert all("is not installed" in line for line in said)


def test_a_server_that_does_not_answer_costs_a_while_and_the_run_is_logged_offline(tmp_path):
    result = fork(["--run_dir", str(tmp_path / "run"), *SHORT], WANDB_MODE=None,
                  WANDB_API_KEY="CANARY" * 7, WANDB_BASE_URL="http://127.0.0.1:9")
    assert result.returncode == 0, result.stderr
    [line] = [line for line in result.stdout.splitlines() if line.startswith(("wandb", "tracker"))]
    assert "not started" in line and "wandb sync" in line and "wandb leet" in line
    assert_every_record_once(tmp_path / "run")
    assert holding(b"CANARY", tmp_path) == []


def test_pictures_tables_and_artifacts_arrive(tmp_path, monkeypatch):
    from accelerate import Accelerator

    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    Image.new("RGB", (4, 3)).save(tmp_path / "curves.png")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("1")
    said: list[str] = []
    trackers = Trackers(Accelerator(cpu=True), tmp_path, LogOptions(), "{a: 1}", 0)
    trackers.start(said.append)
    trackers.log({"step": 5, "epoch": 0.5, "train/loss": None})
    trackers.images({"curves": tmp_path / "curves.png"})
    trackers.table("mistakes", ["image", "target", "confidence"],
                   [[tmp_path / "curves.png", "7", 0.5], [tmp_path / "curves.png", "8", 0.25]])
    trackers.artifact("my run", tmp_path / "model", ["final"], {"step": 5})
    trackers.summary({"best/step": 5})
    trackers.close(0)
    assert len(said) == 1 and "is logged offline" in said[0]
    loss, picture, table = history(tmp_path)
    assert loss["train/loss"] == "NaN" and picture["step"] == table["step"] == 5
    assert "curves" in json.dumps(picture) and "mistakes" in json.dumps(table)
    media = {file.suffix for file in tmp_path.glob("wandb/*run-*/files/media/**/*.*")}
    assert media == {".png", ".json"}
    [uploaded] = [a for a in of_type(contents(tmp_path), "artifact") if a["type"] == "model"]
    assert uploaded["name"] == "my-run"


def test_histograms_are_those_of_the_gradients_that_the_optimizer_gets():
    module = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    taken = Histograms(module, optimizer, 2, 5, lambda: step)
    for step in range(5):
        torch.nn.init.ones_(module.bias)
        module.weight.grad, module.bias.grad = torch.randn(2, 3), torch.tensor([1.0, torch.nan])
        gradient, before = module.weight.grad.clone(), module.weight.detach().clone()
        optimizer.step()
        found = taken.pop(step + 1)
        if step + 1 not in (2, 4, 5):
            assert found == {}
            continue
        assert set(found) == {"parameters/weight", "parameters/bias", "gradients/weight"}
        for name, values in (("gradients/weight", gradient), ("parameters/weight", before)):
            counts, edges = np.histogram(values.double().numpy(), bins=64)
            assert np.array_equal(found[name][0], counts)
            assert np.array_equal(found[name][1], edges)
    assert taken.pop(5) == {}


def holding(word: bytes, folder: Path) -> list[Path]:
    """The files under a folder in which a word stands."""
    return [file for file in folder.rglob("*") if file.is_file() and word in file.read_bytes()]


def test_no_secret_of_the_environment_reaches_a_file(tmp_path):
    secret = "CANARY-7f3a9c5e"
    names = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET", "DATABASE_PASSWORD", "MY_KEY",
             "SLURM_JWT", "SLURM_REST_TOKEN")
    environment = {name: f"{secret}-{name}" for name in names}
    environment |= {"HTTPS_PROXY": f"http://user:{secret}@127.0.0.1:9", "HOME": str(tmp_path),
                    "SLURM_JOB_ID": "5"}
    run = tmp_path / "run"
    overridden = ["--data.source", f"https://u:{secret}@h/x.csv", "--data.source", "builtin:digits"]
    result = fork(["--run_dir", str(run), *SHORT, "--log.upload_model", *overridden],
                  XDG_DATA_HOME=str(tmp_path), **environment)
    assert result.returncode == 0 and secret not in result.stdout + result.stderr
    assert len(list(run.glob("wandb/*run-*/**/*"))) > 3
    assert holding(secret.encode(), tmp_path) == []


SECRETS = [
    ["--model.args.api_key", "CANARY"], ["--model.args.password=CANARY"],
    ["--data.source", "https://user:CANARY@host/data.csv"],
    ["--data.source", "https://CANARY@host/data.csv"],
    ["--data.source", "https://host/data.csv?access_token=CANARY"],
    ["--log.notes", "the token is CANARY-of-mine"],
    ["--log.tags", "[x, 's3://key:CANARY@bucket/x']"], ["--model.args.apiKey", "CANARY"],
    ["--model.args.passwd", "CANARY"], ["--model.args.api_key", "<CANARY>"],
    ["--data.source", "https://host/x?sig=CANARY&sv=1"],
    ["--data.source", "https://host/x?AWSAccessKeyId=CANARY"],
    ["--data.source", "https://host/x#access_token=CANARY"],
    ["--data.source", "https://user:CAN@ARY@host/data.csv"],
]


@pytest.mark.parametrize("flags", SECRETS, ids=[" ".join(flags) for flags in SECRETS])
def test_an_option_that_holds_a_secret_is_refused_without_repeating_it(
    tmp_path, monkeypatch, flags
):
    import train as script

    monkeypatch.setenv("MY_TOKEN", "CANARY-of-mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(config.UserError) as caught:
        script.main(["--log.trackers", "[]", *flags])
    lines = [line for line in str(caught.value).splitlines() if "would pass on" in line]
    option = flags[0].removeprefix("--").partition("=")[0]
    assert len(lines) == 1 and lines[0].startswith(f"{option}: ")
    assert "CANARY" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [
    {"model": {"args": {"pad_token": "<pad>", "mask_token": "[MASK]", "api_key": None}}},
    {"data": {"source": "https://host:8080/a.csv?page=3", "token_range": "5"}},
    {"log": {"notes": "mail me@host.org: a/b@c", "name": "key"}},
    {"data": {"source": "ssh://git@host/data", "keys": ["x"]}},
    {"data": {"source": "https://host/x?page_token=3&key=sheet1"}},
    {"data": {"source": "https://host:80/path@2x.png?q=a@b"}},
    {"model": {"args": {"sort_key": "name", "label_key": "y", "unk_token": "unk", "monkey": "x",
                        "sep_token": "\n", "pad_token": 0, "max_tokens": 12345678}}},
])
def test_what_is_no_secret_is_left_alone(options):
    assert credentials.mistakes(options) == []


def test_a_secret_that_yaml_reads_as_a_number_is_one(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "1234567890123")
    [line] = credentials.mistakes({"log": {"notes": 1234567890123, "every": 123}})
    assert line.startswith("log.notes: ") and "$MY_TOKEN" in line and "123456" not in line
    [line] = credentials.mistakes({"model": {"args": {"api_key": 12345678, "size": 12345678}}})
    assert line.startswith("model.args.api_key: ")


def test_the_file_that_holds_a_secret_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("REPO_KEY", str(tmp_path))
    assert credentials.mistakes({"data": {"source": f"{tmp_path}/train.csv"}}) == []


def test_texts_lose_their_secrets(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "abcdefgh1234")
    monkeypatch.setenv("SHORT_KEY", "abc")
    monkeypatch.setenv("DB_PASSWORD", "password")
    assert credentials.redact("https://h/x?password=CANARY") == "https://h/x?***=***"
    text = "GET http://me:pw@host/x?api_key=5&page=2 with abcdefgh1234; abc"
    assert credentials.redact(text) == "GET http://***@host/x?api_key=***&page=2 with ***; abc"


def test_the_sweep_gives_flags_that_the_script_takes():
    from wandb.sdk.launch.sweeps import utils

    sweep = yaml.safe_load((ROOT / "recipes" / "sweep.yaml").read_text())
    assert (ROOT / sweep["program"]).exists() and sweep["method"] in ("bayes", "random", "grid")
    assert sweep["metric"]["name"] == "best/eval/accuracy"
    options = []
    for end in (0, -1):
        drawn = {}
        for name, described in sweep["parameters"].items():
            values = described.get("values") or [described["min"], described["max"]]
            drawn[name] = {"value": values[end]}
        filled = {"${args}": utils.create_sweep_command_args({"args": drawn})["args"]}
        filled |= {"${env}": ["/usr/bin/env"], "${interpreter}": ["echo"],
                   "${program}": [sweep["program"]]}
        command = [word for part in sweep["command"] for word in filled.get(part, [part])]
        echoed = subprocess.run(
            command, env=os.environ | {"WANDB_RUN_ID": "id 1"}, capture_output=True, text=True,
            check=True, cwd=ROOT,
        ).stdout.strip()
        assert echoed.endswith("--run_dir runs/sweep/id 1")
        script, *flags = command[command.index(sweep["program"]):]
        options.append(config.read(TrainOptions, flags, ""))
    for name in sweep["parameters"]:
        first, second = (config.flatten(one.model_dump())[name] for one in options)
        assert first != second, name


def test_tensorboard_has_every_record_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, flags = tmp_path / "run", [*SHORT, "--log.trackers", "[tensorboard]",
                                    "--log.histograms", "20 steps"]
    fork(["--run_dir", str(run), *flags], script="tests/struck_train.py",
         STRIKE="SIGKILL step 37")
    result = fork(["--run_dir", str(run), *flags])
    assert result.returncode == 0 and "tracker:" not in result.stdout, result.stdout + result.stderr
    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0}).Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(record["step"], float(np.float32(record["train/loss"])))
                      for record in records(run) if "train/loss" in record]
    assert len(events.Tags()["histograms"]) > 4


def test_trackio_has_every_record_once_after_a_stop(tmp_path, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    run, flags = tmp_path / "run", [*SHORT, "--log.trackers", "[trackio]",
                                    "--log.histograms", "20 steps"]
    fork(["--run_dir", str(run), *flags], script="tests/struck_train.py",
         STRIKE="SIGTERM step 37", **environment)
    result = fork(["--run_dir", str(run), *flags], **environment)
    assert result.returncode == 0 and "tracker:" not in result.stdout, result.stdout + result.stderr
    code = ("import json; from trackio.sqlite_storage import SQLiteStorage as s; "
            "print(json.dumps(s.get_logs('one-curve', 'run'), default=str))")
    logged = subprocess.run([sys.executable, "-c", code], env=os.environ | environment,
                            capture_output=True, text=True, check=True).stdout.splitlines()[-1]
    losses = [(row["step"], row["train/loss"]) for row in json.loads(logged) if "train/loss" in row]
    assert losses == [(record["step"], record["train/loss"]) for record in records(run)
                      if "train/loss" in record]
