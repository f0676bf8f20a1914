"""Labels, the held-out share, and normalisation."""

import inspect

import datasets
import numpy as np
import pytest
import torch
from launching import load

from trainlib import data
from trainlib.config import UserError
from trainlib.data import loading, sources
from trainlib.data.decoding import ImageDecoder
from trainlib.data.loading import Moments

RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def write(tmp_path, labels, name="train", **features) -> str:
    table = datasets.Dataset.from_dict({"x": [float(i) for i in range(len(labels))], "y": labels})
    for column, feature in features.items():
        table = table.cast_column(column, feature)
    table.to_parquet(str(tmp_path / f"{name}.parquet"))
    return str(tmp_path / f"{name}.parquet")


def refusal(*targets, **options) -> str:
    with pytest.raises(UserError) as caught:
        load(*targets, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- labels ----

@pytest.mark.parametrize("values, names", [
    (["fig", "apple", "fig", "Pear"], ["Pear", "apple", "fig"]),
    ([7, -2, 7, 1000], ["-2", "7", "1000"]),
    ([True, False, True, True], ["False", "True"]),
    ([2, 1, 0, 2], ["0", "1", "2"]),
])
def test_classes_are_the_values_in_ascending_order_and_keep_their_names(values, names, tmp_path):
    dataset = load("y", source=write(tmp_path, values),
                   validation_split=write(tmp_path, values[::-1][:2], "other"))
    assert dataset.targets["y"].label_names == names
    classes = sorted(set(values))
    wanted = torch.tensor([classes.index(value) for value in values])
    assert dataset.train.targets["y"].equal(wanted)
    assert dataset.validation.targets["y"].equal(wanted.flip(0)[:2])


def test_class_labels_are_matched_by_name_and_all_their_names_are_kept(tmp_path):
    train = write(tmp_path, [2, 0, 2, 0], y=datasets.ClassLabel(names=["z", "never", "a"]))
    assert load("y", source=train).targets["y"].label_names == ["z", "never", "a"]
    for other in (
        write(tmp_path, [0, 1], "numbered", y=datasets.ClassLabel(names=["z", "a"])),
        write(tmp_path, ["z", "a"], "named"),
    ):
        dataset = load("y", source=train, validation_split=other)
        assert dataset.validation.targets["y"].tolist() == [0, 2]
        swapped = load("y", source=other, validation_split=train)
        assert swapped.validation.targets["y"].tolist() == [
            swapped.targets["y"].label_names.index(name) for name in "azaz"]
    unseen = write(tmp_path, [1, 0], "unseen", y=datasets.ClassLabel(names=["z", "never"]))
    assert "not have ('never') in 1 of 2 rows, first in row 0" in refusal(
        "y", source=train, validation_split=unseen)


def test_columns_that_could_be_the_target_are_offered(tmp_path):
    def candidates(**columns):
        datasets.Dataset.from_dict(columns).to_parquet(str(tmp_path / "table.parquet"))
        source = data.open_source(data.DataOptions(source=str(tmp_path / "table.parquet")))
        return source.target_candidates

    assert candidates(a=[1.0], b=["x"], c=[1]) == ["b", "c"]
    assert candidates(a=[1.0], c=[1], d=[True]) == ["c", "d"]
    assert candidates(a=[1.0]) == []


def test_labels_that_are_none_are_refused(tmp_path):
    def told(values, **features):
        return refusal("y", source=write(tmp_path, values, **features))

    names = datasets.ClassLabel(names=["a", "b"])
    assert "the target 'y' is missing in 2 of 4 rows, first in row 1" in told(
        ["a", None, "b", None])
    assert "the target 'y' is missing in 1 of 4 rows, first in row 3" in told([0, 1, 1, None])
    assert "the target 'y' is missing (-1) in 1 of 3 rows, first in row 2" in told(
        [0, 1, -1], y=names)
    (tmp_path / "gap.csv").write_text("x,y\n1,0\n2,1\n3,\n")  # read as fractions
    assert "the target 'y' is missing in 1 of 3 rows, first in row 2" in refusal(
        "y", source=str(tmp_path / "gap.csv"))
    assert "'y' holds number values; the target of a classification" in told([0.5, 1.5])
    assert "'y' holds list values; the target of a classification" in told([[1], [2]])
    assert "'y' has one class only (a)" in told(["a", "a", "a"])
    assert "'y' has one class only (b)" in told([1, 1, 1], y=names)


def test_rows_in_messages_are_rows_of_the_table_as_it_was_saved(tmp_path):
    values = [float(row) for row in range(40)]
    values[31] = float("nan")
    table = datasets.Dataset.from_dict({"x": values, "y": ["a", "b"] * 20})
    for name, made in (("shuffled", table.shuffle(seed=3).select(range(5, 40))),
                       ("sorted", table.select(range(39, -1, -1)))):
        made.save_to_disk(tmp_path / name)
        (tmp_path / f"{name}.py").write_text(
            "import datasets\ndef rows():\n"
            f"    table = datasets.Dataset.from_dict({table.to_dict()!r}".replace("nan", "None")
            + ")\n    return table." + {"shuffled": "shuffle(seed=3).select(range(5, 40))",
                                        "sorted": "select(range(39, -1, -1))"}[name])
        row = int(np.flatnonzero(np.isnan(made["x"][:]))[0])
        for source in (str(tmp_path / name), f"{tmp_path}/{name}.py:rows"):
            for share in (0.1, 0.5, 0.9):  # in either part
                message = refusal("y", source=source, validation_split=share)
                assert f"first in row {row}, in x;" in message
    made = table.map(lambda row: {"y": None if np.isnan(row["x"]) else row["y"]})
    made.select(range(10, 40)).save_to_disk(tmp_path / "labels")
    assert "in 1 of 30 rows, first in row 21;" in refusal("y", source=str(tmp_path / "labels"))


# ---- the held-out share ----

@pytest.mark.parametrize("share", [0.05, 0.1, 1 / 3, 0.5, 0.9])
@pytest.mark.parametrize("sizes", [[5], [2], [50, 50], [97, 3, 1], [10] * 10, [1, 2, 3, 4, 200]])
def test_every_class_gives_its_share_to_within_one_sample(share, sizes):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(len(sizes)), sizes))
    chosen = sources.held_out(share, len(labels), [labels])
    given = np.bincount(labels[chosen], minlength=len(sizes))
    assert (np.abs(given - share * np.array(sizes)) < 1 + 1e-9).all()
    assert (given < sizes).all() and 1 <= chosen.sum() < len(labels)
    assert abs(chosen.sum() - share * len(labels)) <= 1 or min(sizes) <= 4
    assert np.array_equal(chosen, sources.held_out(share, len(labels), [labels]))


