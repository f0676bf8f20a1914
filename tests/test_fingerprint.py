"""The fingerprint: other data have another, wherever and however they are read."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from launching import ROOT, load
from PIL import Image
from tables import write

from trainlib import data
from trainlib.tasks import TaskOptions

pytestmark = pytest.mark.usefixtures("own_folder")
MODULE = sys.modules[data.fingerprint.__module__]  # whose name is the function's, too
NUM_ROWS = 200  # more than the samples that are read again, once their number has been lowered


def rng():
    return np.random.default_rng(0)


def table(**changes) -> dict[str, list]:
    """Two columns of inputs; a class, a number and a label set, of which some are missing."""
    rows = range(NUM_ROWS)
    return {
        "x": rng().normal(size=NUM_ROWS).tolist(), "z": [row / 7 for row in rows],
        "kind": [None if row == 5 else "abc"[row % 3] for row in rows],
        "size": [None if row == 7 else row % 11 / 10 for row in rows],
        "tags": [None if row == 9 else ["s", "t"][: row % 3] for row in rows],
    } | changes


def changed(column: str, row: int, value) -> dict[str, list]:
    values = table()[column]
    values[row] = value
    return table(**{column: values})


def several(columns=None, other=None, **options) -> data.Dataset:
    """Three tasks on a table, with a validation table unless options say otherwise."""
    tasks = {
        "kind": TaskOptions(target="kind"), "size": TaskOptions(kind="regression", target="size"),
        "tags": TaskOptions(kind="multilabel", target="tags"),
    }
    return load(tasks=tasks, **{"source": write(columns or table()), "input": ["x", "z"],
                                "validation_split": write(other or table(), "other")} | options)


def csv(**options) -> data.Dataset:
    with open("train.csv", "w") as file:
        file.write("x,y\n" + "".join(f"{row / 3},{'ab'[row % 2]}\n" for row in range(30)))
    return load("y", source="train.csv", **options)


def images(**options) -> data.Dataset:
    for number, pixels in enumerate(rng().integers(0, 256, (24, 6, 5, 3), dtype=np.uint8)):
        os.makedirs(f"images/{number % 2}", exist_ok=True)
        Image.fromarray(pixels).save(f"images/{number % 2}/{number:02}.png")
    return load("label", source="images", **options)


def masks(change=(), **options) -> data.Dataset:
    pixels = rng().integers(0, 3, (2, 24, 4, 4))
    if change:
        pixels[change] = (pixels[change] + 1) % 3
    inputs, targets = pixels.tolist()
    task = TaskOptions(kind="segmentation", target="mask", ignore_index=2)
    # Lists are images once they have channels.
    source = write({"image": [[image] for image in inputs], "mask": targets})
    return load(tasks={"mask": task}, source=source, input="image", **options)


def texts(change=None, **options) -> data.Dataset:
    lines = [f"{row} times {row} is {row * row}" for row in range(40)]
    if change:
        lines[change[0]] = change[1]
    source = write({"text": lines, "y": [row % 2 for row in range(40)]})
    return load("y", source=source, input="text", **{"tokenizer": "bytes"} | options)


def language(text="0123456789" * 100, **options) -> data.Dataset:
    with open("one.txt", "w") as file:
        file.write(text)
    task = TaskOptions(kind="language_modeling", target="text")
    return load(tasks={"text": task}, **{"source": "one.txt", "tokenizer": "bytes",
                                         "block_size": 16} | options)


def documents(**options) -> data.Dataset:
    source = write({"text": [f"{row} of some documents" for row in range(40)]})
    return language(source=source, packing=False, **options)


KINDS = {
    "several": several, "csv": csv, "images": images, "masks": masks, "texts": texts,
    "language": language, "documents": documents, "digits": load,
    "ink": lambda **options: load(source="builtin:digits_ink", tasks={
        "mask": TaskOptions(kind="segmentation", target="mask", ignore_index=255)}, **options),
    "diabetes": lambda **options: load(source="builtin:diabetes", tasks={
        "y": TaskOptions(kind="regression", target="progression")}, **options),
}


# One of each of some masks, which becomes the value that is ignored.
IGNORED_PIXELS = [(1, number, *np.argwhere(mask == 1)[0]) for number, mask in
                  enumerate(rng().integers(0, 3, (2, 24, 4, 4))[1]) if (mask == 1).any()]


@pytest.fixture
def few(monkeypatch):
    """Data so large that only some samples are read again."""
    monkeypatch.setattr(MODULE, "_LEAST_BYTES", 1)
    monkeypatch.setattr(MODULE, "_LEAST_SAMPLES", 4)


def test_all_kinds_of_data_differ():
    found = [data.fingerprint(make()) for make in KINDS.values()]
    assert len(set(found)) == len(KINDS)
    assert all(len(text) == 32 and int(text, 16) >= 0 for text in found)


@pytest.mark.parametrize("sampled", [False, True], ids=["whole", "sampled"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_workers_and_folder_leave_no_trace(kind, sampled, tmp_path, monkeypatch, request):
    if sampled:
        request.getfixturevalue("few")
    wanted = data.fingerprint(KINDS[kind](in_memory=True))
    assert data.fingerprint(KINDS[kind](in_memory=False, workers=0)) == wanted
    if kind in ("images", "masks", "language") and not sampled:
        assert data.fingerprint(KINDS[kind](in_memory=False, workers=2)) == wanted
    other = tmp_path / "elsewhere"
    other.mkdir()
    monkeypatch.chdir(other)
    monkeypatch.setenv("XDG_CACHE_HOME", str(other))
    assert data.fingerprint(KINDS[kind](in_memory=False, workers=0)) == wanted


def test_another_process_finds_the_same():
    wanted = [data.fingerprint(KINDS[kind]()) for kind in ("several", "images", "language")]
    code = ("import sys, json; sys.path[:0] = [sys.argv[1], sys.argv[1] + '/tests']; import torch; "
            "torch.set_num_threads(2); import datasets; datasets.disable_progress_bars(); "
            "import test_fingerprint as t; "
            "print(json.dumps([t.data.fingerprint(t.KINDS[kind](in_memory=False, workers=1)) "
            "for kind in ('several', 'images', 'language')]))")
    os.mkdir("other")
    result = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], cwd="other", capture_output=True, text=True,
        env=os.environ | {"PYTHONHASHSEED": "1", "HF_DATASETS_CACHE": os.path.abspath("cache")})
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == wanted


def swapped(columns: dict[str, list], first: int, second: int) -> dict[str, list]:
    order = list(range(NUM_ROWS))
    order[first], order[second] = second, first
    return {name: [values[row] for row in order] for name, values in columns.items()}


def cut(rows: slice) -> dict[str, list]:
    return {name: values[rows] for name, values in table().items()}


CHANGES = {
    "a sample less": lambda: several(cut(slice(0, -1))),
    "the first sample gone": lambda: several(cut(slice(1, None))),
    "a sample more": lambda: several({name: [*values, values[0]]
                                      for name, values in table().items()}),
    "two samples in each other's place": lambda: several(swapped(table(), 3, 100)),
    "an input": lambda: several(changed("x", 101, 0.25)),
    "an input in validation": lambda: several(other=changed("x", 0, 0.25)),
    "a class": lambda: several(changed("kind", 101, "a")),
    "a missing class": lambda: several(changed("kind", 101, None)),
    "a number": lambda: several(changed("size", 101, 0.21)),
    "a missing number": lambda: several(changed("size", 101, None)),
    "a label set": lambda: several(changed("tags", 101, ["t"])),
    "a missing label set": lambda: several(changed("tags", 101, None)),
    "a class in validation": lambda: several(other=changed("kind", 101, "a")),
    "a number in validation": lambda: several(other=changed("size", 101, 0.21)),
    "all numbers scaled": lambda: several(*[table(size=[
        None if value is None else 2 * value for value in table()["size"]])] * 2),
    "all numbers moved": lambda: several(*[table(size=[
        None if value is None else value + 1 for value in table()["size"]])] * 2),
    "a share held out": lambda: several(validation_split=0.1),
    "a larger share held out": lambda: several(validation_split=0.2),
    "a shorter validation table": lambda: several(other=cut(slice(0, -1))),
    "the columns in another order": lambda: several(input=["z", "x"]),
    "a column less": lambda: several(input=["x"]),
    "inputs as they are": lambda: several(normalize=False),
}


def test_every_change_of_a_table_shows_also_where_few_samples_are_read_again(few):
    found = {name: data.fingerprint(make()) for name, make in CHANGES.items()}
    found["nothing"] = data.fingerprint(several())
    same = [(one, other) for one in found for other in found
            if one < other and found[one] == found[other]]
    assert same == []


def relabelled(names: list[str]) -> data.Dataset:
    import datasets

    features = datasets.Features({"x": datasets.Value("float32"),
                                  "y": datasets.ClassLabel(names=names)})
    columns = {"x": [float(row) for row in range(20)], "y": [row % 2 for row in range(20)]}
    return load("y", source=write(datasets.Dataset.from_dict(columns, features)))


def renamed() -> data.Dataset:
    return load("y", source=write({"t": [row / 3 for row in range(30)], "y": ["a", "b"] * 15}),
                input="t")


OTHERS = {
    "the names of labels": lambda: [relabelled(["a", "b"]), relabelled(["a", "c"]),
                                    relabelled(["b", "a"])],
    "the names of columns": lambda: [renamed(), load("y", source=write(
        {"u": [row / 3 for row in range(30)], "y": ["a", "b"] * 15}), input="u")],
    "the size and colour of images": lambda: [
        images(), images(image_size=[6, 4]), images(image_size=[5, 6]), images(channels=1)],
    "a pixel of a mask": lambda: [masks(), masks((1, 0, 0, 0)), masks((1, 23, 3, 3))],
    "a pixel": lambda: [masks(), masks((0, 0, 0, 0)), masks((0, 23, 3, 3))],
    "the tokenizer and the size of texts": lambda: [
        texts(), texts(block_size=10), texts((17, "17 times 17 is 280")), texts((17, ""))],
    "one character of a text": lambda: [language(), language("0123456789" * 99 + "0123456788"),
                                        language("1123456789" + "0123456789" * 99)],
    "the blocks of a text": lambda: [
        language(), language(block_size=15), language(validation_split=0.2)],
    "packing": lambda: [documents(), language(source="train.parquet")],
    "the data built in": lambda: [load(), load("quadrants", tasks={
        "digit": TaskOptions(kind="multilabel", target="quadrants")})],
}


@pytest.mark.parametrize("what", OTHERS)
def test_it_tells_apart(what):
    found = [data.fingerprint(dataset) for dataset in OTHERS[what]()]
    assert len(set(found)) == len(found)


def test_the_text_shows_beyond_the_samples_that_are_read_again(few):
    found = {data.fingerprint(texts((row, "other"))) for row in range(40)}
    assert len(found) == 40


def test_another_tokenizer_shows_though_its_numbers_are_the_same():
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    found = set()
    for word in ("unseen", "not seen"):
        words = tokenizers.models.WordLevel({"a": 0, word: 1, "[UNK]": 2}, unk_token="[UNK]")
        tokenizers.Tokenizer(words).save("words.json")
        found.add(data.fingerprint(language(tokenizer="words.json", source=write(
            {"text": ["a"] * 400}))))
    assert len(found) == 2


@pytest.mark.parametrize("towards", [-1e9, 1e9], ids=["down", "up"])
def test_the_last_bits_of_sums_leave_no_trace(towards):
    """They depend on the number of threads, and on the processor."""
    dataset = several()
    info, split = dataset.targets["size"], dataset.train
    moved = torch.nextafter(split.targets["size"], torch.tensor(towards, dtype=torch.float64))
    info = replace(info, mean=tuple(np.nextafter(info.mean, towards).tolist()),
                   deviation=tuple(np.nextafter(info.deviation, -towards).tolist()))
    other = replace(dataset, train=replace(split, targets=split.targets | {"size": moved}),
                    targets=dataset.targets | {"size": info})
    assert data.fingerprint(other) == data.fingerprint(dataset)


def test_other_rows_of_the_source_are_other_data():
    dataset = csv()
    other = replace(dataset, train=replace(dataset.train, rows=dataset.train.rows.flip(0)))
    assert data.fingerprint(other) != data.fingerprint(dataset)


def test_a_pixel_that_is_ignored_shows_beyond_the_samples_that_are_read_again(few):
    found = {data.fingerprint(masks(change)) for change in [(), *IGNORED_PIXELS]}
    assert len(IGNORED_PIXELS) > 10 and len(found) == 1 + len(IGNORED_PIXELS)


def test_inputs_whose_mean_is_rounding_alone_are_one_data_set():
    dataset = several()
    deviation = torch.tensor([1.0, 2.0])
    found = {data.fingerprint(replace(
        dataset, mean=torch.tensor([noise, 0.5]), deviation=deviation))
        for noise in (1e-17, -3e-17, 0.0)}
    assert len(found) == 1


def test_files_of_other_names_and_dates_are_the_same_data():
    wanted = data.fingerprint(csv())
    shutil.copy("train.csv", "copy.csv")
    os.utime("copy.csv", (0, 0))
    assert data.fingerprint(load("y", source="copy.csv")) == wanted
