"""report.html: one page, nothing asked of a network, everything of the run folder on it."""

import base64
import json
import shutil
import subprocess
import threading
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml
from launching import train

from trainlib import plots
from trainlib.plots.report import write_report

HOSTILE = '<script>fetch("http://127.0.0.1:9/x")</script> & "quoted" \'too\''


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run that was continued once."""
    folder = tmp_path_factory.mktemp("report") / "run"
    flags = ["--loop.eval_every", "10 steps", "--log.report", "true"]
    train(folder, "--loop.duration", "20 steps", *flags)
    return train(folder, "--loop.duration", "30 steps", *flags)


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def page(run: Path) -> Page:
    return Page((run / "report.html").read_text())


def test_the_page_shows_the_run_and_refers_to_nothing_outside(run):
    found = page(run)
    text = " ".join(found.words)
    for heading in ("Metrics of the validation split", "Curves", "Predictions in detail",
                    "Worst predictions", "Samples drawn at random", "Starts and times", "Machine",
                    "Options"):
        assert heading in found.words
    sources = [attrs["src"] for tag, attrs in found.tags if tag == "img"]
    pictures = {base64.b64decode(source.removeprefix("data:image/png;base64,"))
                for source in sources}
    files = [run / "curves.png", run / "confusion_matrix.png", *run.glob("examples/*.png")]
    assert {file.read_bytes() for file in files} == pictures
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "a", "iframe", "object", "base"})
    references = [value for tag, attrs in found.tags for name, value in attrs.items()
                  if name in ("src", "href", "srcset", "action", "data")]
    assert references and all(value.startswith("data:") for value in references)
    assert "http:" not in text and "url(" not in (run / "report.html").read_text()
    best = json.loads((run / "best" / "evaluation.json").read_text())["digit"]
    assert f"{best['accuracy']:.4f}" in found.words and f"{best['loss']:.4f}" in found.words
    assert (run / "config.yaml").read_text() in found.words
    assert "Finished." in text and "from first start to end" in found.words
    starts = json.loads((run / "environment.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 20]
    assert all(start["time"] in found.words for start in starts)


def test_nothing_that_a_run_holds_becomes_part_of_the_page(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "a <b> & run")
    examples = copy / "examples" / "examples.json"
    entries = json.loads(examples.read_text())
    entries[0] |= {"target": HOSTILE, "prediction": HOSTILE, "image": "../../../etc/passwd"}
    entries[1] = {"task": "digit", "group": "mistake", "row": 3, "target": "", "prediction": "",
                  "confidence": None, "loss": None, "text": HOSTILE}
    examples.write_text(json.dumps(entries))
    (copy / "per_class.csv").write_text(f"task,class,f1\ndigit,{HOSTILE.replace(',', ' ')},0.5\n")
    (copy / "exit.json").write_text(json.dumps({"code": 3, "reason": HOSTILE}))
    write_report(copy)
    found = page(copy)
    assert "script" not in {tag for tag, _ in found.tags}
    assert sum(HOSTILE in words for words in found.words) >= 3
    assert "a <b> & run" in found.words
    assert "root:" not in (copy / "report.html").read_text()


def test_the_best_weights_are_named_by_their_step(run, tmp_path):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    reached = {record["step"]: record["eval/accuracy"] for record in records
               if "eval/accuracy" in record}
    best = max(reached, key=reached.get)  # the first of the best
    assert f"best weights (step {best})" in page(run).words
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "metrics.jsonl").unlink()
    write_report(copy)
    assert "best weights" in page(copy).words


def test_mistakes_among_drawn_samples_are_marked(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")

    def marks(kind: str, pairs: list[tuple[str, str]]) -> list[str]:
        config = yaml.safe_load((run / "config.yaml").read_text())
        config["tasks"] = {"t": {"kind": kind}}
        (copy / "config.yaml").write_text(yaml.safe_dump(config))
        (copy / "examples" / "examples.json").write_text(json.dumps([
            {"task": "t", "group": group, "row": 0, "target": target, "prediction": prediction}
            for group in ("mistake", "sample") for target, prediction in pairs]))
        write_report(copy)
        return [word for word in page(copy).words if word in ("mistake", "not the target")]

    pairs = [("a", "a"), ("a", "b"), ("", "b")]  # the last has no target
    assert marks("classification", pairs) == ["mistake"]
    assert marks("language_modeling", pairs) == ["mistake"]
    assert marks("multilabel", pairs) == ["not the target"] * 2
    assert marks("regression", pairs) == marks("segmentation", pairs) == []


def test_names_stay_names_and_a_damaged_file_costs_its_section_only(run, tmp_path):
    copy, said = shutil.copytree(run, tmp_path / "run"), []
    (copy / "per_class.csv").write_text("task,class,f1\ndigit,007,0.123456\ndigit,1e3,12345\n")
    write_report(copy, said.append)
    assert {"007", "1e3", "0.1235", "12,345"} <= set(page(copy).words) and said == []
    (copy / "per_class.csv").write_bytes(b"task,class\n\xff,\xff\n")
    (copy / "examples" / "examples.json").write_text('[{"task": "digit"}, 7]')
    (copy / "environment.json").write_text('{"starts": [3]}')
    (copy / "metrics.jsonl").write_text(
        '{"step": 1, "epoch": Infinity, "memory/peak_gib": "x", "eval/accuracy": 0.5}\n')
    (copy / "exit.json").write_text('{"code": [], "reason": {}}')
    write_report(copy, said.append)
    sections = ("Classes", "Worst predictions", "Samples drawn at random", "Starts and times")
    assert [line.split(", ")[1].split(":")[0] for line in said] == list(sections)
    words = page(copy).words
    assert sum(word.startswith("left out (") for word in words) == len(sections)
    assert {"Metrics of the validation split", "Curves", "Options"} <= set(words)


def test_long_tables_scroll_and_headings_stand_above_their_columns(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "per_class.csv").write_text("task,class,f1\n" + "".join(
        f"{'a long name of a task ' * 9}{number % 2},{number},0.5\n" for number in range(120)))
    write_report(copy)
    found = page(copy)
    assert ("div", {"class": "wide long"}) in found.tags and "and 20 more" in " ".join(found.words)
    html = (copy / "report.html").read_text()
    assert '<th class="text">task</th><th>class</th><th>f1</th>' in html  # above words and numbers
    assert max(len(word) for word in found.words if word.startswith("a long name")) <= 48


@pytest.mark.parametrize("damage", ["missing", "empty", "binary"])
def test_what_is_missing_or_damaged_is_left_out(run, tmp_path, damage):
    copy = shutil.copytree(run, tmp_path / "run")
    for name in ("metrics.jsonl", "per_class.csv", "examples/examples.json", "exit.json",
                 "environment.json", "best/evaluation.json", "final/evaluation.json", "curves.png"):
        if damage == "missing":
            (copy / name).unlink()
        else:
            (copy / name).write_bytes(b"" if damage == "empty" else bytes(range(128, 256)))
    write_report(copy)
    assert "Options" in page(copy).words
    (copy / "config.yaml").unlink()
    with pytest.raises(plots.NotARun, match=r"config\.yaml"):
        write_report(copy)


def test_a_browser_opens_it_without_an_error_or_a_request(run, tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    asked: list[str] = []

    class Counter(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_CONNECT = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Counter)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def open_page(file: Path) -> str:
        """What the browser's console says; all requests go through the proxy that counts them."""
        result = subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--disable-quic", "--disable-extensions", "--enable-logging=stderr", "--v=0",
             f"--proxy-server=http://127.0.0.1:{server.server_port}",
             "--proxy-bypass-list=<-loopback>", f"--user-data-dir={tmp_path / 'profile'}",
             f"--screenshot={tmp_path / 'shot.png'}", "--window-size=1000,1400", file.as_uri()],
            capture_output=True, text=True, timeout=120,
        )
        assert (tmp_path / "shot.png").stat().st_size > 20_000, result.stderr
        return "\n".join(line for line in result.stderr.splitlines() if "CONSOLE" in line)

    assert open_page(run / "report.html") == ""
    before = list(asked)
    # The same page without its policy and with a picture from elsewhere would have been seen.
    text = (run / "report.html").read_text().replace("Content-Security-Policy", "x-none")
    bad = tmp_path / "bad.html"
    bad.write_text(text.replace("</h1>", '</h1><img src="http://example.invalid/canary.png">'
                                "<script>console.error('heard')</script>"))
    assert "heard" in open_page(bad)
    server.shutdown()
    server.server_close()
    assert any("canary" in path for path in asked)
    assert not any("google" not in path for path in before), before
