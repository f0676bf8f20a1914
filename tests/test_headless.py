"""Causal language models of transformers, asked for hidden states instead of logits."""

import copy
import inspect
import json

import pytest
import torch
from launching import assert_same_run, train

from trainlib.models import ModelOptions, build_model

transformers = pytest.importorskip("transformers", reason="these nets are those of transformers")
SMALL = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0, "attn_pdrop": 0.0,
             "embd_pdrop": 0.0},
    "llama": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 2, "intermediate_size": 64},
    "gemma2": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
               "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64},
}


def build(kind: str) -> torch.nn.Module:
    config = {"model_type": kind, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0,
              "pad_token_id": 0} | SMALL[kind]
    return build_model(ModelOptions(name="transformers:AutoModelForCausalLM",
                                    args={"config": config}))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_hidden_states_times_the_head_are_the_logits_in_copies_too(kind):
    model, tokens = build(kind), torch.randint(64, (2, 5))
    names = list(model.state_dict())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(3)
        for net in (model, other):
            parts = net.eval()(tokens, hidden_only=True)
            logits = parts["hidden"] @ parts["head"].T
            torch.testing.assert_close(logits, net(tokens).logits, rtol=1e-4, atol=1e-5)
    assert not model(tokens).logits.equal(other(tokens).logits)
    assert list(model.state_dict()) == names and isinstance(model, type(model).__mro__[1])
    assert "attention_mask" in inspect.signature(model.forward).parameters


def test_a_net_that_caps_its_logits_does_not_offer_its_hidden_states():
    assert "hidden_only" not in inspect.signature(build("gemma2").forward).parameters


def test_gpt2_teaches_gpt2_the_same_bits_on_two_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    flags = ["--data.source", "builtin:pydocs", "--data.tokenizer", "bytes", "--data.block_size",
             "32", "--tasks.text.kind", "language_modeling", "--batch.global_size", "8",
             "--batch.micro_size", "4", "--batch.eval_size", "2048", "--loop.duration", "6 steps",
             "--log.every", "1", "--model.name", "transformers:AutoModelForCausalLM"]
    config = {"model_type": "gpt2", "n_layer": 1, "n_head": 2, "n_positions": 32}
    large, small = (["--model.args", json.dumps({"config": config | {"n_embd": width}})]
                    for width in (32, 16))
    teacher = train(tmp_path / "teacher", *flags, *large)
    flags += [*small, "--distill.teachers", f"[{teacher}]"]
    one, two = (train(tmp_path / str(n), *flags, processes=n, script="distill.py")
                for n in (1, 2))
    assert_same_run(one, two)
