"""Averaged weights: the closed form, skipped steps, and weights that come back."""

import math

import pytest
import torch
from torch import nn

from trainlib.ema import Ema


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3))


def shake(module, step):
    """Other parameters and buffers at every step; integers count."""
    generator = torch.Generator().manual_seed(step)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
        else:
            tensor += 1


def floats(module):
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {name: t.detach().clone() for name, t in tensors if t.is_floating_point()}


@pytest.mark.parametrize("half_life", [1, 5, 1000])
def test_the_average_is_the_weighted_sum_of_all_steps(half_life):
    module = net()
    ema = Ema(module, half_life)
    seen = []
    for step in range(50):
        shake(module, step)
        ema.update(step, True)
        seen.append(floats(module))
        shares = [max(1 - 0.5 ** (1 / half_life), 1 / (k + 1)) for k in range(step + 1)]
        factors = [
            shares[k] * math.prod(1 - share for share in shares[k + 1 :]) for k in range(step + 1)
        ]
        assert sum(factors) == pytest.approx(1)
        for name, average in ema.tensors().items():
            exact = sum(f * s[name].double() for f, s in zip(factors, seen, strict=True))
            # A step rounds thrice, each time by half a unit in the last place of values below 8.
            torch.testing.assert_close(average.double(), exact, rtol=0, atol=3 * 4e-7 * (step + 1))
        if half_life == 1000:  # so far a plain mean
            assert max(factors) == pytest.approx(min(factors))
    if half_life == 5:
        assert factors[-6] / factors[-1] == pytest.approx(0.5)


def test_the_first_step_is_a_copy_that_forgets_the_initial_weights():
    module = net()
    ema = Ema(module, 10)
    shake(module, 0)
    ema.update(0, True)
    for name, weight in floats(module).items():
        torch.testing.assert_close(ema.tensors()[name], weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("flag", [bool, torch.tensor], ids=["bool", "tensor"])
def test_a_skipped_step_leaves_no_trace(flag):
    module, twin = net(), net()
    ema, other = Ema(module, 5), Ema(twin, 5)
    for step in range(6):
        for net_, average, healthy in ((module, ema, flag(step != 3)), (twin, other, True)):
            shake(net_, step)
            if net_ is module or step != 3:
                average.update(step, healthy)
    for name, average in ema.tensors().items():
        assert average.equal(other.tensors()[name])


def test_the_weights_come_back_bit_for_bit_even_after_an_exception():
    module = net().to(memory_format=torch.channels_last)
    ema = Ema(module, 5)
    shake(module, 0)
    ema.update(0, True)
    shake(module, 1)
    before, places = floats(module), [p.data_ptr() for p in module.parameters()]
    averages = {name: average.clone() for name, average in ema.tensors().items()}
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        with ema.applied():
            assert all(floats(module)[name].equal(average) for name, average in averages.items())
            assert module[0].weight.stride() == ema.averages["0.weight"].stride()
            module.eval()(torch.randn(2, 1, 3, 3))
        assert module[1].num_batches_tracked == 2  # integers stay the module's own
        assert all(floats(module)[name].equal(average) for name, average in averages.items())
        raise RuntimeError("inside")
    assert all(floats(module)[name].equal(weight) for name, weight in before.items())
    assert places == [p.data_ptr() for p in module.parameters()]
    assert all(ema.tensors()[name].equal(average) for name, average in averages.items())


def test_training_goes_on_as_if_nobody_had_looked():
    def train(looks):
        module = net()
        ema = Ema(module, 2)
        optimizer = torch.optim.AdamW(module.parameters(), 0.1, fused=True)
        for step in range(6):
            torch.manual_seed(step)
            module.train()(torch.randn(4, 1, 3, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(step, True)
            if looks:
                with ema.applied(), torch.inference_mode():
                    module.eval()(torch.ones(1, 1, 3, 3))
        return [*floats(module).values(), *ema.tensors().values()]

    assert all(a.equal(b) for a, b in zip(train(True), train(False), strict=True))


def test_a_loaded_average_goes_on_bit_for_bit():
    module = net()
    ema = Ema(module, 5)
    for step in range(3):
        shake(module, step)
        ema.update(step, True)
    other = Ema(module, 5)
    other.load({name: tensor.clone() for name, tensor in ema.tensors().items()})
    shake(module, 3)
    for average in (ema, other):
        average.update(3, True)
    assert all(ema.tensors()[n].equal(t) for n, t in other.tensors().items())
    with pytest.raises(ValueError, match="another model"):
        other.load({"0.weight": torch.zeros(1)})


def test_a_shared_parameter_counts_once_and_stays_shared():
    module = nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)})
    module["second"].weight = module["first"].weight
    ema = Ema(module, 1)
    assert list(ema.tensors()) == ["first.weight", "first.bias", "second.bias"]
    old = module["first"].weight.detach().clone()
    module["first"].weight.data += 1
    ema.update(1, True)
    with ema.applied():
        assert module["second"].weight is module["first"].weight
        torch.testing.assert_close(module["second"].weight.detach(), old + 0.5)


def test_a_compiled_module_computes_with_the_average():
    module = net().eval()
    compiled = torch.compile(module, backend="eager")
    inputs = torch.randn(2, 1, 3, 3)
    ema = Ema(module, 5)
    shake(module, 0)
    trained = compiled(inputs)
    with ema.applied():  # the initial weights
        torch.testing.assert_close(compiled(inputs), net().eval()(inputs))
    assert compiled(inputs).equal(trained)


def test_low_precision_is_averaged_in_fp32_and_held_in_its_own():
    module = nn.Linear(2, 2).bfloat16()
    ema = Ema(module, 1000)
    for step in range(3):
        ema.update(step, torch.tensor(True))
    assert {t.dtype for t in ema.tensors().values()} == {torch.float32}
    with ema.applied():
        assert module(torch.ones(1, 2, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_nothing_to_average_is_fine():
    module = nn.Module()
    module.register_buffer("count", torch.tensor(3))
    ema = Ema(module, 5)
    ema.update(0, torch.tensor(True))
    with ema.applied():
        assert module.count == 3
    assert ema.tensors() == {}
    with pytest.raises(ValueError, match="above 0"):
        Ema(module, 0)
