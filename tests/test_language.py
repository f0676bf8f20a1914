"""Texts: the splits of language modelling, texts as inputs, and what is refused in a line."""

import gzip

import numpy as np
import pyarrow
import pytest
import torch
from launching import load
from pyarrow import parquet
from tables import refusal

from trainlib.losses import IGNORED
from trainlib.tasks import TaskOptions

pytestmark = pytest.mark.usefixtures("own_folder")
LETTERS = "".join(chr(33 + place % 90) for place in range(1000))
TEXTS = ["Grüße", "", "a" * 30, None, "hello world", "b", "cc", "世界", "d " * 9, "e"] * 3
WHOLE = [text or "" for text in TEXTS]


def write(name="train", **columns) -> str:
    parquet.write_table(pyarrow.table(columns), f"{name}.parquet")
    return f"{name}.parquet"


def model(source, *, target="text", **options):
    """The data set of language modelling on a column."""
    task = TaskOptions(kind="language_modeling", target=target)
    return load(tasks={"text": task}, source=source, **{"tokenizer": "bytes"} | options)


def classify(source, kind="classification", **options):
    return load(tasks={"y": TaskOptions(kind=kind, target="y")}, source=source,
                **{"tokenizer": "bytes"} | options)


def stream(split) -> tuple[bytes, bytes]:
    """The tokens that are seen where something is predicted, and those that are."""
    inputs, stored = split.read(np.arange(len(split)))
    targets = split.task_targets(stored)["text"]
    counts = (targets != IGNORED).sum(1)
    assert split.num_valid["text"].equal(counts)
    return tuple(bytes(part[targets != IGNORED].tolist()) for part in (inputs, targets))


# ---- language modelling ----

@pytest.mark.parametrize("share", [0.1, 0.5, 1 / 3])
@pytest.mark.parametrize("block_size", [1, 7, 64])
@pytest.mark.parametrize("options", [{}, {"in_memory": False, "workers": 1}])
def test_of_one_text_the_last_part_is_held_out_and_all_is_predicted(share, block_size, options):
    with open("one.txt", "w") as file:
        file.write(LETTERS)
    dataset = model("one.txt", validation_split=share, block_size=block_size, **options)
    seen, predicted = zip(*map(stream, (dataset.train, dataset.validation)), strict=True)
    whole = LETTERS.encode() + b"\0"
    assert whole.startswith(seen[0]) and whole.endswith(predicted[1])
    assert seen[0][1:] == predicted[0][:-1] and seen[1][1:] == predicted[1][:-1]
    assert abs(len(predicted[1]) - share * len(whole)) <= block_size + 1
    inputs, targets = dataset.example()
    assert inputs.dtype == targets["text"].dtype == torch.int64
    assert (dataset.token_range, dataset.pad_id, dataset.mean) == ((0, 255), 0, None)
    assert dataset.targets["text"].vocab_size == 256 and dataset.targets["text"].label_names == []
    assert predicted[0] + predicted[1] == whole[1:]


def test_of_several_texts_a_keyed_sample_is_held_out():
    for number in range(20):
        with open(f"part{number}.txt", "w") as file:
            file.write(f"{number:02d}" * (5 * number))  # the first is empty
    by_file = model("part*.txt", block_size=8)
    by_row = model(write(text=[f"{number:02d}" * (5 * number) for number in range(20)]),
                   block_size=8)
    for dataset in (by_file, by_row):
        parts = [b"".join((seen[:1], predicted)) for seen, predicted in
                 map(stream, (dataset.train, dataset.validation))]
        texts = [part.decode().split("\0")[:-1] for part in parts]
        found = [{text[:2] for text in part if text} for part in texts]
        assert found[0] | found[1] == {f"{number:02d}" for number in range(1, 20)}
        assert not found[0] & found[1] and len(texts[1]) == 2
        assert all(text == text[:2] * (5 * int(text[:2]))
                   for part in texts for text in part if text)
        again = model("part*.txt" if dataset is by_file else "train.parquet", block_size=8)
        assert stream(again.validation) == stream(dataset.validation)


