"""Text: what is tokenised comes back, once and from the cache, and every token is predicted."""

import hashlib
import itertools
import json
import mmap
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from launching import ROOT
from torch.utils.data import DataLoader

from trainlib.config import UserError
from trainlib.data import text
from trainlib.data.text import (
    PackedBlocks,
    PaddedTexts,
    Tokens,
    default_cache,
    load_tokenizer,
    tokenize,
)
from trainlib.losses import IGNORED

TEXTS = ["the cat sat on the mat", "", "Grüße, 世界", "👩‍👩‍👧 x", "a", "\n\x01 "]
SENTENCES = ["the cat sat on the mat", "the mat sat on the cat", "a dog on a mat"]
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]"]
BYTES = load_tokenizer("bytes", False)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> str:
    """A tokenizer of pairs of bytes, trained on a few sentences, that puts [CLS] and [SEP]."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.train_from_iterator(SENTENCES, tokenizers.trainers.BpeTrainer(
        vocab_size=50, special_tokens=SPECIAL, show_progress=False))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    made.enable_truncation(3)  # which is not to be heeded
    made.enable_padding(length=7)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    made.save(str(path))
    return str(path)


def saved(tokenizer_file, folder, **arguments) -> str:
    """The folder of that tokenizer as transformers saves it."""
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=tokenizer_file, unk_token="[UNK]", **arguments).save_pretrained(folder)
    return str(folder)


def word_tokenizer(path, vocabulary: dict[str, int], unknown: str) -> str:
    """A tokenizer of whole words, without special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=unknown))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path))
    return str(path)


def make(texts, cache, tokenizer=BYTES, add_end=True) -> Tokens:
    return tokenize(lambda: iter(texts), tokenizer, "here", add_end, cache)


def entries(cache) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


def refusal(*arguments, function=make, **options) -> str:
    with pytest.raises(UserError) as caught:
        function(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pickled(value):
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - what was just made


def in_memory(*texts) -> Tokens:
    """Tokens of texts that are given as lists of numbers."""
    ids = np.array(list(itertools.chain(*texts)), np.int16)
    return Tokens(ids, np.cumsum([len(each) for each in texts]), len(ids), 2**10, 999)


@pytest.mark.parametrize("add_end", [True, False])
@pytest.mark.parametrize("batch", [(1000, 2**20), (1, 2**20), (1000, 1), (4, 2**20)])
def test_bytes_come_back_as_the_texts(add_end, batch, cache, monkeypatch):
    monkeypatch.setattr(text, "_BATCH_TEXTS", batch[0])
    monkeypatch.setattr(text, "_BATCH_BYTES", batch[1])
    tokens = make(TEXTS, cache, add_end=add_end)
    assert isinstance(tokens.ids, np.memmap) and tokens.ids.dtype == np.int16
    assert tokens.ends.dtype == np.int64 and tokens.num_documents == len(TEXTS)
    assert (tokens.vocab_size, tokens.pad_id, tokens.bytes_per_token) == (256, 0, 1.0)
    starts = [0, *tokens.ends[:-1]]
    for written, start, stop in zip(TEXTS, starts, tokens.ends, strict=True):
        ids = tokens.ids[start:stop].tolist()
        assert bytes(ids) == written.encode() + b"\0" * add_end
    assert tokens.num_bytes == sum(len(each.encode()) + add_end for each in TEXTS)


def test_an_entry_is_named_by_texts_and_tokenizer_only(cache, tmp_path, tokenizer_file):
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("same text", encoding="utf-8")
        os.utime(tmp_path / f"{number}.txt", (number, number))
        make([(tmp_path / f"{number}.txt").read_text(encoding="utf-8")], cache)
        assert len(entries(cache)) == 1
    others = [["Same text"], ["same", " text"], ["same ", "text"], [" text", "same"],
              ["same text", ""], ["", "same text"]]
    for count, texts in enumerate(others, 2):
        make(texts, cache)
        assert len(entries(cache)) == count
    make(["same text"], cache, add_end=False)
    assert len(entries(cache)) == len(others) + 2
    pytest.importorskip("transformers")
    plain = load_tokenizer(tokenizer_file, False)
    special = load_tokenizer(tokenizer_file, True)
    assert len({plain.fingerprint, special.fingerprint, BYTES.fingerprint}) == 3
    folder = saved(tokenizer_file, tmp_path / "folder")
    assert load_tokenizer(folder, True).fingerprint == special.fingerprint
    with_eos = load_tokenizer(saved(tokenizer_file, tmp_path / "eos", eos_token="[SEP]"), False)
    for count, tokenizer in enumerate((plain, special, with_eos), len(others) + 3):
        make(["same text"], cache, tokenizer)
        assert len(entries(cache)) == count
    make(["same text"], cache, plain, add_end=False)  # it has no end token anyway
    assert len(entries(cache)) == count


def test_what_is_in_the_cache_is_not_tokenised_again(cache):
    calls = []
    spy = BYTES._replace(encode=lambda texts: calls.append(len(texts)) or BYTES.encode(texts))
    first, second = make(TEXTS, cache, spy), make(TEXTS, cache, spy)
    assert calls == [len(TEXTS)]
    assert np.array_equal(first.ids, second.ids) and np.array_equal(first.ends, second.ends)
    assert first[2:] == second[2:]
    [name] = entries(cache)
    about = json.loads((cache / name / "meta.json").read_text())
    assert about == {"texts": "here", "tokenizer": "bytes", "tokens": len(first.ids)}


@pytest.mark.parametrize("damage", ["ids.bin", "ends.npy"])
@pytest.mark.parametrize("size", [0, 2, 3, -1, -8, None])
def test_a_damaged_entry_is_made_anew(damage, size, cache):
    wanted = np.array(make(TEXTS, cache).ids)
    [name] = entries(cache)
    file = cache / name / damage
    if size is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:size])
    (cache / f"{name}.part").mkdir()  # of a process that was killed
    (cache / f"{name}.part" / "ids.bin").write_bytes(b"torn")
    assert np.array_equal(make(TEXTS, cache).ids, wanted)
    assert entries(cache) == {name}


