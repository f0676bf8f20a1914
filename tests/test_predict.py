"""Predictions of a trained model: what the run's own evaluation says, to the last bit; what cannot
be read is named, and the rest is predicted."""

import csv
import gzip
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from launching import ROOT, train
from PIL import Image

from trainlib import predict
from trainlib.models import load_model

GPT = ["--recipe", "recipes/pydocs_gpt.yaml", "--data.block_size", "512", "--model.args",
       "{depth: 1, width: 16, heads: 2}", "--batch.global_size", "4", "--batch.micro_size", "4"]
SHORT = ["--loop.duration", "6 steps", "--loop.eval_every", "3 steps", "--batch.eval_size", "16"]


@pytest.fixture(autouse=True)
def usual_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def ask(folder: Path, run, *arguments) -> tuple[list[dict], dict]:
    """The table and the evaluation."""
    out, evaluation = folder / "out.csv", folder / "evaluation.json"
    given = [run, *arguments, "--out", out, "--evaluation", evaluation, "--device", "cpu"]
    assert predict.main(list(map(str, given))) == 0
    with out.open(newline="") as file:
        return list(csv.DictReader(file)), json.loads(evaluation.read_text())


def refusal(capsys, *arguments) -> str:
    assert predict.main(["--device", "cpu", *map(str, arguments)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def trained_on(folder: Path, source: Path, *flags: str) -> Path:
    return train(folder / "run", "--data.source", str(source), *SHORT, *flags)


def write_wine(folder: Path, rows: int = 90) -> Path:
    random = np.random.default_rng(0)
    lines = ["acid,sugar,kind,price"]
    for row in range(rows):
        kind = row % 3
        acid, sugar = random.normal(kind, 0.3), random.normal(5 * kind, 1)
        lines.append(f"{acid:.4f},{sugar:.4f},{'red white rose'.split()[kind]},{acid + sugar:.3f}")
    (folder / "wine.csv").write_text("\n".join(lines) + "\n")
    return folder / "wine.csv"


WINE = ["--data.input", "[acid, sugar]", "--tasks.kind.target", "kind"]
PRICE = [*WINE, "--tasks.price.kind", "regression", "--tasks.price.target", "price"]


# ---- the run's own evaluation ----

@pytest.mark.parametrize("recipe", [
    "digits_multitask", "digits_segmentation", "pydocs_gpt", "digits_mlp_from_resnet"])
def test_the_validation_split_gives_the_bits_of_the_run(recipe, tmp_path, capsys):
    script = "distill.py" if "from" in recipe else "train.py"
    more = ["--distill.kd_weight", "0"] if script == "distill.py" else []
    job = GPT if recipe == "pydocs_gpt" else ["--recipe", f"recipes/{recipe}.yaml"]
    run = train(tmp_path / "run", *job, *SHORT, *more,
                "--log.report", "true", script=script)
    rows, found = ask(tmp_path, run)
    assert found == json.loads((run / "best" / "evaluation.json").read_text())
    with (run / "predictions.csv").open(newline="") as file:
        wanted = list(csv.DictReader(file))
    assert [{name: row[name] for name in wanted[0]} for row in rows] == wanted
    said = capsys.readouterr()
    assert "bit for bit" in said.err
    records = (run / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in records if '"eval/loss"' in line]
    printed = dict(line.rsplit(" ", 1) for line in said.out.splitlines())
    assert any({name: float(value) for name, value in printed.items()}.items() <= record.items()
               for record in logged)
    last, _ = ask(tmp_path, run, "--weights", "final")
    assert [row["row"] for row in last] == [row["row"] for row in rows]


def test_a_share_of_a_file_is_the_one_that_was_held_out(tmp_path):
    source = write_wine(tmp_path)
    run = trained_on(tmp_path, source, *PRICE, "--log.report", "true")
    rows, found = ask(tmp_path, run, source, "--split", "validation")
    assert found == json.loads((run / "best" / "evaluation.json").read_text())
    others, _ = ask(tmp_path, run, source, "--split", "train")
    both = {row["row"] for row in rows}, {row["row"] for row in others}
    assert not both[0] & both[1] and len(both[0] | both[1]) == 90
    # best/ alone, elsewhere, of data elsewhere, and from disk by worker processes' code
    shutil.copytree(run / "best", tmp_path / "else")
    shutil.copy(source, tmp_path / "other.csv")
    _, again = ask(tmp_path, tmp_path / "else", tmp_path / "other.csv", "--split", "validation")
    assert again == found


def test_text_of_its_own_split(own_folder, tmp_path):
    words = ["good fine great", "bad poor awful"]
    rows = [{"text": f"{words[n % 2]} {'x' * (n % 7)}", "mood": "up down".split()[n % 2]}
            for n in range(60)]
    Path("moods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("net.py").write_text(TEXT_NET)
    run = trained_on(tmp_path, tmp_path / "moods.jsonl", "--data.tokenizer", "bytes",
                     "--tasks.mood.target", "mood", "--model.name", str(tmp_path / "net.py:Net"))
    _, found = ask(tmp_path, run)
    assert found == json.loads((run / "best" / "evaluation.json").read_text())
    new = [{"text": "good"}, {"text": None}, {"text": ""}, {"text": "bad" * 99}]
    Path("new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in new))
    table, _ = ask(tmp_path, run, "new.jsonl")
    assert [row["row"] for row in table] == ["0", "2", "3", "1"]
    assert "the text is missing" in table[-1]["error"]


TEXT_NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self, vocab_size, classes):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, classes)
    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))