def test_held_out_rows_are_drawn_from_everywhere_whatever_the_run_s_seed():
    assert "seed" not in inspect.signature(data.load).parameters
    assert "seed" not in data.DataOptions.model_fields
    rows = np.flatnonzero(sources.held_out(0.1, 10_000, [np.zeros(10_000, np.int64)]))
    # The mean of 1,000 of 10,000 rows drawn at random has a deviation of 87.
    assert len(rows) == 1000 and abs(rows.mean() - 4999.5) < 5 * 87
    assert np.abs(np.histogram(rows, 10, (0, 10_000))[0] - 100).max() < 50  # 5 deviations


def test_parts_do_not_overlap_and_need_a_class_with_two_rows(tmp_path):
    dataset = load("y", source=write(tmp_path, ["a", "b", "a"]))
    assert sorted(dataset.train.rows.tolist() + dataset.validation.rows.tolist()) == [0, 1, 2]
    assert dataset.validation.rows.tolist() in ([0], [2])  # a class's last row is trained on
    assert "no class of 'y' has two rows, so none can be held out" in refusal(
        "y", source=write(tmp_path, ["a", "b"]))


def test_digits_are_split_once_and_for_all_without_overlap():
    digits = load()
    assert (len(digits.train), len(digits.validation)) == (1437, 360)
    assert not set(digits.train.rows.tolist()) & set(digits.validation.rows.tolist())
    inputs, targets = digits.example()
    assert inputs.shape == (2, 1, 8, 8) and targets["digit"].shape == (2,)
    assert digits.train.inputs.min() == 0 and digits.train.inputs.max() == 1
    for split, size in ((digits.train, 1437), (digits.validation, 360)):
        shares = torch.bincount(split.targets["digit"]) / size
        assert shares.min() > 0.09 and shares.max() < 0.11  # stratified


