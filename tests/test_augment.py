"""Augmentation against slow references of one image at a time, with draws read or fixed."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainlib import augment
from trainlib.augment import Augment, Mix

ULP = 2.0**-23  # spacing of fp32 below 2; half of it bounds the rounding of one operation in [0, 1]
SHAPES = [(32, 3, 8, 8), (5, 1, 4, 7), (4, 3, 7, 4), (1, 3, 5, 5), (3, 1, 1, 1)]
EVERYTHING = {
    "rotation": 20.0, "crop": 2, "flip": 0.5, "brightness": 0.3, "contrast": 0.3, "cutout": 3,
    "mixup": 0.4, "cutmix": 1.0,
}
MIXES = [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}]


def pictures(*shape: int, seed: int = 0) -> Tensor:
    """Distinct values in (0, 1), so that every pixel tells where it came from."""
    count = math.prod(shape)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return ((order + 1) / (count + 1)).view(shape)


def fix_uniform(monkeypatch, *shares_of_bound: float) -> None:
    """Makes the symmetric draws, one call after the other, these shares of their bounds."""
    shares = iter(shares_of_bound)
    monkeypatch.setattr(
        augment, "_uniform", lambda inputs, bound: torch.full((len(inputs),), bound * next(shares))
    )


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """Pixel (i, j) of the result is (i - down, j - right) of the image, or 0."""
    _, height, width = image.shape
    result = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            if 0 <= i - down < height and 0 <= j - right < width:
                result[:, i, j] = image[:, i - down, j - right]
    return result


# ---- what moves pixels ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pixels", [0, 1, 3])
def test_a_crop_is_a_shift_of_each_image_with_zeros_behind_it(shape, pixels):
    torch.manual_seed(1)
    images = pictures(*shape)
    offsets = range(-pixels, pixels + 1)
    for image, cropped in zip(images, augment.shifted_crop(images, pixels), strict=True):
        candidates = [shifted(image, down, right) for down in offsets for right in offsets]
        assert any(torch.equal(cropped, candidate) for candidate in candidates)


def test_all_shifts_of_a_crop_are_as_likely():
    pixels, batch = 2, 25 * 400
    images = torch.zeros(batch, 1, 5, 5)
    images[:, :, 2, 2] = 1.0  # it stays in view at every shift and tells which
    torch.manual_seed(2)
    where = augment.shifted_crop(images, pixels).flatten(1).argmax(1)
    counts = torch.bincount(where, minlength=25).double()
    # The statistic has mean 24 and variance 48: six standard deviations above.
    assert ((counts - 400) ** 2 / 400).sum() < 24 + 6 * math.sqrt(48)


def test_the_shifts_of_a_micro_batch_differ_among_its_images():
    images = pictures(1, 1, 9, 9).expand(64, -1, -1, -1)
    torch.manual_seed(3)
    for turned in (augment.shifted_crop(images, 2), augment.flip(images, 0.5),
                   augment.rotate(images, 30), augment.brightness_contrast(images, 0.3, 0.3),
                   augment.cutout(images, 3)):
        assert len(turned.flatten(1).unique(dim=0)) > 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_flip_mirrors_left_and_right_always_or_never(shape):
    images = pictures(*shape)
    mirrored = torch.stack([torch.stack([image[:, :, shape[3] - 1 - j] for j in range(shape[3])], 2)
                            for image in images])
    assert torch.equal(augment.flip(images, 1.0), mirrored)
    assert torch.equal(augment.flip(images, 0.0), images)


def test_a_flip_happens_as_often_as_asked_for():
    images = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2).expand(10_000, 1, 1, 2)
    torch.manual_seed(4)
    share = augment.flip(images, 0.3)[:, 0, 0, 1].mean()
    assert abs(share - 0.3) < 6 * math.sqrt(0.3 * 0.7 / 10_000)  # six standard deviations


def turned(image: Tensor, degrees: float) -> Tensor:
    """Counterclockwise about the centre, bilinear, 0 outside: pixel by pixel, in float64."""
    image = image.double()
    _, height, width = image.shape
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    result = torch.zeros_like(image)
    for i in range(height):
        for j in range(width):
            right, up = j - (width - 1) / 2, (height - 1) / 2 - i
            # Where the pixel was before: turned back by the angle.
            column = cosine * right + sine * up + (width - 1) / 2
            row = (height - 1) / 2 - (cosine * up - sine * right)
            for r in (math.floor(row), math.floor(row) + 1):
                for c in (math.floor(column), math.floor(column) + 1):
                    if 0 <= r < height and 0 <= c < width:
                        weight = (1 - abs(row - r)) * (1 - abs(column - c))
                        result[:, i, j] += weight * image[:, r, c]
    return result


def bilinear_tolerance(images: Tensor) -> float:
    """A coordinate goes through a dozen roundings of numbers up to the side; slopes are <= 1."""
    return 2 * 12 * max(images.shape[2:]) * ULP


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("degrees", [-180.0, -35.0, 0.0, 12.5, 90.0])
def test_a_rotation_equals_the_slow_one(shape, degrees, monkeypatch):
    fix_uniform(monkeypatch, 1.0)
    images = pictures(*shape)
    expected = torch.stack([turned(image, degrees) for image in images])
    result = augment.rotate(images, degrees).double()
    torch.testing.assert_close(result, expected, rtol=0, atol=bilinear_tolerance(images))


@pytest.mark.parametrize("degrees, quarters", [(0.0, 0), (90.0, 1), (180.0, 2), (-90.0, 3)])
def test_quarter_turns_of_a_square_lose_nothing(degrees, quarters, monkeypatch):
    fix_uniform(monkeypatch, 1.0)
    images = pictures(4, 3, 9, 9)
    torch.testing.assert_close(augment.rotate(images, degrees), images.rot90(quarters, (2, 3)),
                               rtol=0, atol=bilinear_tolerance(images))


def test_a_quarter_turn_of_an_oblong_keeps_its_proportions(monkeypatch):
    fix_uniform(monkeypatch, 1.0)
    images = pictures(2, 3, 5, 9)
    expected = torch.zeros_like(images)
    expected[..., 2:7] = images[..., 2:7].rot90(1, (2, 3))  # the middle square; the rest has left
    torch.testing.assert_close(augment.rotate(images, 90.0), expected,
                               rtol=0, atol=bilinear_tolerance(images))


def test_symmetric_draws_are_uniform_between_their_bounds():
    torch.manual_seed(5)
    draws = augment._uniform(torch.empty(40_000, 0), 0.25).double()
    assert -0.25 <= draws.min() < -0.249 and 0.249 < draws.max() <= 0.25
    counts = torch.histc(draws, 20, -0.25, 0.25)
    # 20 cells: mean 19, variance 38; six standard deviations above.
    assert ((counts - 2000) ** 2 / 2000).sum() < 19 + 6 * math.sqrt(38)


# ---- what changes values ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("light, spread", [(0.0, 0.0), (1.0, -1.0), (-0.5, 1.0)])
def test_brightness_and_contrast_follow_the_formula(shape, light, spread, monkeypatch):
    fix_uniform(monkeypatch, light, spread)
    images = pictures(*shape)
    result = augment.brightness_contrast(images, 0.4, 0.8)
    for image, changed in zip(images.double(), result, strict=True):
        mean = sum(image.flatten().tolist()) / image.numel()
        expected = (1 + 0.4 * light) * (mean + (1 + 0.8 * spread) * (image - mean))
        # The mean's rounding is below log2(pixels) <= 8 halves of an ulp; a handful of others.
        torch.testing.assert_close(changed.double(), expected.clamp(0, 1), rtol=0, atol=16 * ULP)


def test_brightness_and_contrast_stay_in_range_and_reach_both_ends():
    torch.manual_seed(6)
    result = augment.brightness_contrast(pictures(64, 3, 8, 8), 0.9, 0.9)
    assert result.min() == 0 and result.max() == 1


def test_without_brightness_and_contrast_no_bit_changes():
    images = pictures(8, 3, 4, 4)
    assert torch.equal(augment.brightness_contrast(images, 0.0, 0.0), images)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_cutout_blanks_one_square_with_the_channel_means(shape, size):
    torch.manual_seed(7)
    images = pictures(*shape)
    _, _, height, width = shape
    for image, cut in zip(images, augment.cutout(images, size), strict=True):
        # Every square whose centre is a pixel, cut off at the borders.
        candidates = []
        for i in range(height):
            for j in range(width):
                expected = image.clone()
                top, left = i - size // 2, j - size // 2
                rows = slice(max(top, 0), top + size)
                columns = slice(max(left, 0), left + size)
                expected[:, rows, columns] = image.mean((1, 2))[:, None, None]
                candidates.append(expected)
        # A mean may be summed in another order: fewer than 64 values, a rounding each.
        assert any(torch.allclose(cut, expected, rtol=0, atol=64 * ULP) for expected in candidates)


def test_cutout_has_its_whole_area_unless_a_border_cuts_it_and_every_centre_alike():
    size, side, batch = 3, 6, 36 * 300
    torch.manual_seed(8)
    images = torch.zeros(batch, 1, side, side)
    images[:, :, 0, 0] = 1.0  # so that the mean, 1 / 36, is nowhere among the pixels
    is_cut = ((images.mean() - augment.cutout(images, size)).abs() < 1e-6).flatten(1)
    areas = is_cut.sum(1).tolist()
    inner = (side - 2) ** 2 / side**2  # centres with room on all sides
    share = areas.count(size**2) / batch
    assert set(areas) == {4, 6, 9}  # a corner, a border, within
    assert abs(share - inner) < 6 * math.sqrt(inner * (1 - inner) / batch)
    centre = (is_cut * torch.arange(side**2)).sum(1) // is_cut.sum(1)
    whole = centre[is_cut.sum(1) == size**2]
    counts = torch.bincount(whole, minlength=side**2).view(side, side)[1:-1, 1:-1].double()
    expected = len(whole) / 16
    assert ((counts - expected) ** 2 / expected).sum() < 15 + 6 * math.sqrt(30)  # 16 cells


# ---- what mixes samples ----


@pytest.mark.parametrize("shape", [*SHAPES, (6, 5), (4,), (2, 3, 4, 5, 6)])
def test_mixup_follows_its_equation(shape):
    torch.manual_seed(9)
    inputs = pictures(*shape)
    mixed, mix = augment.mixup(inputs, 0.7)
    for row, (partner, share) in enumerate(zip(mix.partner.tolist(), mix.share.tolist(),
                                               strict=True)):
        own, other = inputs[row].double(), inputs[partner].double()
        expected = share * own + (1 - share) * other
        torch.testing.assert_close(mixed[row].double(), expected, rtol=0, atol=4 * ULP)


@pytest.mark.parametrize("shape", [*SHAPES, (64, 3, 16, 12)])
def test_cutmix_pastes_a_box_of_the_partner_and_its_share_counts_the_pixels(shape):
    torch.manual_seed(10)
    images = pictures(*shape)
    mixed, mix = augment.cutmix(images, 1.0)
    for row, (partner, share) in enumerate(zip(mix.partner.tolist(), mix.share.tolist(),
                                               strict=True)):
        is_own = (mixed[row] == images[row]).all(0)
        is_other = (mixed[row] == images[partner]).all(0)
        assert (is_own | is_other).all()
        if partner != row:  # else the two look alike
            # In float64 the count's share; 1 - count / pixels takes two roundings in fp32.
            assert abs(is_own.double().mean() - share) <= ULP
            assert torch.equal(~is_own, (~is_own).any(1)[:, None] & (~is_own).any(0))  # a box


def test_the_box_of_cutmix_has_the_size_of_its_draw(monkeypatch):
    height, width, batch, share = 10, 20, 4000, 1 - 0.46**2  # a box of 4.6 x 9.2 pixels
    images = pictures(2, 1, height, width).repeat(batch // 2, 1, 1, 1)
    partner = torch.arange(batch).roll(1)
    monkeypatch.setattr(
        augment, "_draw_mix", lambda inputs, alpha: Mix(partner, torch.full((batch,), share))
    )
    torch.manual_seed(11)
    mixed, mix = augment.cutmix(images, 1.0)
    is_pasted = (mixed != images)[:, 0]
    rows, columns = is_pasted.any(2).sum(1), is_pasted.any(1).sum(1)
    # Rounded; of a box about a corner pixel, 2 rows and 4 columns have left.
    assert rows.max() == 5 and columns.max() == 9
    assert rows.min() == 3 and columns.min() == 5
    # Rows that are pasted from each of the ten centres: 2 above, 2 below and the centre itself.
    kept = [sum(0 <= centre + k < height for k in range(-2, 3)) for centre in range(height)]
    mean, variance = sum(kept) / 10, sum(k * k for k in kept) / 10 - (sum(kept) / 10) ** 2
    assert abs(rows.double().mean() - mean) < 6 * math.sqrt(variance / batch)


@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 4.0, 50.0])
def test_shares_have_the_beta_distribution(alpha):
    from scipy import stats

    torch.manual_seed(12)
    count = 20_000 if alpha >= 1 else 200_000  # rounding past an end is one draw in thousands
    shares = augment._draw_mix(torch.empty(count, 0), alpha).share
    assert shares.min() >= 0 and shares.max() <= 1
    # Not at the very ends, where fp32 near 1 has no more digits and near 0 the formula has none.
    points = torch.linspace(0.001, 0.999, 500, dtype=torch.float64)
    found = torch.searchsorted(shares.double().sort()[0], points) / count
    expected = torch.from_numpy(stats.beta(alpha, alpha).cdf(points.numpy()))
    # Kolmogorov: beyond x / sqrt(n) with probability 2 exp(-2 x^2), 3e-8 for x = 3.
    assert (found - expected).abs().max() < 3 / math.sqrt(count)
    # Beta's variance is 1 / (4 (2 alpha + 1)).
    assert abs(shares.double().mean() - 0.5) < 6 * math.sqrt(1 / (4 * (2 * alpha + 1)) / count)


@pytest.mark.parametrize("alpha", [1e-6, 1e-3, 1e3, 1e6])
def test_shares_of_extreme_alphas_are_its_limits(alpha):
    torch.manual_seed(13)
    shares = augment._draw_mix(torch.empty(10_000, 0), alpha).share
    if alpha < 1:  # own or partner's target, a fair coin
        assert ((shares < 1e-6) | (shares > 1 - 1e-6)).float().mean() > 0.95
        assert abs(shares.mean() - 0.5) < 6 * 0.5 / 100
    else:  # half and half: eight standard deviations, of 1 / sqrt(8 alpha)
        assert (shares - 0.5).abs().max() < 8 / math.sqrt(8 * alpha)


def test_draws_of_exactly_zero_give_shares(monkeypatch):
    for values in ((0.0, 0.0), (0.0, 0.25), (0.0, 0.5), (1 - 2**-24, 0.25), (0.5, 0.75)):
        monkeypatch.setattr(torch, "rand", lambda *size, v=values, **_: torch.tensor(v)[:, None])
        for alpha in (1e-6, 1.0, 1e6):
            share = augment._draw_mix(torch.empty(1, 0), alpha).share
            assert 0 <= share <= 1


def test_every_sample_has_another_partner_and_is_one_itself():
    for batch in (2, 3, 32):
        partner = augment.mixup(torch.rand(batch, 4), 1.0)[1].partner
        assert partner.dtype == torch.int64
        assert sorted(partner.tolist()) == list(range(batch))
        assert (partner != torch.arange(batch)).all()


@pytest.mark.parametrize("options", MIXES)
def test_one_sample_alone_is_mixed_with_itself_and_stays(options):
    images = pictures(1, 3, 6, 5)
    for seed in range(20):
        torch.manual_seed(seed)
        mixed, _, mix = Augment(**options)(images, {})
        assert torch.equal(mixed, images) and mix.partner.tolist() == [0]
        assert mix.share.shape == (1,) and 0 <= mix.share <= 1


def test_with_mixup_and_cutmix_a_fair_coin_gives_each_sample_one_and_its_share():
    torch.manual_seed(14)
    batch = 10_000
    images = pictures(batch, 1, 8, 8)
    mixed, _, mix = Augment(mixup=1.0, cutmix=1.0)(images, {})
    other = images[mix.partner]
    is_pasted = ((mixed == images) | (mixed == other)).flatten(1).all(1)
    share_pasted = (mixed == images).double().mean((1, 2, 3))
    assert ((share_pasted - mix.share)[is_pasted].abs() <= ULP).all()
    share = mix.share.double()[:, None, None, None]
    blend = share * images + (1 - share) * other
    assert ((mixed - blend)[~is_pasted].abs() <= 4 * ULP).all()
    assert abs(is_pasted.double().mean() - 0.5) < 6 * 0.5 / math.sqrt(batch)


@pytest.mark.parametrize("options", MIXES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mixed_loss_is_the_cross_entropy_with_soft_labels(options, smoothing):
    torch.manual_seed(15)
    mix = Augment(**options)(pictures(16, 3, 8, 8), {})[2]
    logits = torch.randn(16, 5, dtype=torch.float64, requires_grad=True)
    target = torch.randint(5, (16,))
    share = mix.share.double()[:, None]
    hard = functional.one_hot(target, 5).double()
    soft = share * hard + (1 - share) * hard[mix.partner]

    def losses(target):
        return functional.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    mixed = mix.blend(losses(target), losses(target[mix.partner]))
    # Losses are below 16 here, each of about ten roundings.
    tolerance = {"rtol": 0, "atol": 16 * 10 * torch.finfo(torch.float64).eps}
    torch.testing.assert_close(mixed, losses(soft), **tolerance)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (mixed, losses(soft))]
    torch.testing.assert_close(*gradients, **tolerance)


def test_a_blend_fits_losses_of_many_items_a_sample():
    mix = Mix(torch.tensor([1, 0]), torch.tensor([0.25, 1.0]))
    own, other = torch.ones(2, 3), torch.zeros(2, 3)
    assert torch.equal(mix.blend(own, other), mix.share[:, None].expand(2, 3))


# ---- the composition ----


def test_with_nothing_on_nothing_happens():
    state = torch.get_rng_state()
    for inputs in (pictures(4, 3, 8, 8), torch.arange(6).view(2, 3)):
        targets = {"label": torch.arange(len(inputs))}
        augmented, same, mix = Augment()(inputs, targets)
        Augment().try_on(inputs)
        assert augmented is inputs and same is targets and mix is None
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(32, 3, 8, 8), (7, 1, 8, 5), (1, 3, 5, 8)])
def test_equal_seeds_give_equal_bits_whatever_ran_before(shape):
    images, original = pictures(*shape), pictures(*shape)
    augmented = Augment(**EVERYTHING)
    torch.manual_seed(16)
    first, _, first_mix = augmented(images, {})
    augmented(pictures(3, 1, 4, 4), {})  # another micro-batch between
    torch.rand(7)
    torch.manual_seed(16)
    second, _, second_mix = augmented(images, {})
    torch.manual_seed(17)
    other, _, other_mix = augmented(images, {})
    assert torch.equal(first, second) and first.shape == images.shape
    assert all(torch.equal(a, b) for a, b in zip(first_mix, second_mix, strict=True))
    assert not torch.equal(first, other) and not torch.equal(first_mix.share, other_mix.share)
    assert torch.equal(images, original)  # the inputs are not written to
    assert first.min() >= 0 and first.max() <= 1 + 2 * ULP


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_option_alone_changes_the_images(name):
    images = pictures(32, 3, 8, 8)
    torch.manual_seed(18)
    targets = {"label": torch.arange(32)}
    augmented, same, mix = Augment(**{name: EVERYTHING[name]})(images, targets)
    assert augmented.shape == images.shape and augmented.dtype == images.dtype
    assert not torch.equal(augmented, images)
    assert same is targets and (mix is not None) == (name in ("mixup", "cutmix"))


def test_the_order_is_the_one_of_the_options():
    images = pictures(16, 3, 8, 8)
    seen = []

    def double(inputs):
        seen.append(inputs)
        return inputs * 2

    torch.manual_seed(19)
    augmented, _, mix = Augment(**EVERYTHING | {"cutmix": 0.0}, function=double)(images, {})
    torch.manual_seed(19)
    expected = augment.rotate(images, EVERYTHING["rotation"])
    expected = augment.shifted_crop(expected, EVERYTHING["crop"])
    expected = augment.flip(expected, EVERYTHING["flip"])
    expected = augment.brightness_contrast(
        expected, EVERYTHING["brightness"], EVERYTHING["contrast"]
    )
    assert torch.equal(seen[0], expected)
    expected = augment.cutout(expected * 2, EVERYTHING["cutout"])
    expected, expected_mix = augment.mixup(expected, EVERYTHING["mixup"])
    assert torch.equal(augmented, expected) and torch.equal(mix.share, expected_mix.share)


def test_no_gradient_is_recorded():
    scale = torch.ones((), requires_grad=True)
    own = Augment(mixup=1.0, function=lambda inputs: inputs * scale)
    augmented, _, mix = own(torch.rand(4, 2), {})
    assert not augmented.requires_grad and not mix.share.requires_grad


def test_no_value_is_read_and_all_is_drawn_where_the_inputs_are():
    # Tensors on the meta device have no values: reading one raises, and so does meeting another
    # device. Python numbers made into tensors of the CPU would not be seen; the GPU test sees them.
    inputs = torch.empty(6, 3, 8, 5, device="meta")
    state = torch.get_rng_state()
    for options in (EVERYTHING, EVERYTHING | {"mixup": 0.0}, EVERYTHING | {"cutmix": 0.0}):
        augmented, _, mix = Augment(**options)(inputs, {})
        assert augmented.shape == inputs.shape and mix.partner.shape == mix.share.shape == (6,)
        assert {t.device.type for t in (augmented, *mix)} == {"meta"}
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_never_waited_for_and_repeats_its_bits():
    inputs = pictures(32, 3, 8, 8).cuda()
    augmented = Augment(**EVERYTHING)
    augmented(inputs, {})
    results = []
    for _ in range(2):
        torch.cuda.manual_seed(20)
        torch.cuda.set_sync_debug_mode("error")
        try:
            results.append(augmented(inputs, {}))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    (first, _, mix), (second, *_) = results
    assert torch.equal(first, second)
    assert {t.device.type for t in (first, *mix)} == {"cuda"}


# ---- refusals ----


@pytest.mark.parametrize("options, inputs, words", [
    ({"flip": 0.5}, torch.rand(2, 64), "data.augment.flip is for images"),
    ({"cutmix": 1.0}, torch.rand(2, 64), "data.augment.cutmix is for images"),
    ({"rotation": 5.0}, torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "float32 .* uint8"),
    ({"crop": 1}, torch.rand(2, 3, 8, 8, dtype=torch.float64), "float32 .* float64"),
    ({"mixup": 0.2}, torch.ones(2, 16, dtype=torch.int64), "data.augment.mixup .* int64"),
    ({"cutmix": 0.2}, torch.ones(2, 3, 8, 8, dtype=torch.int64), "data.augment.cutmix .* int64"),
    ({"crop": 8}, torch.rand(2, 3, 8, 9), "data.augment.crop .* got 8; give at most 7"),
    ({"cutout": 9}, torch.rand(2, 3, 12, 8), "data.augment.cutout .* got 9; give at most 7"),
    ({"contrast": 0.1}, torch.rand(2, 3, 8, 8) - 0.5, r"\[0, 1\].* from -0\.\d+ to 0\.\d+"),
    ({"brightness": 0.1}, 255 * torch.rand(2, 3, 8, 8), r"\[0, 1\].* to 2\d\d"),
    ({"function": lambda inputs: inputs[:, :1]}, torch.rand(2, 3, 8, 8), r"\[2, 1, 8, 8\]"),
    ({"function": lambda inputs: inputs.double()}, torch.rand(2, 8), "returned float64"),
    ({"function": lambda inputs: inputs.numpy()}, torch.rand(2, 8), "returned a ndarray"),
    ({"function": lambda inputs: None}, torch.rand(2, 8), "returned a NoneType"),
])
def test_what_does_not_fit_the_inputs_is_refused_in_one_line(options, inputs, words):
    with pytest.raises(ValueError, match=words) as refusal:
        Augment(**options).try_on(inputs)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("options, inputs", [
    (EVERYTHING, torch.rand(2, 3, 8, 8)),
    (EVERYTHING, torch.rand(1, 1, 4, 8)),
    ({"flip": 0.5, "rotation": 5.0}, torch.rand(2, 3, 8, 8) - 0.5),  # normalised
    ({"mixup": 0.2}, torch.rand(2, 16)),
    ({"mixup": 0.2}, torch.rand(2, 16, dtype=torch.bfloat16)),
    ({"function": lambda inputs: inputs + 1}, torch.ones(2, 16, dtype=torch.int64)),
    ({"crop": 7, "cutout": 7}, torch.rand(2, 1, 8, 8)),
])
def test_what_fits_is_accepted_and_runs(options, inputs):
    augmented = Augment(**options)
    augmented.try_on(inputs)
    result, *_ = augmented(inputs, {})
    assert result.shape == inputs.shape and result.dtype == inputs.dtype


def test_trying_on_changes_neither_the_inputs_nor_the_generator():
    def careless(inputs):
        return inputs.add_(torch.rand(()))

    inputs, original = pictures(2, 3, 8, 8), pictures(2, 3, 8, 8)
    state = torch.get_rng_state()
    Augment(**EVERYTHING, function=careless).try_on(inputs)
    assert torch.equal(inputs, original) and torch.equal(torch.get_rng_state(), state)
