"""The net for segmentation: shapes, gradient checkpointing, learning a mask."""

import pytest
import torch
from torch.nn import functional

from trainlib.models.unet import UNet


def build(**arguments):
    torch.manual_seed(0)
    return UNet(**({"channels": 3, "classes": 4, "width": 4} | arguments))


@pytest.mark.parametrize("depth, height, width", [
    (0, 1, 1), (1, 2, 3), (2, 4, 4), (2, 5, 7), (2, 16, 16), (3, 8, 31),
])
def test_an_image_of_any_size_has_one_logit_a_class_and_pixel(depth, height, width):
    model = build(depth=depth)
    images = torch.rand(2, 3, height, width)
    logits = model(images)
    assert logits.shape == (2, 4, height, width)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.eval()(images[:1]).shape == (1, 4, height, width)


def test_each_stage_below_has_twice_the_width():
    model = build(width=8, depth=3)
    assert [stage[0].out_channels for stage in model.down] == [8, 16, 32, 64]
    assert [stage[0].in_channels for stage in model.up] == [64 + 32, 32 + 16, 16 + 8]
    assert [stage[0].out_channels for stage in model.up] == [32, 16, 8]


def test_a_pixel_sees_as_far_as_the_bottom_and_keeps_its_place():
    model = build().eval()
    images = torch.rand(1, 3, 64, 64, requires_grad=True)
    model(images)[0, :, 32, 32].sum().backward()
    seen = images.grad.abs().sum((0, 1)).nonzero()
    # The convolutions reach 4 pixels at full size, 4 of two and 2 of four; pooling adds 3 at most.
    assert 8 <= (seen - 32).abs().amax() <= 4 + 4 * 2 + 2 * 4 + 3


def test_gradient_checkpointing_changes_no_bit():
    images, results = torch.rand(2, 3, 9, 6), []
    for enable in (False, True):
        model, calls = build(), []
        model.set_grad_checkpointing(enable)
        model.up[0].register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        logits = model(images)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in model.parameters())])
        assert len(calls) == 1 + enable
        with torch.no_grad():
            model(images)
        assert len(calls) == 2 + enable  # evaluation keeps nothing, recomputes nothing
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_it_learns_one_batch_of_masks():
    generator = torch.Generator().manual_seed(0)
    masks = functional.interpolate(
        torch.randint(3, (2, 1, 4, 4), generator=generator).float(), (13, 11)
    )
    images = masks / 2 + 0.1 * torch.randn(masks.shape, generator=generator)
    targets = masks[:, 0].long()
    model = build(channels=1, classes=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = functional.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(images).argmax(1) == targets).float().mean().item() > 0.98