"""


# ---- other data ----

@pytest.fixture(scope="module")
def wine(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wine")
    return trained_on(folder, write_wine(folder), *PRICE)


def test_predictions_are_what_the_net_says_under_the_names_of_the_training(wine, tmp_path):
    # Another order of columns and classes, another column, no price.
    new = "kind,extra,sugar,acid\nwhite,1,5.0,1.0\nred,2,0.5,0.25\n"
    (tmp_path / "new.csv").write_text(new)
    table, found = ask(tmp_path, wine, tmp_path / "new.csv", "--batch_size", "1")
    net = load_model(wine)
    with torch.no_grad():
        output = net(torch.tensor([[1.0, 5.0], [0.25, 0.5]]))
    probabilities = output["kind"].double().softmax(1)
    scale = net.label_names["price"]
    for place, row in enumerate(table[:2]):
        best = int(probabilities[place].argmax())
        assert row["prediction"] == net.label_names["kind"][best]
        assert float(row["confidence"]) == pytest.approx(probabilities[place, best].item(), 1e-6)
        price = output["price"][place].item() * scale["deviation"][0] + scale["mean"][0]
        assert float(table[2 + place]["prediction"]) == pytest.approx(price, 1e-5)
        assert table[2 + place]["target"] == table[2 + place]["loss"] == ""
    assert [row["target"] for row in table[:2]] == ["white", "red"]
    assert found.keys() == {"kind"}


def test_a_row_that_cannot_be_read_is_named_and_the_rest_is_predicted(wine, tmp_path, capsys):
    clean = ["acid,sugar,kind,price", *["1.0,5.0,white,6.0"] * 5]
    (tmp_path / "clean.csv").write_text("\n".join(clean) + "\n")
    wanted, _ = ask(tmp_path, wine, tmp_path / "clean.csv")
    broken = [*clean[:3], "sour,5.0,white,6.0", ",5.0,white,6.0", "1.0,inf,white,6.0",
              "1.0,5.0,purple,6.0", "1.0,5.0,,dear", *clean[3:]]
    (tmp_path / "broken.csv").write_text("\n".join(broken) + "\n")
    capsys.readouterr()
    table, found = ask(tmp_path, wine, tmp_path / "broken.csv")
    said = capsys.readouterr()
    errors = {row["row"]: row["error"] for row in table if row["error"]}
    assert errors.keys() == {"2", "3", "4"}
    assert "'acid'" in errors["2"] and "'sour'" in errors["2"] and "row 2:" in said.err
    assert "'acid'" in errors["3"] and "'sugar'" in errors["4"] and "infinite" in errors["4"]
    assert "purple" in said.err and "7 of 10 rows predicted" in said.err
    by_row = {row["row"]: row for row in table if row["task"] == "kind"}
    assert by_row["5"]["prediction"] and by_row["5"]["target"] == by_row["6"]["target"] == ""
    for name in ("prediction", "confidence", "loss"):
        assert by_row["9"][name] == wanted[0][name]
    assert sum(map(sum, found["kind"]["confusion"])) == 5
    # A line with too many fields, which no reader of clean files takes.
    (tmp_path / "long.csv").write_text("\n".join([*clean, "1,2,red,3,4,5"]) + "\n")
    table, _ = ask(tmp_path, wine, tmp_path / "long.csv")
    assert [row["error"] for row in table if row["error"]] == ["has 6 fields, the header 4"]
    assert [row["prediction"] for row in table[:5]] == [row["prediction"] for row in wanted[:5]]


def test_images_of_which_one_is_broken_and_classes_are_others(tmp_path, image_folder, capsys):
    run = trained_on(tmp_path, image_folder, "--model.name", "resnet")
    _, found = ask(tmp_path, run)
    assert found == json.loads((run / "best" / "evaluation.json").read_text())
    new = tmp_path / "new"
    (new / "class 2").mkdir(parents=True)
    (new / "another").mkdir()
    source = sorted((Path(image_folder) / "class 2").iterdir())[0]
    for place in ("class 2/a.png", "another/b.png"):
        shutil.copy(source, new / place)
    (new / "class 2" / "broken.png").write_bytes(source.read_bytes()[:60])
    Image.new("RGB", (9, 9)).save(new / "class 2" / "size.png")
    capsys.readouterr()
    table, found = ask(tmp_path, run, new)
    said = capsys.readouterr().err
    assert "another" in said and "2 of 4 rows predicted" in said
    files = {Path(row["file"]).name: row for row in table}
    assert files["broken.png"]["error"] and "9x9" in files["size.png"]["error"]
    assert files["a.png"]["target"] == "class 2" and files["b.png"]["target"] == ""
    assert files["a.png"]["prediction"] == files["b.png"]["prediction"]
    assert sum(map(sum, found["label"]["confusion"])) == 1
    # Without classes: a folder, one file.
    (tmp_path / "loose").mkdir()
    shutil.copy(source, tmp_path / "loose" / "a.png")
    for given in (tmp_path / "loose", tmp_path / "loose" / "a.png"):
        [row], found = ask(tmp_path, run, given)
        assert row["prediction"] == files["a.png"]["prediction"] and not found


def test_loose_images_beside_folders_of_images_are_refused(tmp_path, image_folder, capsys):
    run = trained_on(tmp_path, image_folder, "--model.name", "resnet")
    new = tmp_path / "new"
    (new / "deep" / "down").mkdir(parents=True)
    source = sorted((Path(image_folder) / "class 2").iterdir())[0]
    for place in ("loose.png", "deep/down/a.png"):
        shutil.copy(source, new / place)
    said = refusal(capsys, run, new, "--out", tmp_path / "x.csv")
    assert "1 loose images (the first is loose.png) and 1 in folders (deep)" in said
    # The ways out that it names.
    assert "name one of the folders" in said and f"'{new}/*.png'" in said and "move" in said
    assert len(ask(tmp_path, run, f"{new}/*.png")[0]) == 1
    assert len(ask(tmp_path, run, f"{new}/**/*.png")[0]) == 2
    assert len(ask(tmp_path, run, new / "deep")[0]) == 1
    (new / "deep" / "down" / "a.png").rename(new / "deep" / "down" / "notes.txt")
    assert len(ask(tmp_path, run, new)[0]) == 1  # a folder without images hides none
    capsys.readouterr()
    assert "no file matches" in refusal(capsys, run, f"{new}/none*.png")


def test_lists_of_another_length_are_named(tmp_path, own_folder):
    random = np.random.default_rng(0)
    rows = [{"x": random.normal(size=3).tolist(), "y": n % 2} for n in range(40)]
    datasets.Dataset.from_list(rows).to_parquet("train.parquet")
    run = trained_on(tmp_path, tmp_path / "train.parquet", "--tasks.y.target", "y")
    rows = [{"x": [1.0]}, {"x": None}, {"x": [1.0, 2.0, None]}, *rows[:3]]
    datasets.Dataset.from_list(rows).to_parquet("new.parquet")
    table, _ = ask(tmp_path, run, "new.parquet")
    assert [row["row"] for row in table] == list("345012")
    assert all("'x'" in row["error"] for row in table[3:])


def test_masks_are_not_needed(tmp_path):
    run = train(tmp_path / "run", "--recipe", "recipes/digits_segmentation.yaml", *SHORT)
    rows, _ = ask(tmp_path, run, "builtin:digits", "--split", "validation")
    assert rows[0]["target"] == "" and rows[0]["loss"] == ""
    shares = [float(part.rsplit(" ", 1)[1]) for part in rows[0]["prediction"].split(", ")]
    assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert 0.5 <= float(rows[0]["confidence"]) <= 1


# ---- mistakes ----

def test_mistakes_are_told_in_one_line(wine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    new = tmp_path / "new.csv"
    new.write_text("acid,sugars,kind\n1,2,red\n")
    assert "no column 'sugar'" in refusal(capsys, wine, new)
    new.write_text("acid,sugar,kind\nsour,sweet,red\n")
    assert "none of 1 rows" in refusal(capsys, wine, new)
    assert "no file" in refusal(capsys, wine, tmp_path / "none.csv")
    assert "no such folder" in refusal(capsys, tmp_path / "nothing", new)
    assert "model.safetensors" in refusal(capsys, tmp_path, new)
    assert "unknown" in refusal(capsys, wine, "builtin:digitz")
    assert "--split" in refusal(capsys, wine, new, "--split", "holdout")
    assert "--batch_size" in refusal(capsys, wine, new, "--batch_size", "0")
    assert "--device" in refusal(capsys, wine, new, "--device", "nonsense")
    assert not Path("predictions.csv").exists()


def test_a_tokenizer_that_is_gone(tmp_path, capsys):
    run = train(tmp_path / "run", *GPT, *SHORT)
    config = run / "best" / "config.yaml"
    config.write_text(config.read_text().replace("tokenizer: bytes", "tokenizer: gone/away.json"))
    assert "data.tokenizer: gone/away.json" in refusal(capsys, run)


def test_to_stdout_goes_the_table_alone(wine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "new.csv").write_text("acid,sugar,kind\n1,2,red\n3,4,red\n")
    assert predict.main([str(wine), str(tmp_path / "new.csv"), "--out", "-"]) == 0
    said = capsys.readouterr()
    assert len(list(csv.DictReader(said.out.splitlines()))) == 4  # two rows of two tasks
    assert "eval/kind/accuracy" in said.err


# ---- what is written, and where ----

def test_data_and_runs_are_never_written_over(wine, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "acid,sugar,kind\n1,2,red\n"
    Path("predictions.csv").write_text(text)
    Path("link.csv").symlink_to("predictions.csv")
    assert "belongs to the data" in refusal(capsys, wine, "predictions.csv")
    assert "belongs to the data" in refusal(capsys, wine, "pred*.csv", "--out", "link.csv")
    assert "--evaluation: " in refusal(
        capsys, wine, "predictions.csv", "--out", "out.csv", "--evaluation", "predictions.csv")
    weights = wine / "best" / "model.safetensors"
    before = weights.read_bytes()
    for run in (wine, wine / "best"):
        for out in (weights, wine / "predictions.csv"):
            assert "lies in the run" in refusal(capsys, run, "predictions.csv", "--out", out)
    assert weights.read_bytes() == before and Path("predictions.csv").read_text() == text


def test_places_are_looked_at_before_anything_is_predicted(wine, tmp_path, capsys, monkeypatch):
    new = tmp_path / "new.csv"
    new.write_text("acid,sugar,kind\n1,2,red\n")
    monkeypatch.setattr(predict, "predict", lambda *_: pytest.fail("predicted already"))
    assert "--out: " in refusal(capsys, wine, new, "--out", tmp_path / "none" / "x.csv")
    out = tmp_path / "out.csv"
    said = refusal(capsys, wine, new, "--out", out, "--evaluation", tmp_path)
    assert "choose another --evaluation" in said and not out.exists()
    assert "another option" in refusal(capsys, wine, new, "--out", out, "--evaluation", out)


def test_outputs_that_are_not_finite_are_named(wine, tmp_path, capsys):
    new, out = tmp_path / "new.csv", tmp_path / "out.csv"
    new.write_text("acid,sugar,kind\n1,2,red\n3e38,-3e38,red\n")
    table, _ = ask(tmp_path, wine, new)
    assert "rows, which have no prediction: 1" in capsys.readouterr().err
    bad = [row for row in table if row["error"]]
    assert {row["row"] for row in bad} == {"1"} and not any(row["prediction"] for row in bad)
    assert all(row["prediction"] for row in table if row["row"] == "0")
    new.write_text("acid,sugar,kind\n3e38,-3e38,red\n")
    out.unlink()
    assert "NaN or infinite in all 1 rows" in refusal(capsys, wine, new, "--out", out)
    assert not out.exists()


def test_the_data_of_the_training_is_known_by_any_name(wine, tmp_path, capsys, monkeypatch):
    source = wine.parent / "wine.csv"
    monkeypatch.chdir(wine.parent)
    ask(tmp_path, wine, "./wine.csv", "--split", "validation")
    assert "bit for bit" in capsys.readouterr().err
    ask(tmp_path, wine, source)
    assert "these rows include those of the training" in capsys.readouterr().err
    shutil.copytree(wine / "best", tmp_path / "else")
    config = tmp_path / "else" / "config.yaml"
    config.write_text(config.read_text().replace(str(source), "/gone/away.csv"))
    assert "give DATA" in refusal(capsys, tmp_path / "else", "--out", tmp_path / "x.csv")


def test_a_row_with_an_entry_that_is_no_number_is_left_out_of_the_evaluation(tmp_path, capsys):
    lines = ["x,y,a,b", *(f"{n % 7},{n % 5},{n % 2},{n % 3 == 0:d}" for n in range(60))]
    (tmp_path / "tags.csv").write_text("\n".join(lines) + "\n")
    run = trained_on(tmp_path, tmp_path / "tags.csv", "--data.input", "[x, y]",
                     "--tasks.tags", "{kind: multilabel, target: [a, b]}")
    (tmp_path / "good.csv").write_text("x,y,a,b\n1,2,1,0\n3,4,0,0\n")
    (tmp_path / "bad.csv").write_text("x,y,a,b\n1,2,1,0\n3,4,0,0\n5,1,maybe,1\n")
    _, wanted = ask(tmp_path, run, tmp_path / "good.csv")
    _, found = ask(tmp_path, run, tmp_path / "bad.csv")
    assert "1 rows have a tags that training did not have" in capsys.readouterr().err
    assert found == wanted


def test_labels_keep_their_zeros_where_all_are_digits(tmp_path, capsys):
    source = tmp_path / "codes.csv"
    lines = [f"{k % 7},{(k * 5) % 11},{('01', '02', 'x')[k % 3]}" for k in range(60)]
    source.write_text("\n".join(["a,b,code", *lines]) + "\n")
    run = trained_on(tmp_path, source, "--data.input", "[a, b]", "--tasks.code.target", "code")
    digits = tmp_path / "digits.csv"
    digits.write_text("\n".join(["a,b,code", *(line for line in lines if "x" not in line)]) + "\n")
    table, _ = ask(tmp_path, run, digits)
    assert {row["target"] for row in table} == {"01", "02"}
    assert "did not have" not in capsys.readouterr().err


def test_a_broken_file_with_a_mark_of_its_bytes_and_a_long_field_is_read(wine, tmp_path):
    text = f"acid,note,sugar\n1,{'x' * 200_000},2\n1,2,3,4,5\n"
    (tmp_path / "new.csv").write_text(text, encoding="utf-8-sig")
    table, _ = ask(tmp_path, wine, tmp_path / "new.csv")
    assert [row["row"] for row in table if row["error"]] == ["1"]


# ---- texts as they are written, and files that are none ----

BERT = ["--data.input", "text", "--data.tokenizer", "bytes", "--data.block_size", "16",
        "--tasks.label.target", "label", "--model.name",
        "transformers:AutoModelForSequenceClassification", "--model.args",
        "{config: {model_type: bert, hidden_size: 8, num_hidden_layers: 1, "
        "num_attention_heads: 2, intermediate_size: 8}}"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"{k % 7} of {k} things,{'pos' if k % 2 else 'neg'}" for k in range(60)]
    (folder / "texts.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return trained_on(folder, folder / "texts.csv", *BERT)


def test_texts_of_digits_are_texts_as_they_are_written(texts, tmp_path, capsys):
    written = ["123", "007", "1.50", "true", "2020-01-01"]
    parquet = tmp_path / "wanted.parquet"
    datasets.Dataset.from_dict({"text": written}).to_parquet(parquet)
    wanted = [row["confidence"] for row in ask(tmp_path, texts, parquet)[0]]
    assert len(set(wanted)) == len(wanted)
    strings = [json.dumps({"text": text}) for text in written]
    numbers = [*strings[:2], '{"text": 1.50}', '{"text": true}', strings[4]]
    for name, lines, some in (
        ("all.csv", ["text,label", "123,pos", "007,neg"], slice(2)),
        ("all.tsv", ["text\tlabel", "123\tpos", "007\tneg"], slice(2)),
        ("some.csv", ["text", *written], slice(5)),
        ("truths.csv", ["text", "true"], slice(3, 4)),
        ("strings.jsonl", strings, slice(5)),
        ("dates.jsonl", strings[4:], slice(4, 5)),
        ("numbers.jsonl", numbers, slice(5)),
        ("number.jsonl", ['{"text": 123}'], slice(1)),
        ("list.json", ["[" + ", ".join(numbers) + "]"], slice(5)),
    ):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        table, _ = ask(tmp_path, texts, tmp_path / name)
        assert [row["confidence"] for row in table] == wanted[some], name
    # More rows than are read at a time: digits alone in the second part.
    (tmp_path / "long.csv").write_text("\n".join(["text", *["a"] * 10_000, *["007"] * 20]) + "\n")
    table, _ = ask(tmp_path, texts, tmp_path / "long.csv", "--batch_size", "4096")
    assert float(table[-1]["confidence"]) == pytest.approx(float(wanted[1]), abs=1e-6)
    capsys.readouterr()
    datasets.Dataset.from_dict({"text": [123]}).to_parquet(parquet)
    table, _ = ask(tmp_path, texts, parquet)
    assert table[0]["confidence"] == wanted[0] and "read as the texts" in capsys.readouterr().err
    # Of a folder no reader is told what is text.
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "new.csv").write_text("text\n007\n")
    said = refusal(capsys, texts, tmp_path / "folder", "--out", tmp_path / "x.csv")
    assert f"name the files, as '{tmp_path}/folder/*.csv'" in said
    table, _ = ask(tmp_path, texts, tmp_path / "folder/*.csv")
    assert table[0]["confidence"] == wanted[1]


def test_a_list_among_numbers_costs_its_row_only(wine, tmp_path):
    rows = ['{"acid": 1, "sugar": 2}', '{"acid": 1, "sugar": [2]}', f'{{"acid": 1{"0" * 20}, '
            '"sugar": 2}']
    (tmp_path / "new.jsonl").write_text("\n".join(rows) + "\n")
    table, _ = ask(tmp_path, wine, tmp_path / "new.jsonl")
    assert {row["row"]: row["error"] for row in table if row["error"]} == {
        "1": "'sugar': '[2]' is no number"}


def test_a_quote_that_is_never_closed_costs_its_line_only(wine, texts, tmp_path):
    new = tmp_path / "new.csv"
    lines = ["acid,sugar,kind", "1,2,red", '1,2,"red', "3,4,red", "5,6,white"]
    new.write_text("\n".join(lines) + "\n")
    table, _ = ask(tmp_path, wine, new)
    errors = {row["row"]: row["error"] for row in table if row["error"]}
    assert errors == {"1": "has a quote that is opened and never closed"}
    assert [row["target"] for row in table if row["task"] == "kind"] == ["red", "red", "white"]
    new.write_text('text,label\ngood,pos\n"open,neg\nmore,neg\n')
    table, _ = ask(tmp_path, texts, new)
    assert {row["row"]: row["error"] for row in table if row["error"]} == errors


def test_bytes_that_are_no_text_are_named(wine, texts, tmp_path, capsys):
    new = tmp_path / "new.csv"
    new.write_bytes("text,label,note\ncafé,pos,\ngood,pos,é\nbad,nég,\n".encode("latin1"))
    table, found = ask(tmp_path, texts, new)
    [error] = [row for row in table if row["error"]]
    assert error["row"] == "0" and "'text' is no UTF-8 text" in error["error"]
    assert "iconv -f latin1 -t utf-8" in error["error"]
    assert [row["target"] for row in table[:2]] == ["pos", ""]  # what is not used does not matter
    assert "'n\ufffdg'" in capsys.readouterr().err and found["label"]
    (tmp_path / "new.jsonl").write_bytes('{"text": "café"}\n{"text": "good"}\n'.encode("latin1"))
    rows, _ = ask(tmp_path, texts, tmp_path / "new.jsonl")
    assert rows[0]["confidence"] == table[0]["confidence"] and "UTF-8" in rows[1]["error"]
    (tmp_path / "new.jsonl").write_text('{"text": "\\ud800"}\n{"text": "good"}\n')
    assert len([row for row in ask(tmp_path, texts, tmp_path / "new.jsonl")[0]
                if row["error"]]) == 1
    capsys.readouterr()
    new.write_bytes("acid,sugar,kind\n1,2,red\n".encode("utf-16"))
    assert "is UTF-16; convert it: iconv" in refusal(capsys, wine, new, "--out", tmp_path / "x")
    new.write_bytes("säure,sugar,kind\n1,2,red\n".encode("latin1"))
    assert "header is no UTF-8" in refusal(capsys, wine, new, "--out", tmp_path / "x")


def test_columns_that_stand_twice_are_refused_where_they_are_used(wine, tmp_path, capsys):
    new = tmp_path / "new.csv"
    for header in ("acid,acid,sugar,kind", "acid,kind,sugar,kind"):
        new.write_text(f"{header}\n1,2,3,red\n")
        assert f"2 columns '{header.split(',')[1]}'" in refusal(
            capsys, wine, new, "--out", tmp_path / "x.csv")
    new.write_text("acid,note,note,sugar\n1,8,9,2\n")
    table, _ = ask(tmp_path, wine, new)
    new.write_text("acid,sugar\n1,2\n")
    assert ask(tmp_path, wine, new)[0] == table
    # A separator at the end of each line moves no column.
    new.write_text("acid,sugar\n1,2,\n")
    assert ask(tmp_path, wine, new)[0] == table


def test_a_compressed_file_that_is_cut_is_refused(wine, tmp_path, capsys):
    content = gzip.compress(b"acid,sugar\n" + b"1,2\n3,4.5\n" * 100)
    for given in (content[:40], b"acid,sugar\n1,2\n"):
        (tmp_path / "new.csv.gz").write_bytes(given)
        assert "cannot be read" in refusal(
            capsys, wine, tmp_path / "new.csv.gz", "--out", tmp_path / "x.csv")
