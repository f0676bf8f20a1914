"""Decoding: what a file or table holds is what the model gets, or the row is named."""

import io
import sys

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from launching import load
from PIL import Image
from pyarrow import parquet

from trainlib.config import UserError
from trainlib.data import loading

RANDOM = np.random.default_rng(0)
LABELS = ["a", "b"] * 4
ORIENTATION = 0x0112  # EXIF's tag


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def encode(pixels, form="PNG", mode=None, **arguments) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels, mode)
    buffer = io.BytesIO()
    image.save(buffer, form, **arguments)
    return buffer.getvalue()


def noise(*shape) -> np.ndarray:
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def as_struct(files: list) -> pyarrow.Array:
    struct = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array([{"bytes": file, "path": None} for file in files], struct)


def read(tmp_path, column, **options):
    """The data set of eight rows of two classes; the first half of them is trained on."""
    if not isinstance(column, pyarrow.Array):
        column = as_struct(column)
    for name, part in (("train", column[:4]), ("other", column[4:])):
        part = pyarrow.table({"x": part, "label": LABELS[:4]})
        parquet.write_table(part, tmp_path / f"{name}.parquet")
    return load("label", source=str(tmp_path / "train.parquet"),
                validation_split=str(tmp_path / "other.parquet"), **options)


def inputs(dataset) -> torch.Tensor:
    return torch.cat([dataset.train.inputs, dataset.validation.inputs])


def refusal(tmp_path, column, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, column, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1), (1, 1, 3)])
def test_images_keep_their_pixels_in_whatever_column_they_lie(shape, tmp_path):
    pixels = noise(8, *shape)
    files = [encode(each) for each in pixels]
    wanted = torch.from_numpy(pixels.reshape(8, *shape[:2], -1)).permute(0, 3, 1, 2)
    nested = as_struct(files)
    for column in (nested, pyarrow.array(files), pyarrow.array(files, pyarrow.large_binary()),
                   pyarrow.StructArray.from_arrays([nested.field("path"), nested.field("bytes")],
                                                   ["path", "bytes"])):
        assert inputs(read(tmp_path, column)).equal(wanted)
    for number, file in enumerate(files):
        (tmp_path / f"{number}.png").write_bytes(file)
    table = datasets.Dataset.from_dict(
        {"x": [str(tmp_path / f"{number}.png") for number in range(8)], "label": LABELS},
    ).cast_column("x", datasets.Image())
    table.to_parquet(str(tmp_path / "table.parquet"))
    dataset = load("label", source=str(tmp_path / "table.parquet"), validation_split=0.5)
    for part in (dataset.train, dataset.validation):
        assert part.inputs.equal(wanted[part.rows])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_images_are_what_pillow_decodes(mode, tmp_path):
    files = [encode(noise(9, 16, *([3] if mode == "RGB" else [])), "JPEG") for _ in range(8)]
    decoded = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    wanted = torch.from_numpy(np.stack(decoded)).view(8, 9, 16, -1).permute(0, 3, 1, 2)
    assert inputs(read(tmp_path, files)).equal(wanted)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_images_stand_upright_as_their_camera_says(form, tmp_path):
    upright = np.kron([[0, 60, 120], [180, 220, 250]], np.ones((8, 8))).astype(np.uint8)
    # What the camera stored, by the turn or mirror that its tag asks for.
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
              5: upright.T, 6: np.rot90(upright, 1), 7: upright[::-1, ::-1].T,
              8: np.rot90(upright, 3)}
    files = []
    for tag, pixels in stored.items():
        exif = Image.Exif()
        exif[ORIENTATION] = tag
        files.append(encode(np.ascontiguousarray(pixels), form, exif=exif))
    distance = inputs(read(tmp_path, files)).int() - torch.from_numpy(upright).int()
    assert distance.abs().max() <= (0 if form == "PNG" else 3)  # JPEG's own rounding


def test_other_modes_become_grey_or_colour(tmp_path):
    colours = noise(8, 4, 6, 3) // 64 * 64
    palettes = [Image.fromarray(each).quantize(256) for each in colours]
    wanted = torch.from_numpy(colours).permute(0, 3, 1, 2)
    seen = bytes(range(256))  # of a palette's colours
    assert inputs(read(tmp_path, [encode(each) for each in palettes])).equal(wanted)
    assert inputs(read(tmp_path, [encode(p, transparency=seen) for p in palettes])).equal(wanted)
    with_alpha = np.concatenate([colours, noise(8, 4, 6, 1)], 3)
    assert inputs(read(tmp_path, [encode(each) for each in with_alpha])).equal(wanted)
    grey = noise(8, 4, 6, 2)
    files = [encode(Image.fromarray(each, "LA")) for each in grey]
    assert inputs(read(tmp_path, files)).equal(torch.from_numpy(grey[:, None, :, :, 0]))
    bits = noise(8, 4, 6) // 128 * 255
    files = [encode(Image.fromarray(each).convert("1")) for each in bits]
    assert inputs(read(tmp_path, files)).equal(torch.from_numpy(bits[:, None]))