@pytest.mark.parametrize("packing", [True, False])
def test_another_file_is_validated_on_whole(packing):
    other = ["xyz" * 5, None, "yes"]
    dataset = model(write(text=TEXTS), validation_split=write("other", text=other),
                    block_size=16, packing=packing)
    for split, texts in ((dataset.train, TEXTS), (dataset.validation, other)):
        encoded = [(text or "").encode() + b"\0" for text in texts]
        seen, predicted = stream(split)
        if packing:
            assert predicted == b"".join(encoded)[1:] and seen == b"".join(encoded)[:-1]
        else:
            assert predicted == b"".join(text[1:17] for text in encoded)
            assert seen == b"".join(text[:-1][:16] for text in encoded)
            assert split.num_valid["text"].tolist() == [min(len(t) - 1, 16) for t in encoded]
            assert split.read(np.arange(2))[0].shape == (2, 16)
    assert dataset.targets["text"].bytes_per_token == 1
    assert packing or dataset.targets["text"].may_miss  # an empty text predicts nothing


def test_bytes_per_token_are_those_of_what_is_validated_on_or_of_one_whole_text():
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    words = tokenizers.models.WordLevel({"a": 0, "wonderful": 1, "[UNK]": 2}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.save("words.json")
    options = {"tokenizer": "words.json", "block_size": 10}
    dataset = model(write(text=["a " * 50] * 3), validation_split=write("other", text=[
        "wonderful " * 50]), **options)
    assert dataset.targets["text"].bytes_per_token == 10 and dataset.token_range == (0, 3)
    one = model(write(text=["a " * 900 + "wonderful " * 100]), **options)
    assert one.targets["text"].bytes_per_token == pytest.approx(2.8, rel=0.02)


def test_what_language_modelling_cannot_read_is_refused():
    with open("one.txt", "w") as file:
        file.write(LETTERS)
    with gzip.open("zipped.txt.gz", "wt") as file:
        file.write(LETTERS)
    table = write(text=TEXTS, y=list(range(30)))
    assert "one.txt, validation part: 105 tokens are less than one block of 128 and" in refusal(
        model, "one.txt", block_size=128)
    assert "are less than one block of 901" in refusal(model, "one.txt", block_size=901)
    assert len(stream(model("zipped.txt.gz", block_size=16).validation)[1]) > 90
    assert "data.packing: one.txt is one text, of which a part is held out; leave" in refusal(
        model, "one.txt", packing=False)
    assert "data.tokenizer: text needs one: --data.tokenizer bytes" in refusal(
        model, "one.txt", tokenizer=None)
    for names in (("text", "y"), ("y", "text")):
        both = {name: TaskOptions(kind="language_modeling" if name == "text" else "classification",
                                  target=name) for name in names}
        assert f"tasks: language_modeling is a job of its own, got {', '.join(names)}" in refusal(
            load, tasks=both, source=table, tokenizer="bytes")
    assert "'y' holds integer values; language_modeling needs a column of text" in refusal(
        model, table, target="y")
    assert "one column of text is needed, got text, y" in refusal(
        model, table, target=["text", "y"])
    assert "language_modeling sees the text that it predicts, 'text'" in refusal(
        model, table, input="y")
    assert "other.parquet: has no column 'text' of text; did you mean 'texts'?" in refusal(
        model, table, validation_split=write("other", texts=["a"]))
    for option in ({"channels": 1}, {"image_size": 8}):
        assert "is text; leave it out" in refusal(model, table, **option)
    for nothing in ([None, ""], [""]):
        column = pyarrow.array(nothing, pyarrow.string())
        assert "there is no text in" in refusal(model, write("nothing", text=column), block_size=1)
    with open("latin.txt", "wb") as file:
        file.write("Grüße".encode("latin-1") * 100)
    assert "latin.txt cannot be read: UnicodeDecodeError" in refusal(model, "latin.txt")


def test_too_short_a_split_is_named():
    with open("one.txt", "w") as file:
        file.write(LETTERS)
    assert "validation" in refusal(model, "one.txt", block_size=128).partition("; give")[0]


def test_the_reference_of_python_comes_with_it():
    dataset = model("builtin:pydocs", block_size=256)
    from pydoc_data.topics import topics

    texts = {text.encode() for text in topics.values()}
    seen, predicted = stream(dataset.validation)
    held = (seen[:1] + predicted).split(b"\0")[:-1]
    assert set(held) <= texts and len(held) == round(len(topics) / 10)
    assert "is for language_modeling, got classification" in refusal(
        load, tasks={"text": TaskOptions(target="text")}, source="builtin:pydocs")
    assert "language_modeling is a job of its own, got a, b" in refusal(load, tasks={
        name: TaskOptions(kind="language_modeling", target="text") for name in "ab"
    }, source="builtin:pydocs", tokenizer="bytes")
    assert "data.validation_split: has no meaning here, builtin:pydocs is" in refusal(
        model, "builtin:pydocs", validation_split=0.2)
    assert "'digit' of builtin:digits is for classification, got language_modeling" in refusal(
        load, tasks={"t": TaskOptions(kind="language_modeling", target="digit")})


# ---- texts as inputs ----

@pytest.mark.parametrize("options", [{}, {"in_memory": False, "workers": 1}])
@pytest.mark.parametrize("block_size", [4, 256])
def test_texts_as_inputs_are_padded_to_the_longest_but_at_most_block_size(options, block_size):
    other = ["x" * 300, "y"]
    dataset = classify(write(text=WHOLE, y=["p", "q"] * 15), block_size=block_size,
                       validation_split=write("other", text=other, y=["q", "p"]), **options)
    length = min(block_size, 30)
    for split, texts in ((dataset.train, WHOLE), (dataset.validation, other)):
        wanted = [(text or "").encode()[:length].ljust(length, b"\0") for text in texts]
        inputs, targets = split.read(np.arange(len(split)))
        assert [bytes(row) for row in inputs.tolist()] == wanted
    assert targets["y"].tolist() == [1, 0] and dataset.mean is None
    assert (dataset.token_range, dataset.pad_id) == ((0, 255), 0)
    assert dataset.example()[0].dtype == torch.int64


def test_texts_are_inputs_of_other_kinds_of_tasks():
    numbers = classify(write(text=WHOLE, y=np.arange(30.0)), "regression")
    assert numbers.train.targets["y"].dtype == torch.float64 and len(numbers.validation) == 3
    labels = classify(write(text=WHOLE, y=[["a"], ["b", "a"]] * 15), "multilabel")
    assert labels.targets["y"].label_names == ["a", "b"]


def test_what_does_not_fit_texts_as_inputs_is_refused():
    table = write(text=WHOLE, n=np.arange(30.0), y=["p", "q"] * 15)
    assert "data.input: 'text' holds text, which needs a tokenizer" in refusal(
        classify, table, tokenizer=None, input="text")
    assert "data.tokenizer: the input 'n' holds number values, no text; leave it out" in refusal(
        classify, table, input="n")
    assert "several columns could be the input: text, more; choose one" in refusal(
        classify, write(text=WHOLE, more=WHOLE, y=["p", "q"] * 15))
    assert "data.image_size: has no meaning here" in refusal(
        classify, write(text=WHOLE, y=["p", "q"] * 15), image_size=8)
    assert "there is no text in 2 rows" in refusal(
        classify, write(text=["", ""], y=["p", "q"]), validation_split=write(
            "other", text=["a"], y=["p"]))


def test_missing_texts_are_refused_as_inputs():
    table = write(text=TEXTS, y=["p", "q"] * 15)
    assert "the text 'text' is missing in 3 of 30 rows, first in row 3" in refusal(classify, table)
