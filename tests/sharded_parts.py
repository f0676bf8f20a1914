"""FSDP2's parts against whole models, on every process of a launch; ends with code 0 if all holds.

Not a script of a user's: what only an optimizer, a checkpoint or a net by itself can show.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from trainlib import runtime, sharding, shards  # noqa: E402
from trainlib.checkpoint.state import load_optimizer, model_tensors, optimizer_state  # noqa: E402
from trainlib.models.gpt import GPT  # noqa: E402
from trainlib.optim import (  # noqa: E402
    _WHOLE_ONLY,
    OPTIMIZERS,
    OptimOptions,
    _arguments_of,
    build_optimizer,
)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    # 5 rows over 2 or 3 processes are not cut evenly, and one of them may have none.
    return nn.Sequential(nn.Linear(16, 33), nn.ReLU(), nn.Linear(33, 16), nn.LayerNorm(16),
                         nn.Linear(16, 5), nn.Linear(5, 1))


def train(model, optimizer, accelerator, seeds=range(4), found_inf=None) -> None:
    """Steps over batches of 12, of which a cut model's processes have each a share."""
    world_size = accelerator.num_processes if shards.is_sharded(model) else 1
    for seed in seeds:
        inputs = torch.randn(12, 16, generator=torch.Generator().manual_seed(seed))
        if world_size > 1:
            inputs = inputs.chunk(world_size)[accelerator.process_index]
        loss = model(inputs).sub(1).square().sum() / 12
        (loss * world_size).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        if found_inf is not None:
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(found_inf), None
        optimizer.step()
        optimizer.zero_grad()


def built(name, accelerator, is_sharded):
    model = small_net()
    if is_sharded:
        sharding.place(model, accelerator, False)
    weight_decay = 0.01 if "weight_decay" in _arguments_of(OPTIMIZERS[name])[0] else 0
    return model, build_optimizer(
        OptimOptions(name=name, lr=1e-2, weight_decay=weight_decay), model
    )


def every_optimizer_steps_as_on_whole_parameters(accelerator) -> None:
    for name in sorted(OPTIMIZERS.keys() - set(_WHOLE_ONLY)):
        (whole, its), (cut, others) = (built(name, accelerator, cut) for cut in (False, True))
        train(whole, its, accelerator)
        train(cut, others, accelerator)
        wanted, tensors = whole.state_dict(), shards.gathered(model_tensors(cut), True)
        for key, value in wanted.items():
            torch.testing.assert_close(tensors[key], value, rtol=0, atol=1e-6, msg=name)


def states_are_torchs_own_and_go_into_whole_and_cut_models(accelerator) -> None:
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_optimizer_state_dict,
    )

    for name in ("adamw", "sgd", "adagrad", "nadam"):
        model, optimizer = built(name, accelerator, True)
        train(model, optimizer, accelerator)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        of_model = get_model_state_dict(model, options=options)
        of_optimizer = get_optimizer_state_dict(model, optimizer, options=options)
        tensors, packed = optimizer_state(optimizer, model)
        whole, slots = shards.gathered(model_tensors(model), True), shards.gathered(tensors, True)
        if accelerator.is_main_process:  # the only one that torch gives them
            assert whole.keys() == of_model.keys()
            assert all(whole[key].equal(value) for key, value in of_model.items())
            named = {f"{key}|{slot}": value for key, each in of_optimizer["state"].items()
                     for slot, value in each.items()}
            assert slots.keys() == named.keys() and (slots or name == "sgd")
            assert all(slots[key].equal(value) for key, value in named.items())
        for is_sharded in (False, True):
            other, its = built(name, accelerator, is_sharded)
            for key, own in model_tensors(other).items():
                shards.fill(own, whole[key])
            load_optimizer(its, other, packed, slots.__getitem__)
            again = shards.gathered(optimizer_state(its, other)[0], True)
            assert again.keys() == slots.keys()
            assert all(again[key].equal(value) for key, value in slots.items())
            back = shards.gathered(model_tensors(other), True)
            assert all(back[key].equal(value) for key, value in whole.items())
            train(other, its, accelerator, range(4, 6))  # it goes on from there


def a_device_flag_skips_a_fused_step(accelerator) -> None:
    for name in ("adam", "adamw"):
        model, optimizer = built(name, accelerator, True)
        before = shards.gathered(model_tensors(model), True)
        train(model, optimizer, accelerator, range(1), found_inf=1.0)
        after = shards.gathered(model_tensors(model), True)
        assert all(after[key].equal(value) for key, value in before.items())
        train(model, optimizer, accelerator, range(1), found_inf=0.0)
        after = shards.gathered(model_tensors(model), True)
        assert not all(after[key].equal(value) for key, value in before.items())


def all_start_from_the_main_process(accelerator) -> None:
    torch.manual_seed(accelerator.process_index)
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    model[1].running_mean.uniform_()
    sharding.place(model, accelerator, False)
    torch.manual_seed(0)
    mains = nn.Linear(7, 5).weight
    assert shards.gathered(model_tensors(model), True)["0.weight"].equal(mains)
    means = torch.stack([torch.zeros(5) for _ in range(accelerator.num_processes)])
    means[accelerator.process_index] = model[1].running_mean
    torch.distributed.all_reduce(means)
    assert (means == means[0]).all()


def what_a_model_gives_besides_logits_leaves_no_hooks(accelerator) -> None:
    model = GPT(11, depth=2, width=8, heads=2)
    sharding.place(model, accelerator, False)
    for _ in range(3):
        output = model(torch.arange(6).view(2, 3), hidden_only=True)
        nn.functional.linear(output["hidden"], output["head"]).sum().backward()
        assert not isinstance(output["head"], nn.Parameter)  # FSDP2 hooks into what it returns
        assert all(p.grad is not None for p in model.parameters())


def bf16_is_for_computing_only(accelerator) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8)),
                          nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)), nn.Linear(8, 3))
    sharding.place(model, accelerator, False)
    seen = []

    def look(part, args):
        seen.append((isinstance(part, nn.BatchNorm1d), part.weight.dtype))

    for part in model.modules():
        if isinstance(part, nn.Linear | nn.BatchNorm1d):
            part.register_forward_pre_hook(look)
    torch.manual_seed(accelerator.process_index)
    output = model(torch.randn(6, 16))
    assert output.dtype == torch.float32
    output.square().sum().backward()
    assert len(seen) == 5
    assert all(weight == (torch.float32 if is_norm else torch.bfloat16) for is_norm, weight in seen)
    for parameter in model.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    # The mean over processes of numbers of 8 bits needs more of them, and has them.
    gradient = shards.whole(model[0][0].weight.grad)
    assert not gradient.bfloat16().float().equal(gradient)


def main() -> None:
    accelerator = runtime.make_accelerator(False, 1)
    if accelerator.mixed_precision == "bf16":
        bf16_is_for_computing_only(accelerator)
        return finish()
    torch.Tensor.bfloat16 = torch.Tensor.float  # Muon's, whose rounding would hide its mistakes
    every_optimizer_steps_as_on_whole_parameters(accelerator)
    states_are_torchs_own_and_go_into_whole_and_cut_models(accelerator)
    a_device_flag_skips_a_fused_step(accelerator)
    all_start_from_the_main_process(accelerator)
    what_a_model_gives_besides_logits_leaves_no_hooks(accelerator)
    finish()


def finish() -> None:
    print("all holds")
    sys.stdout.flush()
    torch.distributed.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()