def test_channels_are_those_of_the_first_image_or_as_chosen(tmp_path):
    grey, colour = [encode(noise(3, 4)) for _ in range(4)], [encode(noise(3, 4, 3))] * 4
    assert inputs(read(tmp_path, colour + grey)).shape == (8, 3, 3, 4)
    for channels in (1, 3):
        mixed = inputs(read(tmp_path, grey + colour, channels=channels))
        assert mixed.shape == (8, channels, 3, 4)
        assert mixed[0].equal(mixed[0, :1].expand(channels, -1, -1))  # grey in colour
    assert "other.parquet, row 0: in colour, the first image is grey" in refusal(
        tmp_path, grey + colour)


def test_images_are_scaled_to_cover_the_size_and_cut_about_the_centre(tmp_path):
    wide = np.repeat([[0, 0, 50, 100, 200, 250, 0, 0]], 4, 0).astype(np.uint8)
    kept = inputs(read(tmp_path, [encode(wide)] * 8, image_size=4))
    assert kept[0, 0, 0].tolist() == [50, 100, 200, 250]
    assert inputs(read(tmp_path, [encode(wide.T)] * 8, image_size=[2, 4])).shape == (8, 1, 2, 4)
    sizes = [encode(np.full((height, 5), height, np.uint8)) for height in range(1, 9)]
    scaled = inputs(read(tmp_path, sizes, image_size=[6, 5]))
    assert scaled.shape == (8, 1, 6, 5)
    assert scaled.flatten(1).unique(dim=1).tolist() == [[height] for height in range(1, 9)]
    assert inputs(read(tmp_path, [encode(wide)] * 8, image_size=[4, 8])).equal(
        torch.from_numpy(wide).expand(8, 1, 4, 8))
    assert "other.parquet, row 0: 5x5 pixels, the first image has 1x5" in refusal(
        tmp_path, [sizes[0]] * 4 + sizes[4:])


@pytest.mark.parametrize("options", [
    {"workers": 0}, {"workers": 2}, {"in_memory": False, "workers": 0},
    {"in_memory": False, "workers": 2},
], ids=str)
def test_an_image_that_cannot_be_read_is_named_by_row_and_file(options, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "CHUNK_BYTES", 1)  # so that workers have a part in it
    good = encode(noise(8, 8))
    deep = encode(noise(8, 8).astype(np.uint16) * 200)
    for bad, told in ((b"torn", "in no format that Pillow knows"), (good[:60], "truncated"),
                      (b"", "in no format"), (None, "the image is missing"),
                      (deep, "more than 8 bits a channel")):
        for row, name in ((0, "train"), (2, "train"), (5, "other")):
            files = [good] * 8
            files[row] = bad
            message = refusal(tmp_path, files, **options)
            assert f"{name}.parquet, row {row % 4}: " in message and told in message
    for row in range(4):
        (tmp_path / f"images/{row % 2}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"images/{row % 2}/{row}.png").write_bytes(good if row < 3 else b"torn")
    with pytest.raises(UserError, match=r"images, row 3 \(.*images/1/3.png\): not an image"):
        load("label", source=str(tmp_path / "images"), validation_split=0.5, **options)


def test_images_without_pillow_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "images need the package Pillow" in refusal(tmp_path, [b""] * 8)


def test_numbers_come_from_columns_and_from_lists_of_any_depth(tmp_path):
    cube = RANDOM.normal(size=(8, 2, 3, 4)).astype(np.float32)
    nested = pyarrow.array(cube.tolist())
    assert inputs(read(tmp_path, nested)).equal(torch.from_numpy(cube))
    fixed = pyarrow.FixedSizeListArray.from_arrays(cube.reshape(8, -1).ravel(), 24)
    assert inputs(read(tmp_path, fixed)).equal(torch.from_numpy(cube.reshape(8, 24)))
    for type_ in (pyarrow.int8(), pyarrow.uint16(), pyarrow.int64(), pyarrow.float16(),
                  pyarrow.float64(), pyarrow.decimal128(20, 1)):
        column = pyarrow.array(range(8)).cast(type_, safe=False)
        wanted = torch.arange(8, dtype=torch.float32)[:, None]
        assert inputs(read(tmp_path, column)).equal(wanted)
    bits = pyarrow.array([row % 3 == 0 for row in range(8)])
    assert inputs(read(tmp_path, bits)).flatten().tolist() == [1, 0, 0, 1, 0, 0, 1, 0]
    features = datasets.Features(x=datasets.Array2D((3, 4), "float32"),
                                 label=datasets.ClassLabel(names=["a", "b"]))
    table = datasets.Dataset.from_dict({"x": cube[:, 0], "label": [0, 1] * 4}, features)
    table.to_parquet(str(tmp_path / "table.parquet"))
    dataset = load("label", source=str(tmp_path / "table.parquet"), validation_split=0.5)
    for part in (dataset.train, dataset.validation):
        assert part.inputs.equal(torch.from_numpy(cube[:, 0])[part.rows])


def test_columns_are_taken_by_name_in_that_order_or_all_numbers_but_the_target(tmp_path):
    rows = {"b": [1.0, 2, 3, 4], "name": list("wxyz"), "a": [5, 6, 7, 8], "kind": [0, 1, 0, 1]}
    datasets.Dataset.from_dict(rows).to_csv(str(tmp_path / "table.csv"))

    def numbers(**options):
        dataset = load("kind", source=str(tmp_path / "table.csv"), validation_split=0.5, **options)
        return sorted(inputs(dataset).tolist())

    assert numbers() == [[1, 5], [2, 6], [3, 7], [4, 8]]
    assert numbers(input=["a", "b"]) == [[5, 1], [6, 2], [7, 3], [8, 4]]
    assert numbers(input="a") == [[5], [6], [7], [8]]
    for given, told in (("aa", "did you mean 'a'"), ("kind", "is the target"), ([], "one or more"),
                        (["a", "a"], "each once"), ("name", "'name' holds text, which"),
                        (["a", "name"], "the source has b (number), name (text), a (integer)")):
        with pytest.raises(UserError) as caught:
            numbers(input=given)
        assert told in str(caught.value)
    rows |= {"u": [[1.0]] * 4, "v": [[1.0]] * 4}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "table.parquet"))
    with pytest.raises(UserError, match="several columns could be the input: u, v"):
        load("kind", source=str(tmp_path / "table.parquet"))
    datasets.Dataset.from_dict({"kind": [0, 1], "t": ["x", "y"]}).to_csv(str(tmp_path / "t.csv"))
    with pytest.raises(UserError, match=r"besides the target; the source has kind .*, t \(text\)"):
        load("kind", source=str(tmp_path / "t.csv"))


