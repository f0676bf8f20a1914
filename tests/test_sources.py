"""Sources: every format gives the same tensors, and what cannot be read is told in one line."""

import gzip
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from launching import load
from PIL import Image
from warm import fork

from trainlib.config import UserError
from trainlib.data import DataOptions

ROWS = [
    {"width": float(np.float32(np.sin(i))), "count": 7 * i % 5 - 2, "is_ripe": i % 3 == 0,
     "kind": ("pear", "apple", "fig")[i % 3]}
    for i in range(24)
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def table(rows=ROWS, **features) -> datasets.Dataset:
    made = datasets.Dataset.from_list(rows)
    for name, feature in features.items():
        made = made.cast_column(name, feature)
    return made


def refusal(*targets: str, **options) -> str:
    """The one line that a user is told."""
    with pytest.raises(UserError) as caught:
        load(*targets or ["kind"], **options)
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def write_no_rows(file) -> None:
    """A parquet file with one group of rows, which is empty."""
    pyarrow.parquet.write_table(table().data.table.slice(0, 0), file)


def write(folder, form: str) -> str:
    """The table in one format; returns the source."""
    file = str(folder / f"table.{form}")
    if form in ("parquet", "csv", "json"):
        getattr(table(), f"to_{form}")(file)  # json: a line for each row
    elif form == "csv.gz":
        table().to_csv(file.removesuffix(".gz"))
        Path(file).write_bytes(gzip.compress(Path(file.removesuffix(".gz")).read_bytes()))
    elif form == "tsv":
        table().to_csv(file, sep="\t")
    elif form == "jsonl":
        (folder / "table.jsonl").write_text(json.dumps(ROWS))  # one list
    elif form == "arrow":
        with pyarrow.OSFile(file, "wb") as sink, \
                pyarrow.ipc.new_stream(sink, table().data.schema) as writer:
            writer.write_table(table().data.table)
    elif form == "glob":
        for part in range(3):
            table(ROWS[part * 8 : part * 8 + 8]).to_parquet(str(folder / f"part-{part}.parquet"))
        write_no_rows(folder / "part-0-none.parquet")  # as Spark does
        return str(folder / "part-*.parquet")
    elif form == "brackets":
        file = str(folder / "table[1].csv")
        table().to_csv(file)
    elif form == "saved":
        file = str(folder / "saved")
        table().save_to_disk(file)
    elif form == "saved dict":
        file = str(folder / "saved")
        datasets.DatasetDict(train=table(), test=table()).save_to_disk(file)
    else:
        (folder / "mine.py").write_text(
            "import datasets\n"
            f"def rows(): return datasets.Dataset.from_list({ROWS!r}).with_format('torch')\n"
            "def splits(): return datasets.DatasetDict(train=rows())\n"
        )
        return f"{folder}/mine.py:{form}"
    return file


@pytest.mark.parametrize("form", [
    "parquet", "csv", "csv.gz", "tsv", "json", "jsonl", "arrow", "glob", "brackets", "saved",
    "saved dict", "rows", "splits",
])
def test_every_format_of_one_table_gives_the_same_tensors(form, tmp_path):
    dataset = load("kind", source=write(tmp_path, form))
    assert dataset.targets["kind"].label_names == ["apple", "fig", "pear"]
    rows = [part.rows.tolist() for part in (dataset.train, dataset.validation)]
    assert sorted(rows[0] + rows[1]) == list(range(24)) and len(rows[1]) == 2
    for part in (dataset.train, dataset.validation):
        chosen = [ROWS[row] for row in part.rows]
        inputs = [[row["width"], row["count"], row["is_ripe"]] for row in chosen]
        assert part.inputs.equal(torch.tensor(inputs, dtype=torch.float32))
        classes = [["apple", "fig", "pear"].index(row["kind"]) for row in chosen]
        assert part.targets["kind"].tolist() == classes


def paint(file, value, mode="L") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (3, 2), value).save(file)


