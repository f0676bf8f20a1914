"""The language model: causality, rotary positions, the tied embedding, losses inside the net."""

import math

import pytest
import torch
from safetensors.torch import load_file, load_model, save_model
from torch import nn
from torch.nn import functional

from benchmarks import five_gram
from trainlib.models import gpt
from trainlib.models.gpt import GPT


def build(vocab_size=50, seed=0, **arguments):
    """A GPT of 2 blocks of width 16 and 2 heads, in training mode."""
    torch.manual_seed(seed)
    return GPT(vocab_size, **({"depth": 2, "width": 16, "heads": 2} | arguments))


def draw(vocab_size=50, batch=3, length=12, num_masked=4):
    """Tokens and targets [batch, length]; some targets are not predicted."""
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(vocab_size, (2, batch, length), generator=generator)
    targets.view(-1)[torch.randperm(targets.numel(), generator=generator)[:num_masked]] = -100
    return tokens, targets


def losses_outside(model, tokens, targets):
    """[batch, length], from the full logits."""
    logits = model(tokens).flatten(0, 1)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return functional.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


def gradients(model, losses):
    """Of a sum in which each item has a weight of its own, by parameter."""
    weights = torch.rand(losses.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((losses * weights).sum(), list(model.parameters()))


@pytest.fixture
def chunked(monkeypatch):
    """The shapes (tokens, vocab_size) for which torch's chunked losses were called."""
    if not hasattr(nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch 2.13 or newer has chunked losses")
    calls, function = [], functional.linear_cross_entropy

    def record(hidden, weight, targets, **options):
        assert options["options"].batch_chunk_size is not None
        calls.append((len(hidden), len(weight)))
        return function(hidden, weight, targets, **options)

    monkeypatch.setattr(functional, "linear_cross_entropy", record)
    monkeypatch.setattr("trainlib.models.gpt._WHOLE_LOGITS", 0)  # or these nets are too small
    return calls


# ---- the net ----


@pytest.mark.parametrize("batch, length", [(1, 1), (1, 5), (3, 1), (3, 12)])
def test_a_token_has_one_logit_for_each_of_the_vocabulary(batch, length):
    tokens, targets = draw(batch=batch, length=length, num_masked=0)
    model = build()
    assert model(tokens).shape == (batch, length, 50)
    losses = model(tokens, targets)["losses"]
    assert losses.shape == (batch, length) and losses.dtype == torch.float32
    # At a standard deviation of 0.02, 16 products of a normed channel make logits of about 0.08.
    assert losses.tolist() == [[pytest.approx(math.log(50), abs=0.5)] * length] * batch


@pytest.mark.parametrize("width, heads", [(16, 3), (6, 2), (8, 16)])
def test_a_head_of_an_odd_or_broken_width_is_refused(width, heads):
    with pytest.raises(ValueError, match=f"even whole number, got {width} / {heads}"):
        build(width=width, heads=heads)


def test_a_token_changes_no_logits_before_it():
    tokens, _ = draw()
    model = build()
    before = model(tokens)
    for position in range(12):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % 50
        after = model(changed)
        assert after[:, :position].equal(before[:, :position])
        assert not after[:, position:].isclose(before[:, position:], atol=1e-6).all(-1).any()


def test_a_shorter_text_has_the_same_logits_to_rounding():
    tokens, _ = draw()
    model = build()
    torch.testing.assert_close(model(tokens[:, :5]), model(tokens)[:, :5], rtol=1e-5, atol=1e-6)


def test_without_positions_the_net_could_not_tell_an_order():
    model = build(depth=1)
    logits = model(torch.tensor([[1, 2, 3], [2, 1, 3]]))[:, -1]
    assert not logits[0].isclose(logits[1], atol=1e-6).all()


def test_dropout_falls_on_training_only():
    tokens, _ = draw()
    model = build(dropout=0.5)
    assert not model(tokens).equal(model(tokens))
    model.eval()
    assert model(tokens).equal(model(tokens))
    assert model(tokens).equal(build(dropout=0.0)(tokens))


def test_branches_that_add_up_start_smaller():
    model = build(depth=8, width=128)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            # 4 standard errors of a deviation from n numbers, each deviation / sqrt(2n).
            expected = 0.02 / 4 if name.endswith(("attention_out.weight", "mlp_out.weight")) else (
                0.02)
            tolerance = 4 / math.sqrt(2 * parameter.numel())
            assert parameter.std().item() == pytest.approx(expected, rel=tolerance), name


# ---- rotary positions ----


def test_scores_depend_on_the_distance_only():
    query, key = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    angles = gpt.rotary_angles(20, 8).double()
    queries, keys = (gpt.rotate(vector.expand(20, 8), angles) for vector in (query, key))
    scores = queries @ keys.T
    for distance in range(-19, 20):
        diagonal = scores.diagonal(distance)
        # Angles of up to 19 in fp32 are off by 2^-24 of themselves.
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-4)
    assert scores[0].std() > 0.1
    assert scores[0, 0].item() == pytest.approx((query @ key).item())


def test_angles_are_those_of_complex_numbers_in_fp32_under_autocast_too():
    with torch.autocast("cpu", torch.bfloat16):
        cosines, sines = gpt.rotary_angles(300, 8)
    assert cosines.dtype == torch.float32
    turns = torch.polar(torch.ones(4), 10000 ** (-torch.arange(0, 8, 2) / 8))
    expected = turns.to(torch.complex128) ** torch.arange(300)[:, None]
    found = torch.complex(cosines, sines).to(torch.complex128)
    # 300 steps of an angle that fp32 holds to 2^-24.
    torch.testing.assert_close(found, expected, rtol=0, atol=300 * 2**-23)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_turning_keeps_the_dtype_and_the_length(dtype):
    vectors = torch.randn(2, 3, 7, 8).to(dtype)
    turned = gpt.rotate(vectors, gpt.rotary_angles(7, 8))
    assert turned.dtype == dtype and turned[..., 0, :].equal(vectors[..., 0, :])
    rtol = 1e-5 if dtype == torch.float64 else 2**-7
    torch.testing.assert_close(turned.norm(dim=-1), vectors.norm(dim=-1), rtol=rtol, atol=0)


# ---- the tied embedding ----


def test_the_embedding_is_the_output_layer_and_lies_in_a_file_once(tmp_path):
    model = build()
    assert [n for n, p in model.named_parameters() if 50 in p.shape] == ["embedding.weight"]
    assert set(model.state_dict()) == {n for n, _ in model.named_parameters()}
    save_model(model, str(tmp_path / "model.safetensors"))
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    tokens, _ = draw()
    again = build(seed=1)
    assert not again(tokens).equal(model(tokens))
    load_model(again, str(tmp_path / "model.safetensors"))
    assert again(tokens).equal(model(tokens))


@pytest.mark.parametrize("inside", [True, False])
def test_the_gradient_of_the_embedding_is_the_sum_of_both_uses(inside):
    tokens, targets = draw()
    model = build().double()
    losses = (
        model(tokens, targets)["losses"] if inside else losses_outside(model, tokens, targets)
    )
    whole = gradients(model, losses)[0]
    # The same with a parameter for each use.
    weight, output = (model.embedding.weight.detach().clone().requires_grad_() for _ in range(2))
    hidden = functional.embedding(tokens, weight)
    angles = gpt.rotary_angles(12, 8)
    for block in model.blocks:
        hidden = block(hidden, angles)
    losses = functional.cross_entropy((model.norm(hidden) @ output.T).flatten(0, 1),
                                      targets.flatten(), reduction="none").view_as(targets)
    weights = torch.rand(losses.shape, generator=torch.Generator().manual_seed(2))
    parts = torch.autograd.grad((losses * weights).sum(), (weight, output))
    assert all(part.abs().sum() > 0 for part in parts)
    # The losses inside are fp32; angles are in both.
    tolerance = 1e-5 if inside else 1e-12
    assert (whole - sum(parts)).norm() <= tolerance * whole.norm()


# ---- losses inside the net ----


@pytest.mark.parametrize("vocab_size, batch, num_chunked", [
    (1000, 50, 1),  # 600 tokens: chunks of 256, 256 and 88
    (17, 2, 1), (16, 2, 0),  # the vocabulary is no larger than the width
    (50, 1, 0),  # 12 tokens for a width of 16
])
def test_losses_and_gradients_are_those_of_the_logits(chunked, vocab_size, batch, num_chunked):
    model = build(vocab_size)
    tokens, targets = draw(vocab_size, batch)
    inside = model(tokens, targets)["losses"]
    assert chunked == [(12 * batch, vocab_size)] * num_chunked
    outside = losses_outside(model, tokens, targets)
    torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(model, inside), gradients(model, outside), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    with torch.no_grad():
        assert model.eval()(tokens, targets)["losses"].equal(inside)
    assert model.train()(tokens, targets)["losses"].equal(inside)  # the same bits each time


def test_logits_that_are_small_are_held_whole(chunked, monkeypatch):
    for most, count in ((600 * 1000, 0), (600 * 1000 - 1, 1)):
        monkeypatch.setattr("trainlib.models.gpt._WHOLE_LOGITS", most)
        tokens, targets = draw(1000, batch=50)  # of 12 tokens each
        build(1000)(tokens, targets)
        assert len(chunked) == count


def test_full_logits_are_never_held(chunked):
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            found = out if isinstance(out, tuple | list) else [out]
            sizes.extend(part.numel() for part in found if isinstance(part, torch.Tensor))
            return out

    model = build(1000)
    tokens, targets = draw(1000, batch=50)
    with Watch():
        gradients(model, model(tokens, targets)["losses"])
    assert len(chunked) == 1 and 256 * 1000 <= max(sizes) < 600 * 1000


@pytest.mark.parametrize("vocab_size", [50, 1000])
def test_losses_under_autocast_are_fp32_and_no_worse_than_those_of_bf16_logits(vocab_size):
    model = build(vocab_size)
    tokens, targets = draw(vocab_size)
    exact = losses_outside(model, tokens, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens).dtype == torch.bfloat16
        inside = model(tokens, targets)["losses"]
        outside = losses_outside(model, tokens, targets)
    assert inside.dtype == torch.float32
    # bf16 holds 8 bits; logits here are below 1, and the loss is a difference of two.
    torch.testing.assert_close(inside, exact, rtol=0, atol=2**-7)
    assert (inside - exact).norm() <= 1.1 * (outside - exact).norm()
    wanted = gradients(model, exact)
    for a, b in zip(gradients(model, inside), wanted, strict=True):
        assert (a - b).norm() <= 2**-5 * b.norm()


def test_what_is_not_predicted_costs_nothing():
    for vocab_size, batch in ((50, 1), (1000, 50)):
        tokens, targets = draw(vocab_size, batch)
        model = build(vocab_size)
        losses = model(tokens, targets)["losses"]
        assert (losses[targets == -100] == 0).all() and (losses[targets != -100] > 0).all()
        none = torch.full_like(targets, -100)
        losses = model(tokens, none)["losses"]
        assert not losses.any()
        assert not any(gradient.any() for gradient in gradients(model, losses))  # nor is any NaN


def test_bf16_weights_give_fp32_losses_and_bf16_gradients():
    tokens, targets = draw()
    model = build().bfloat16()
    losses = model(tokens, targets)["losses"]
    assert losses.dtype == torch.float32
    assert all(g.dtype == torch.bfloat16 and g.isfinite().all() for g in gradients(model, losses))


# ---- gradient checkpointing and compiling ----


def test_gradient_checkpointing_changes_no_bit():
    tokens, targets = draw()
    results = []
    for enable in (False, True):
        model, calls = build(dropout=0.5), []
        model.set_grad_checkpointing(enable)
        model.blocks[1].register_forward_pre_hook(lambda *_, c=calls: c.append(1))
        torch.manual_seed(3)
        losses = model(tokens, targets)["losses"]
        results.append([losses, *gradients(model, losses)])
        assert len(calls) == 1 + enable
        with torch.no_grad():
            model(tokens)
        assert len(calls) == 2 + enable  # evaluation keeps nothing, recomputes nothing
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_a_compiled_net_has_the_same_losses():
    tokens, targets = draw()
    model = build()
    compiled = torch.compile(model, backend="aot_eager")(tokens, targets)["losses"]
    plain = model(tokens, targets)["losses"]
    torch.testing.assert_close(compiled, plain, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(model, compiled), gradients(model, plain), strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


# ---- learning ----


def test_it_learns_a_text_by_heart():
    tokens = torch.randint(50, (1, 40), generator=torch.Generator().manual_seed(0))
    model = build(width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(tokens[:, :-1], tokens[:, 1:])["losses"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1  # nats; it began at log 50 = 3.9


@pytest.mark.parametrize("order", [1, 2, 5, 8])
def test_the_n_gram_model_that_it_is_compared_with_gives_probabilities(order):
    text = b"the cat sat on the mat; the hat sat on the cat. " * 3 + b"a bat"
    tables = five_gram.fit(text, order)
    for context in (b"on the c", b"\xff" * 8, b"\0" * 8, b"xx the h"):
        code = int.from_bytes(context[9 - order:]) << 8
        codes = five_gram.np.arange(code, code + 256, dtype="uint64")
        found = five_gram.probabilities(tables, codes)
        assert found.min() > 0 and found.sum() == pytest.approx(1, abs=1e-12)
    assert five_gram.bits_per_byte(b"ab" * 500, b"ab" * 50) < 0.1