def test_integers_in_lists_stay_integers_where_nothing_is_normalised(tmp_path):
    tokens = [[row, 2**40 + row] for row in range(8)]
    kept = inputs(read(tmp_path, pyarrow.array(tokens), normalize=False))
    assert kept.dtype == torch.int64 and kept.tolist() == tokens
    assert inputs(read(tmp_path, pyarrow.array(tokens))).dtype == torch.float32
    column = pyarrow.array(range(8))
    assert inputs(read(tmp_path, column, normalize=False)).dtype == torch.float32
    tokens[2][1] = None
    assert "train.parquet, row 2: 'x' lacks a number in its list" in refusal(
        tmp_path, pyarrow.array(tokens), normalize=False)


@pytest.mark.parametrize("in_memory", [True, False])
def test_lists_that_do_not_fit_are_named_by_row(in_memory, tmp_path):
    def told(good, bad, row, **options):
        rows = [good] * 8
        rows[row] = bad
        column = pyarrow.array(rows, pyarrow.array([good]).type)
        return refusal(tmp_path, column, in_memory=in_memory, **options)

    assert "train.parquet, row 3: 'x' has a list of 1, the first row has 2" in told(
        [1.0, 2.0], [1.0], 3)
    assert "other.parquet, row 1: 'x' has a list of 3" in told([1.0, 2.0], [1.0, 2.0, 3.0], 5)
    assert "train.parquet, row 2: 'x' has no list" in told([1.0, 2.0], None, 2)
    assert "row 2: 'x' has a list of 3, the first row has 1" in told(
        [[1.0], [2.0]], [[1.0], [2.0, 3.0, 4.0]], 2)
    assert "row 2: 'x' has no list, the first row has 1" in told([[1.0], [2.0]], [[1.0], None], 2)
    assert "row 0: 'x' has no list or an empty one" in told([1.0], None, 0)
    assert "row 0: 'x' has no list or an empty one" in told([[1.0]], [[]], 0)


def test_a_validation_file_must_hold_lists_alike(tmp_path):
    def told(train, other, **options):
        for name, rows in (("train", train), ("other", other)):
            table = pyarrow.table({"x": rows, "label": ["a", "b"]})
            parquet.write_table(table, tmp_path / f"{name}.parquet")
        with pytest.raises(UserError) as caught:
            load("label", source=str(tmp_path / "train.parquet"),
                 validation_split=str(tmp_path / "other.parquet"), **options)
        return str(caught.value)

    assert "holds lists of double, 2 deep; in training they hold float, 1 deep" in told(
        [[1.0], [2.0]], [[[1.0]], [[2.0]]])
    assert "holds lists of double, 1 deep; in training they hold int64" in told(
        [[1], [2]], [[1.5], [2.5]], normalize=False)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), 1e300])
def test_missing_and_infinite_numbers_are_counted(in_memory, normalize, bad, tmp_path):
    def told(rows, options):
        message = refusal(tmp_path, pyarrow.array(rows), **options)
        return message.partition(": ")[2].partition(";")[0]

    options = {"in_memory": in_memory, "normalize": normalize}
    wanted = "missing, NaN or infinite inputs in 2 of 4 samples, first in row 1"
    assert told([1.0, bad, 2.0, bad, *range(4)], options) == f"{wanted}, in x"  # the column
    assert told([*range(4), 1.0, bad, 2.0, bad], options) == f"{wanted}, in x"
    assert told([[1.0, 2.0], [bad, 1.0], [1.0, 2.0], [0.0, bad]] + [[1.0, 2.0]] * 4,
                options) == wanted