def test_nothing_is_left_of_what_failed(cache):
    def interrupted(texts):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(TEXTS, cache, BYTES._replace(encode=interrupted))
    assert entries(cache) == set()
    make(TEXTS, cache)
    assert len(entries(cache)) == 1


def test_of_two_processes_one_does_the_work(cache, tmp_path):
    code = """if True:
        import os, sys, time
        from pathlib import Path
        from trainlib.data import text
        folder, me = Path(sys.argv[1]), sys.argv[2]
        bytes_ = text.load_tokenizer("bytes", False)
        def encode(texts):
            (folder / f"worked {me}").touch()
            time.sleep(1)
            return bytes_.encode(texts)
        (folder / f"ready {me}").touch()
        while len(list(folder.glob("ready *"))) < 2:
            time.sleep(0.01)
        tokens = text.tokenize(lambda: ["some", "text"], bytes_._replace(encode=encode), "here",
                               True, folder / "cache")
        print(bytes(tokens.ids.astype("u1")).hex(), tokens.ends.tolist())
    """
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(number)],
                                  cwd=ROOT, stdout=subprocess.PIPE, text=True)
                 for number in range(2)]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert said == [b"some\0text\0".hex() + " [5, 10]\n"] * 2
    assert len(list(tmp_path.glob("worked *"))) == 1
    assert len(entries(cache)) == 1