def test_a_folder_of_class_folders_loses_no_image_whatever_its_name(tmp_path):
    names = ["train/a.png", "train/b.JPG", "test tube/train_1.png", "test tube/val.png", "ox/1.png"]
    for value, name in enumerate(names):
        paint(tmp_path / name, value)
    (tmp_path / "ox" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    dataset = load("label", source=str(tmp_path), validation_split=0.2)
    assert dataset.targets["label"].label_names == ["ox", "test tube", "train"]
    by_row = dict(zip(dataset.train.rows.tolist(), dataset.train.targets["label"].tolist(),
                      strict=True))
    by_row |= dict(zip(dataset.validation.rows.tolist(),
                       dataset.validation.targets["label"].tolist(), strict=True))
    assert [by_row[row] for row in range(5)] == [0, 1, 1, 2, 2]  # sorted by path
    assert dataset.train.inputs.shape == (4, 1, 2, 3)


def test_a_folder_of_splits_is_read_by_split_with_the_training_classes(tmp_path):
    for name, value in (("train/cat/1.png", 1), ("train/ant/1.png", 0), ("val/cat/1.png", 5)):
        paint(tmp_path / name, value)
    dataset = load("label", source=str(tmp_path))
    assert dataset.targets["label"].label_names == ["ant", "cat"]
    assert dataset.validation.targets["label"].tolist() == [1]  # 0 in its own folder
    assert dataset.validation.inputs.unique().tolist() == [5]
    paint(tmp_path / "val/eel/1.png", 1)
    assert "does not have ('eel') in 1 of 2 rows, first in row 1" in refusal(
        "label", source=str(tmp_path))
    paint(tmp_path / "stray.png", 1)
    assert "all images must lie in CLASS folders" in refusal("label", source=str(tmp_path))


def test_the_validation_split_is_the_one_named_or_found_or_a_tenth(tmp_path):
    def sizes(source, **options):
        dataset = load("kind", source=source, **options)
        return len(dataset.train), len(dataset.validation)

    splits = {"train": table(), "dev": table(ROWS[:7]), "odd": table(ROWS[:5])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    saved = str(tmp_path / "saved")
    assert sizes(saved) == (24, 7)
    assert sizes(saved, validation_split="odd") == (24, 5)
    assert sizes(saved, validation_split=0.25) == (18, 6)
    assert sizes(saved, train_split="dev") == (6, 1)  # not itself
    table(ROWS[:4]).to_csv(str(tmp_path / "held.csv"))
    assert sizes(saved, validation_split=str(tmp_path / "held.csv")) == (24, 4)
    assert "no split 'trian'" in refusal(source=saved, train_split="trian")
    assert "did you mean 'odd'" in refusal(source=saved, validation_split="odds")
    assert "has several splits" in refusal(
        source=str(tmp_path / "held.csv"), validation_split=saved)
    with pytest.raises(ValueError, match="'dev' is the training split"):
        DataOptions(train_split="dev", validation_split="dev")
    for share in (0, 1, 1.5, -0.1):
        with pytest.raises(ValueError, match="lies between 0 and 1"):
            DataOptions(validation_split=share)


def test_validating_on_the_training_file_is_refused_however_it_is_spelled(tmp_path, monkeypatch):
    file = write(tmp_path, "csv")
    (tmp_path / "link.csv").symlink_to(file)
    monkeypatch.chdir(tmp_path)
    for other in (file, "table.csv", "../*/table.csv", "link.csv"):
        assert "is also trained on" in refusal(source=file, validation_split=other)
    function = write(tmp_path, "rows")
    assert "is also trained on" in refusal(source=function, validation_split=function)


def test_a_validation_file_must_have_the_training_columns(tmp_path):
    file = write(tmp_path, "csv")

    def other(rows):
        (tmp_path / "other.json").write_text(json.dumps(rows))
        return refusal(source=file, validation_split=str(tmp_path / "other.json"))

    assert "other.json: has no column 'width'" in other([{"count": 1, "is_ripe": True}])
    assert "did you mean 'kinds'" in other(
        [{key if key != "kind" else "kinds": value for key, value in ROWS[0].items()}])
    assert "'width' holds text values, in training number values" in other(
        [ROWS[0] | {"width": "2 cm"}])
    assert "'width' holds list values" in other([ROWS[0] | {"width": [1.0]}])
    assert "not have ('plum') in 2 of 3 rows, first in row 0" in other(
        [ROWS[0] | {"kind": "plum"}, ROWS[1], ROWS[0] | {"kind": "plum"}])
    assert "the target 'kind' is missing in 1 of 2 rows, first in row 1" in other(
        [ROWS[0], ROWS[1] | {"kind": None}])


@pytest.mark.parametrize("form", ["parquet", "csv", "tsv", "json", "jsonl", "arrow"])
def test_an_empty_file_is_refused(form, tmp_path):
    (tmp_path / f"none.{form}").touch()
    assert f"none.{form} is empty" in refusal(source=str(tmp_path / f"none.{form}"))


def test_files_and_folders_without_rows_are_refused(tmp_path):
    (tmp_path / "header.csv").write_text("width,kind\n")
    (tmp_path / "none.json").write_text("[]")
    write_no_rows(tmp_path / "rows.parquet")
    (tmp_path / "folder").mkdir()
    table().select([]).save_to_disk(tmp_path / "saved")
    for name in ("header.csv", "none.json", "rows.parquet", "saved"):
        assert refusal(source=str(tmp_path / name)) == f"data.source: {tmp_path / name} has no rows"
    assert "folder is empty" in refusal(source=str(tmp_path / "folder"))
    (tmp_path / "mine.py").write_text(
        "import datasets\ndef rows(): return datasets.Dataset.from_dict({'a': [], 'kind': []})")
    assert "mine.py:rows: is empty" in refusal(source=f"{tmp_path}/mine.py:rows")
    file = write(tmp_path, "csv")
    assert refusal(source=file, validation_split=str(tmp_path / "header.csv")).startswith(
        "data.validation_split: ")


def test_what_cannot_be_read_is_refused_in_one_line(tmp_path):
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more of it")
    (tmp_path / "torn.csv").write_text("width,kind\n1,pear\n2,fig,3\n")
    (tmp_path / "table.xlsx").write_text("?")
    (tmp_path / "plain").write_text("?")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "x.xyz").write_text("?")
    for name, told in {
        "torn.parquet": "magic bytes", "torn.csv": "line 3", "table.xlsx": "the ending .xlsx",
        "plain": "no ending", "none.csv": "there is no file or folder", "no-*.csv": "no file match",
        "no/where/to/go": "there is no file or folder", "other": "No (supported) data files",
    }.items():
        assert told in refusal(source=str(tmp_path / name))
    for name in ("nobody/nothing", "nothing"):
        assert "no file or folder here, and as a data set of the Hugging Face Hub" in refusal(
            source=name)
    with pytest.raises(ValueError, match="did you mean 'builtin:digits'"):
        DataOptions(source="builtin:digit")


def test_options_that_a_source_has_no_use_for_are_refused(tmp_path):
    assert "data.validation_split: has no meaning" in refusal(
        source="builtin:digits", validation_split=0.3)
    assert "data.revision: has no meaning" in refusal(source=write(tmp_path, "csv"), revision="v1")
    assert "data.image_size: has no meaning" in refusal(source=write(tmp_path, "csv"), image_size=8)


def test_a_data_set_of_the_hub_is_asked_for_by_subset_and_revision(monkeypatch):
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return table()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load("kind", source="nobody/fruit", subset="dried", revision="v1")
    assert asked == [(("nobody/fruit", "dried"), {"revision": "v1"})]


@pytest.mark.parametrize("body, told", [
    ("return D.to_iterable_dataset()", "is a stream"),
    ("return {'train': D.to_iterable_dataset()}", "is a stream"),
    ("return None", "gives a NoneType"), ("return [D]", "gives a list"),
    ("return {'train': [1]}", "gives a list"), ("return {}", "no split 'train'"),
    ("return D.with_transform(dict)", "has a transform"), ("return {1: D}", "no split 'train'"),
    ("raise KeyError('k')", "KeyError: 'k' (mine.py, line"),
    ("import nothing_like_it", "No module named 'nothing_like_it'"),
])
def test_what_a_function_gives_must_be_tables(body, told, tmp_path):
    (tmp_path / "mine.py").write_text(
        f"import datasets\nD = datasets.Dataset.from_list({ROWS!r})\ndef give():\n    {body}\n")
    assert told in refusal(source=f"{tmp_path}/mine.py:give")


def test_streaming_and_missing_functions_and_packages_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="a stream cannot be read in the order of the plan"):
        DataOptions(streaming=True)
    assert "has no 'rwos'" in refusal(source=write(tmp_path, "rows").replace(":rows", ":rwos"))
    assert "there is no file" in refusal(source=f"{tmp_path}/none.py:rows")
    file = write(tmp_path, "csv")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install datasets" in refusal(source=file)


def test_a_user_reads_one_line_and_exit_code_2(tmp_path):
    for name in ("a/1.png", "a/2.png", "b/1.png", "b/2.png", "b/3.png"):
        paint(tmp_path / "images" / name, 9)
    (tmp_path / "images/b/2.png").write_bytes(b"torn")
    (tmp_path / "images/b/1.png").write_bytes(b"torn")  # one of them is trained on
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 and no more of it")
    for source, told, flags in (
        ("images", "png): not an image that can be decoded", []),
        ("images", "png): not an image that can be decoded",
         ["--data.in_memory", "false", "--data.normalize", "false"]),
        ("torn.parquet", "magic bytes", []),  # datasets logs what it raises
    ):
        result = fork(["--data.source", str(tmp_path / source), "--data.workers", "2",
                       "--log.trackers", "[]", "--run_dir", str(tmp_path / "run"), *flags],
                      HF_DATASETS_CACHE=str(tmp_path / "cache"))
        assert result.returncode == 2 and told in result.stderr
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("train.py: ")