# ---- normalisation ----

def measured(inputs: torch.Tensor, chunk: int) -> tuple[np.ndarray, np.ndarray]:
    moments = Moments()
    for part in inputs.split(chunk):
        moments.add(part)
    mean, deviation = moments.result()
    assert mean.dtype == deviation.dtype == torch.float32
    assert mean.shape == deviation.shape == (inputs.shape[1], *[1] * (inputs.ndim - 2))
    return mean.flatten().numpy(), deviation.flatten().numpy()


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("shape", [(64, 3, 5, 4), (64, 1, 1, 1)])
def test_images_are_measured_by_channel_as_fractions_of_255(shape, chunk):
    pixels = torch.from_numpy(RANDOM.integers(0, 256, shape, dtype=np.uint8))
    exact = pixels.numpy().astype(np.float64) / 255
    mean, deviation = measured(pixels, chunk)
    # Half a unit in the last place of fp32, and the reference's own rounding.
    np.testing.assert_allclose(mean, exact.mean((0, 2, 3)), rtol=6e-8)
    np.testing.assert_allclose(deviation, exact.std((0, 2, 3)), rtol=6e-8)


@pytest.mark.parametrize("chunk", [1, 100, 1000])
def test_numbers_are_measured_by_column_even_where_the_mean_is_large(chunk):
    rows = RANDOM.normal(size=(1000, 6))
    rows[:, 1] = rows[:, 1] * 1e4 + 1e9  # fp32 tells apart what differs by 64 there
    rows[:, 2] = rows[:, 2] * 1e-20
    rows[:, 3] = 1e9 + 64 * (rows[:, 3] > 0)
    rows[0, 4] = 1e6  # the first sample an outlier
    rows[:, 5] = rows[:, 5] * 1e30
    inputs = torch.from_numpy(rows).float()
    exact = inputs.double().numpy()  # what the model is given; finer differences are lost
    mean, deviation = measured(inputs, chunk)
    np.testing.assert_allclose(deviation, exact.std(0), rtol=1e-6)
    assert (np.abs(mean - exact.mean(0)) <= 6e-8 * np.abs(exact).max(0)).all()


def test_a_constant_has_deviation_1_and_so_has_what_fp32_cannot_tell_apart():
    for value in (0.0, 0.1, -1e9, 1e-30, 1e30):
        mean, deviation = measured(torch.full((1000, 1), value), 64)
        assert (mean, deviation) == (np.float32(value), 1)
    rows = torch.tensor([[1e9], [1e9 + 1]], dtype=torch.float64)
    assert measured(rows.float(), 2) == (1e9, 1)
    grey = torch.full((9, 1, 2, 2), 77, dtype=torch.uint8)
    assert measured(grey, 2)[1] == 1


def test_one_pass_measures_the_training_split_alone(image_folder, monkeypatch):
    decoded = []
    decode = ImageDecoder.__call__
    monkeypatch.setattr(ImageDecoder, "__call__",
                        lambda self, rows: decoded.extend(rows) or decode(self, rows))
    kept = load("label", source=image_folder, workers=0)
    assert sorted(decoded[1:]) == list(range(29))  # besides the first, whose shape is looked at
    exact = kept.train.inputs.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(kept.mean.flatten(), exact.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(kept.deviation.flatten(), exact.std((0, 2, 3)), rtol=1e-7)
    monkeypatch.setattr(loading, "CHUNK_BYTES", 200)
    for workers in (0, 2):
        streamed = load("label", source=image_folder, in_memory=False, workers=workers)
        assert streamed.mean.equal(kept.mean) and streamed.deviation.equal(kept.deviation)
    assert load("label", source=image_folder, normalize=False).mean is None
