"""Which sample is drawn when: bijections, full batches, and nothing that depends on processes."""

import numpy as np
import pytest

from trainlib import plan


def epoch_order(num_samples, epoch=0, seed=0):
    draws = np.arange(epoch * num_samples, (epoch + 1) * num_samples)
    return plan.samples_of(draws, num_samples, seed)


def test_every_epoch_of_every_small_size_holds_each_sample_once():
    for num_samples in [*range(1, 140), 255, 256, 257, 1000, 1437]:
        for epoch in range(3):
            assert sorted(epoch_order(num_samples, epoch)) == list(range(num_samples))


def test_a_sample_far_out_is_found_without_a_detour():
    samples = plan.samples_of(np.arange(10**15, 10**15 + 100), 10**12, seed=0)
    assert samples.min() >= 0 and samples.max() < 10**12 and len(set(samples)) == 100


@pytest.mark.parametrize("num_samples", [97, 128, 360])
def test_positions_and_neighbours_are_uniform(num_samples):
    """Chi-squared of each statistic lies within 5 standard deviations of its mean."""
    epochs = 3000
    orders = plan.samples_of(np.arange(epochs * num_samples), num_samples, seed=1)
    orders = orders.reshape(epochs, num_samples)

    def is_uniform(values, num_values):
        expected = len(values) / num_values
        chi2 = ((np.bincount(values, minlength=num_values) - expected) ** 2 / expected).sum()
        freedom = num_values - 1
        return abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)

    for position in (0, 1, num_samples // 2, num_samples - 1):
        assert is_uniform(orders[:, position], num_samples)
        where = np.argsort(orders, axis=1)[:, position]
        assert is_uniform(where, num_samples)
    step = (orders[:, 1] - orders[:, 0]) % num_samples
    assert is_uniform(step - 1, num_samples - 1)


def test_seeds_and_epochs_give_other_orders():
    orders = {tuple(epoch_order(97, epoch, seed)) for epoch in range(5) for seed in range(5)}
    assert len(orders) == 25


@pytest.mark.parametrize("num_samples, size", [(1, 1), (3, 8), (10, 3), (64, 64), (1437, 64)])
def test_batches_are_full_and_the_same_whether_planned_in_blocks_or_alone(num_samples, size):
    batches = plan.BatchPlan(num_samples, size, seed=3)
    block = batches.block(1)
    for offset in (0, batches.steps_per_block - 1):
        step = batches.steps_per_block + offset
        assert len(block[offset]) == size
        assert (block[offset] == batches.samples(step)).all()
        draws = np.arange(step * size, (step + 1) * size)
        assert (block[offset] == plan.samples_of(draws, num_samples, 3)).all()


@pytest.mark.parametrize("global_size, micro_size", [(1, 1), (64, 16), (50, 16), (5, 2), (7, 7)])
def test_any_number_of_processes_runs_the_same_micro_batches(global_size, micro_size):
    alone = plan.assign(global_size, micro_size, 0, 1)
    assert all(a.is_real for a in alone)
    assert [i for a in alone for i in range(global_size)[a.slots]] == list(range(global_size))
    for world_size in range(1, 9):
        shares = [plan.assign(global_size, micro_size, r, world_size) for r in range(world_size)]
        assert len({len(share) for share in shares}) == 1  # DDP communicates in each
        real = [a for share in shares for a in share if a.is_real]
        assert sorted(real, key=lambda a: a.micro_batch) == alone
        for share in shares:
            for repeated in (a for a in share if not a.is_real):
                assert repeated._replace(is_real=True) in alone


def test_mixing_keeps_order_and_position_apart():
    keys = {plan.mix(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(keys) == 8000
    assert all(0 <= key < 2**64 for key in keys)
    assert plan.mix(-1) == plan.mix(2**64 - 1)


def test_idleness_is_told_only_where_it_costs():
    assert plan.idle_warning(64, 32, 2) is None
    assert plan.idle_warning(64, 16, 1) is None
    assert "50%" in plan.idle_warning(64, 64, 2)
    assert "33%" in plan.idle_warning(64, 16, 3)