@pytest.mark.parametrize("count", [*range(2, 12), 16, 17])
@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 15, 16])
@pytest.mark.parametrize("start", [0, 3])
def test_packed_blocks_predict_every_token_but_the_first_once(count, block_size, start):
    tokens = in_memory(range(100, 105), range(105, 130))  # their border is crossed
    stop = start + count
    inputs, targets = (PackedBlocks(tokens, start, stop, block_size, is_target)
                       for is_target in (False, True))
    assert inputs.num_blocks == targets.num_blocks == -(-(count - 1) // block_size)
    rows = np.arange(inputs.num_blocks)
    given, wanted = inputs(rows), targets(rows)
    assert given.dtype == wanted.dtype == torch.int16
    assert given.shape == wanted.shape == (len(rows), block_size)
    is_real = wanted != IGNORED
    assert wanted[is_real].tolist() == list(range(101 + start, 100 + stop))
    assert given[is_real].tolist() == list(range(100 + start, 99 + stop))
    # The last token is an input only where its block is not full.
    assert set(given[~is_real].tolist()) <= {99 + stop, tokens.pad_id}
    for decoder in (inputs, targets):
        assert decoder.num_valid().equal(is_real.sum(1)) and decoder.num_valid().sum() == count - 1
    back = rows[::-1].copy()
    assert inputs(back).equal(given.flip(0)) and targets(back[:1]).equal(wanted[-1:])


@pytest.mark.parametrize(("count", "blocks"), [(1, 0), (2, 1), (8, 1), (9, 1), (10, 2)])
def test_a_block_is_full_with_one_token_more_than_its_size(count, blocks):
    tokens = in_memory(range(count))
    targets = PackedBlocks(tokens, 0, count, 8, True)
    assert targets.num_blocks == blocks and len(targets.num_valid()) == blocks
    if count == 9:
        assert targets(np.arange(1)).tolist() == [list(range(1, 9))]
        assert PackedBlocks(tokens, 0, 9, 8, False)(np.arange(1)).tolist() == [list(range(8))]
    if count == 10:
        assert targets(np.arange(2)).tolist()[1] == [9] + [IGNORED] * 7
        assert PackedBlocks(tokens, 0, 10, 8, False)(np.arange(2)).tolist()[1][:1] == [8]


def test_padded_texts_are_cut_and_filled():
    tokens = in_memory([1], [], [2, 3], [4, 5, 6], [7, 8, 9, 10])
    rows, pad, no = np.array([4, 0, 1, 3, 2, 0]), tokens.pad_id, IGNORED
    wanted = {
        None: [[7, 8], [1, pad], [pad, pad], [4, 5], [2, 3], [1, pad]],
        False: [[7, 8], [pad, pad], [pad, pad], [4, 5], [2, pad], [pad, pad]],
        True: [[8, 9], [no, no], [no, no], [5, 6], [3, no], [no, no]],
    }
    for is_target, texts in wanted.items():
        decoder = PaddedTexts(tokens, 2, is_target)
        assert decoder(rows).dtype == torch.int16 and decoder(rows).tolist() == texts
    assert PaddedTexts(tokens, 2, None).num_valid().tolist() == [1, 0, 2, 2, 2]
    for is_target in (False, True):
        assert PaddedTexts(tokens, 2, is_target).num_valid().tolist() == [0, 0, 1, 2, 2]
        assert PaddedTexts(tokens, 9, is_target).num_valid().dtype == torch.int64
    whole = PaddedTexts(tokens, 9, True)(np.arange(5))
    assert whole[whole != IGNORED].tolist() == [3, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_open_the_memory_map_and_copy_nothing(method, cache):
    tokens = make(["x" * 50_000, "yz" * 30_000], cache)
    for decoder in (PackedBlocks(tokens, 0, len(tokens.ids), 1000, True),
                    PaddedTexts(tokens, 300, None)):
        assert len(pickle.dumps(decoder)) < 2000
        row_lists = [np.array([1, 0]), np.array([1])]
        loader = DataLoader(row_lists, batch_size=None, collate_fn=decoder, num_workers=1,
                            multiprocessing_context=method)
        for read, rows in zip(loader, row_lists, strict=True):
            assert read.equal(decoder(rows))
    opened = pickled(tokens)
    assert isinstance(opened.ids.base, mmap.mmap) and isinstance(opened.ends.base, mmap.mmap)
    assert np.array_equal(opened.ids, tokens.ids) and np.array_equal(opened.ends, tokens.ends)
    part = tokens._replace(ids=tokens.ids[10:20], ends=np.array([10]), vocab_size=300)
    opened = pickled(part)
    assert np.array_equal(opened.ids, part.ids) and opened.vocab_size == 300


def test_hugging_face_tokenizers_give_what_transformers_gives(tokenizer_file, tmp_path, cache):
    transformers = pytest.importorskip("transformers")
    folder = saved(tokenizer_file, tmp_path / "folder", pad_token="[PAD]", sep_token="[SEP]",
                   cls_token="[CLS]", model_max_length=4)
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [*SENTENCES, "", "a [SEP] z", "the cat " * 100]
    for add_special in (True, False):
        from_folder = load_tokenizer(folder, add_special)
        assert (from_folder.pad_id, from_folder.end_id) == (3, 2)  # it has no end but [SEP]
        from_file = load_tokenizer(tokenizer_file, add_special)
        assert (from_file.pad_id, from_file.end_id) == (3, None)  # the padding that it tells of
        wanted = reference(texts, add_special_tokens=add_special, verbose=False)["input_ids"]
        for tokenizer in (from_folder, from_file):
            assert tokenizer.vocab_size == len(reference)
            assert [ids.tolist() for ids in tokenizer.encode(texts)] == wanted
        tokens = make(texts, cache, from_folder)
        ids = np.split(tokens.ids, tokens.ends[:-1])
        assert [each.tolist() for each in ids] == [[*each, 2] for each in wanted]
        assert tokens.num_bytes == sum(map(len, texts))  # an end token is no byte of them
        assert tokens.bytes_per_token == tokens.num_bytes / len(tokens.ids)
    assert wanted[0] and wanted[3] == []
    words = word_tokenizer(tmp_path / "words.json", {"a": 0, "b": 1, "[UNK]": 2, "end": 3}, "a")
    ended = load_tokenizer(saved(words, tmp_path / "ended", eos_token="end"), False)
    assert (ended.pad_id, ended.end_id) == (3, 3)  # it has no padding but its end


def test_large_vocabularies_have_numbers_of_32_bits(tmp_path, cache):
    pytest.importorskip("transformers")
    for count, dtype in ((2**15, np.int16), (2**15 + 1, np.int32)):
        words = {f"w{number}": number for number in range(count - 1)} | {"[PAD]": count - 1}
        tokenizer = load_tokenizer(word_tokenizer(tmp_path / "words.json", words, "w0"), True)
        assert (tokenizer.pad_id, tokenizer.end_id) == (count - 1, None)
        tokens = make([f"w{count - 2} w1", "other"], cache, tokenizer)
        assert (tokenizer.vocab_size, tokens.vocab_size, tokens.ids.dtype) == (count, count, dtype)
        assert tokens.ids.tolist() == [count - 2, 1, 0]
        assert PackedBlocks(tokens, 0, 3, 2, True)(np.arange(1)).numpy().dtype == dtype
    with_gap = word_tokenizer(tmp_path / "gap.json", {"a": 0, "b": 70_000}, "a")
    tokenizer = load_tokenizer(with_gap, True)
    # No real token is taken for padding, where none is there for it.
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (70_001, 70_002)


def test_texts_that_cannot_be_tokenised_are_named(cache, tmp_path):
    assert "here, row 2: the text is missing or not Unicode" in refusal(["a", "", "b\ud800"], cache)
    assert "here, row 1: the text is missing" in refusal(["a", None], cache)
    for nothing in ([], [""], ["", ""]):
        assert f"here: there is no text in {len(nothing)} rows" in refusal(nothing, cache)
    silent = BYTES._replace(encode=lambda texts: [np.array([], np.uint8) for _ in texts])
    assert "or none that bytes makes a token of" in refusal(["a"], cache, silent, add_end=False)
    assert entries(cache) == set()
    passes = itertools.count()
    with pytest.raises(UserError, match="were others when they were read again"):
        tokenize(lambda: [f"pass {next(passes)}"], BYTES, "here", True, cache)
    (tmp_path / "file").touch()
    assert "XDG_CACHE_HOME names another place" in refusal(["a"], tmp_path / "file")
    pytest.importorskip("transformers")
    words = word_tokenizer(tmp_path / "words.json", {"a": 0, "b": 1}, "[UNK]")  # which it lacks
    tokenizer = load_tokenizer(words, True)
    assert "here, at or before row 1: " in refusal(["a", "c"], cache, tokenizer)


def test_tokenizers_that_cannot_be_had_are_refused_in_a_line(tmp_path, tokenizer_file, monkeypatch):
    def told(name) -> str:
        message = refusal(str(name), True, function=load_tokenizer)
        assert message.startswith(f"data.tokenizer: {name}")
        return message

    transformers = pytest.importorskip("transformers")
    for name in ("empty", "model", "broken"):
        (tmp_path / name).mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken/tokenizer.json").write_text("{}")
    (tmp_path / "torn.json").write_text("{")
    unread = "is neither bytes nor a tokenizer that can be read here or from the Hugging Face Hub"
    for name in ("empty", "broken", "torn.json", "none.json", "none"):
        assert unread in told(tmp_path / name)
    for name in ("nobody/nothing", "bites"):
        assert unread in told(name)
    assert "has no vocabulary, only 5 special tokens" in told(tmp_path / "model")
    transformers.ByT5Tokenizer().save_pretrained(tmp_path / "slow")
    assert "is a ByT5Tokenizer, which has no fast form" in told(tmp_path / "slow")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "the package 'transformers' is not installed" in told(tokenizer_file)
    assert load_tokenizer("bytes", True).fingerprint == hashlib.sha256(b"bytes").hexdigest()


def test_the_cache_is_where_the_users_caches_are(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "one_curve" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "one_curve" / "tokens"
