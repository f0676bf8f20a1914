"""The terminal: a bar that fits, rows that stand under one another, and who says what."""

import json
import math
import re
from pathlib import Path

import pytest
from launching import ROOT, assert_same_run, train
from pseudo_terminal import run_on_terminal, screen
from tqdm import tqdm
from warm import fork

from trainlib.terminal.bar import layout
from trainlib.terminal.progress import RunProgress
from trainlib.terminal.table import METRIC_WIDTH, Table, duration, metric

SHORT = ["--batch.micro_size", "16", "--loop.duration", "60 steps", "--loop.eval_every", "20 steps",
         "--log.every", "2", "--log.trackers", "[]", "--log.report", "false"]
FIELDS = ["loss 0.1234", "accuracy 0.9870", "ETA 5h04m", "12,345 samples/s", "0.61 GiB"]


@pytest.mark.parametrize("total", [7, 1348, 10**7])
def test_the_bar_fits_every_width_and_the_last_fields_go_first(total):
    former = 0
    for width in range(1, 160):
        bar_format = layout(total // 3, total, FIELDS, width)
        line = tqdm.format_meter(total // 3, total, 1.0, ncols=width, bar_format=bar_format)
        assert len(line) <= width
        kept = [field in line for field in FIELDS]
        assert kept == sorted(kept, reverse=True) and sum(kept) >= former
        former = sum(kept)
    assert former == len(FIELDS) and f"{total // 3}/{total}" in line


@pytest.mark.parametrize("names", [["eval/loss"], ["eval/loss", "eval/a/x", "eval/bcdefghijk/f1"],
                                   [f"eval/task{number}/accuracy" for number in range(9)]])
def test_every_cell_ends_below_its_column_name(names):
    numbers = dict.fromkeys(names, METRIC_WIDTH)
    table = Table({"step": 4, **numbers, "ETA": 5, "best": 4}, names, ["ETA"])
    values = [[0.5, 123.4567, 12345.678, 1.5e-7, math.nan, 0.0, 1e30, 999999.9, -0.5]] * 70
    texts = [table.row({"step": "7", "best": "best"} | dict(zip(names, map(metric, row),
             strict=False)), number == 3) for number, row in enumerate(values)]
    *above, last = texts[0].splitlines()[:-1]
    assert [number for number, text in enumerate(texts) if "\n" in text] == [0, 3, 33, 63]
    ends = [match.end() for match in re.finditer(r"\S+", last)]
    for text in texts:
        row = text.splitlines()[-1]
        assert [match.end() for match in re.finditer(r"\S+", row)][: len(names) + 1] == (
            ends[: len(names) + 1])
    heads = [" ".join(line[:end].split()[-1] for line in [*above, last]
                      if line[end - 1: end].strip()) for end in ends]
    assert heads[1: len(names) + 1] in (names, [name.replace("/", " ") for name in names])
    if len(names) == 1:
        assert len(last) <= 80 and "ETA" in last


@pytest.mark.parametrize("seconds, text", [
    (0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3600, "1h00m"), (359999, "99h59m"),
    (360000, "4d"), (math.nan, "?"),
])
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text


class Clock:
    """A run that is told how long everything takes."""

    def __init__(self, **options):
        self.now = 100.0
        options = {"total_steps": 50, "first_step": 0, "eval_every": 8,
                   "every": (0, 30.0)} | options
        self.total_steps, self.eval_every = options["total_steps"], options["eval_every"]
        self.progress = RunProgress(
            samples_per_step=64, epochs_per_step=0.1,
            shown=["eval/loss"], monitor="eval/accuracy", peak_gib=lambda: 0.5,
            clock=lambda: self.now, **options)

    def run(self, step, step_seconds, eval_seconds):
        """One step and what follows; the time left, as the progress sees it."""
        self.now += step_seconds
        self.progress.step(step, 1.0, True)
        if step % self.eval_every == 0 or step == self.total_steps:
            self.now += eval_seconds
            metrics = {"eval/loss": 0.5, "eval/accuracy": 0.25}
            self.progress.evaluation(step, metrics, False, eval_seconds)
        return self.progress.seconds_left(step)


@pytest.mark.parametrize("first_step", [0, 20])
def test_the_time_left_counts_evaluations_as_what_they_cost(first_step):
    clock = Clock(first_step=first_step)
    left = {step: clock.run(step, 2.0, 30.0) for step in range(first_step + 1, 51)}
    for step in range(first_step + 9, 51):
        evaluations = [at for at in (*range(8, 50, 8), 50) if at > step]
        assert left[step] == pytest.approx((50 - step) * 2 + len(evaluations) * 30)
    assert math.isnan(left[first_step + 1])


@pytest.mark.parametrize("every, wanted", [
    ((0, 30.0), [1, 14, 21, 30]),  # 13 steps are the first that last 30 s
    ((7, None), [7, 14, 21, 28, 30]),
])
def test_lines_come_at_their_interval_and_never_beside_an_evaluation(every, wanted, capsys):
    clock = Clock(every=every, total_steps=30, eval_every=21)
    for step in range(1, 31):
        clock.run(step, 2.4, 1.0)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    steps = [int(row[0]) for row in rows if row[0].isdigit()]
    assert steps == wanted
    assert sum(row[0] == "step" for row in rows) == 1


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without a terminal."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    return train(folder, *SHORT, "--log.print_every", "7 steps")


@pytest.mark.parametrize("columns", [20, 80, 120])
def test_on_a_terminal_a_bar_stays_below_the_lines(tmp_path, plain, columns):
    run = tmp_path / "run"
    stopped = fork(["--run_dir", str(run), *SHORT], script="tests/struck_train.py",
                   STRIKE="SIGTERM step 30")
    assert stopped.returncode == 75
    code, written = run_on_terminal(["--run_dir", str(run), *SHORT], columns, NO_COLOR="1")
    assert code == 0 and "\x1b" not in written
    assert_same_run(plain, run)
    drawn = [text for text in re.split("[\r\n]", written) if re.match(r" ?\d+%", text)]
    assert drawn[0].startswith(" 52%")  # the step that the signal met was finished
    assert max(map(len, drawn)) < columns
    lines = screen(written, columns)
    [bar] = [line for line in lines if re.match(r" ?\d+%", line)]
    assert bar.startswith("100%")
    if columns >= 80:
        assert "GiB" in bar and "samples/s" in bar and "ETA 0:00" in bar and "accuracy" in bar
        rows = [line.split()[0] for line in lines if re.match(r" *(step|\d+)  ", line)]
        assert rows[:3] == ["step", "40", "60"]


def test_where_no_line_can_be_written_over_there_are_plain_ones(tmp_path, plain):
    run = tmp_path / "run"
    code, written = run_on_terminal(
        ["--run_dir", str(run), *SHORT, "--log.print_every", "7 steps"], 80, TERM="dumb")
    assert code == 0 and "\r" not in written.replace("\r\n", "") and "\x1b" not in written
    assert_same_run(plain, run)
    piped = fork(["--run_dir", str(tmp_path / "piped"), *SHORT, "--log.print_every", "7 steps"])
    for text in (written, piped.stdout):
        steps = re.findall(r"^ *(\d+)  +\d+\.\d\d  ", text, re.MULTILINE)
        assert steps == ["7", "14", "20", "21", "28", "35", "40", "42", "49", "56", "60"]
    assert "|" not in piped.stdout + piped.stderr


SECRET = "CANARY-7f3a9c5e"
SAID = {  # by tests/noisy_train.py in two steps, and how often it is to be seen
    "UserWarning: one warning ***": 1, "UserWarning: two lines": 2, "of step 10 ***": 1,
    "of step 20 ***": 1, "a record of level warning ***": 1, "an error ***": 2,
    "WARNING: quiet: a record without a handler ***": 1, "printed ***": 2,
    "printed in pieces ***": 2, "ZeroDivisionError: division by zero": 2,
}


def noisy(run, processes, **more):
    return {"arguments": ["--run_dir", str(run), *SHORT], "script": "tests/noisy_train.py",
            "processes": processes, "MY_TOKEN": SECRET, **more}


def holding(word: bytes, folder: Path) -> list[Path]:
    """The files under a folder in which a word stands."""
    return [file for file in folder.rglob("*") if file.is_file() and word in file.read_bytes()]


def assert_said_by_each(lines, processes):
    for rank in range(processes):
        mark = f"[rank {rank}] " if rank else ""
        for text, times in SAID.items():
            assert sum(line.startswith(mark + text) for line in lines) == times, (rank, text)
    assert not any(SECRET in line for line in lines)


def test_lines_of_other_processes_carry_their_rank_and_no_secret(tmp_path, plain):
    run = tmp_path / "run"
    result = fork(**noisy(run, 2))
    assert json.loads((run / "exit.json").read_text())["code"] == 0, result.stderr
    assert_same_run(plain, run)
    streams = [text.splitlines() for text in (result.stdout, result.stderr)]
    assert_said_by_each(streams[0] + streams[1], 2)
    assert not any("printed" in line for line in streams[1])
    log = (run / "log.txt").read_text().splitlines()
    assert_said_by_each(log, 2)
    assert sorted(log[1:]) == sorted(streams[0] + streams[1])  # whoever was first
    assert log[0].startswith("---- ") and log[0].endswith("--log.report false")


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_tells_its_rank_and_no_secret(tmp_path, failing):
    run = tmp_path / "run"
    result = fork(**noisy(run, 2, FAIL_RANK=str(failing)))
    assert result.returncode == 1
    mark = "[rank 1] " if failing else ""
    for text in (result.stderr, (run / "log.txt").read_text()):
        start = text.index(f"{mark}Traceback (most recent call last):\n{mark}  File \"{ROOT}")
        traceback = text[start:].splitlines()
        last = traceback.index(f"{mark}RuntimeError: a fault at http://***@host")
        assert all(line.startswith(mark) for line in traceback[:last])  # no other's lines between
        assert SECRET not in text
    assert holding(SECRET.encode(), tmp_path) == []


def test_lines_of_all_processes_stand_above_the_bar(tmp_path):
    code, written = run_on_terminal(columns=80, **noisy(tmp_path / "run", 2))
    assert code == 0
    lines = screen(written, 80)
    assert_said_by_each(lines, 2)
    [bar] = [line for line in lines if "%|" in line.replace(" ", "")]
    assert bar.startswith("100%")
    rows = [line for line in lines if re.match(r" *(20|40|60)  ", line)]
    assert len(rows) == 3


def test_a_resumed_run_adds_to_its_log(tmp_path):
    run = tmp_path / "run"
    fork(["--run_dir", str(run), *SHORT], script="tests/struck_train.py", STRIKE="SIGKILL step 30")
    first = (run / "log.txt").read_text()
    assert re.search(r"^ *20  ", first, re.MULTILINE)  # though the process was killed
    assert fork(["--run_dir", str(run), *SHORT]).returncode == 0
    whole = (run / "log.txt").read_text()
    assert whole.startswith(first) and whole.count("----") == 2


def test_at_its_end_a_run_says_where_everything_is_and_what_comes_next(tmp_path):
    flags = ["--run_dir", str(tmp_path / "run"), *SHORT]

    def ends(*others, **more):
        result = fork([*flags, *others], **more)
        folder, _, names = re.search(r"^in (.*?)(: )(.*)$", result.stdout, re.MULTILINE).groups()
        assert folder == flags[1] and all((Path(folder) / name).exists() for name in
                                          names.split(", "))
        assert result.stdout.count("\nin ") == 1
        return result.returncode, names.split(", "), result.stdout

    code, names, said = ends(script="tests/noisy_train.py", FAIL_RANK="0")
    assert code == 1 and "same command again starts over" in said
    code, names, said = ends(script="tests/struck_train.py", STRIKE="SIGTERM step 30")
    assert code == 75 and "same command again goes on" in said and names[0].endswith("00000031/")
    (tmp_path / "run" / "wandb" / "offline-run-1").mkdir(parents=True)
    code, names, said = ends("--log.report", "true")
    assert f"wandb sync {flags[1]}/wandb/offline-run-*" in said
    assert code == 0 and {"best/", "final/", "curves.png", "log.txt"} <= set(names)
    assert "python -m trainlib.plots" in said and "load_model" in said


def test_a_sweep_is_shown_too(tmp_path):
    flags = ["--sweep.steps", "40", "--sweep.verify", "5 steps"]
    code, written = run_on_terminal(["--run_dir", str(tmp_path / "sweep"), *flags], 80,
                                    script="lr_find.py")
    assert code == 0
    assert re.search(r"\d/40 \|.*\| sweep  lr .*  loss ", written)
    lines = screen(written, 80)
    assert sum(bool(re.match(r"100%  5/5 .* a run at", line)) for line in lines) >= 4
    assert any(line.startswith("lr_find: ") for line in lines)
    code, written = run_on_terminal(["--run_dir", str(tmp_path / "run"), *SHORT, "--optim.lr",
                                     "auto"], 80)
    assert code == 0 and re.search(r"  0%.* sweep \d+/100  lr ", written)
    assert sum("%|" in line.replace(" ", "") for line in screen(written, 80)) == 1
