"""Readers: the plan's micro-batches, the same bits in memory and from disk, on any number of
processes.
"""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
from launching import ROOT, load

from trainlib import data, plan
from trainlib.data import loading, workers

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


@pytest.mark.parametrize("options", [
    {}, {"in_memory": False, "workers": 0}, {"in_memory": False, "workers": 2},
], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_all_processes_together_read_the_plan(world_size, options, image_folder):
    train = load("label", source=image_folder).train  # 26 samples
    split = load("label", source=image_folder, **options).train
    batch_plan = plan.BatchPlan(len(split), 10, seed=0)
    readers = [data.Reader(split, batch_plan, plan.assign(10, 3, rank, world_size), CPU)
               for rank in range(world_size)]
    last_of_block = batch_plan.steps_per_block - 1
    for step in (0, 1, last_of_block, last_of_block + 1, 2):  # also back into an earlier block
        parts = [reader.take(step) for reader in readers]
        real = sorted((p for mine in parts for p in mine if p.is_real), key=lambda p: p.number)
        samples = torch.from_numpy(batch_plan.samples(step))
        assert [part.number for part in real] == [0, 1, 2, 3]
        wanted = train.inputs[samples].float() / 255
        assert torch.cat([part.inputs for part in real]).equal(wanted)
        targets = torch.cat([part.targets["label"] for part in real])
        assert targets.equal(train.targets["label"][samples])
        for mine in parts:
            assert [part.is_last for part in mine] == [False] * (len(mine) - 1) + [True]
        assert len({len(mine) for mine in parts}) == 1
        assert readers[-1].rows(step) == train.rows[samples].tolist()
    for size in (4, 7, 100):
        found = {}
        for rank in range(world_size):
            reader = data.EvalReader(split, size, rank, world_size, CPU)
            for number, inputs, targets in reader:
                assert number % world_size == rank
                found[number] = inputs, targets["label"]
        assert sorted(found) == list(range(reader.num_batches))
        wanted = train.inputs.float() / 255
        assert torch.cat([found[number][0] for number in sorted(found)]).equal(wanted)
        assert torch.cat([found[number][1] for number in sorted(found)]).equal(
            train.targets["label"])


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_data_set_smaller_than_a_batch_is_read_several_times(in_memory, tmp_path):
    (tmp_path / "few.csv").write_text("x,y\n0,a\n1,b\n2,a\n")
    (tmp_path / "other.csv").write_text("x,y\n0,a\n")
    split = load("y", source=str(tmp_path / "few.csv"), in_memory=in_memory, workers=0,
                 validation_split=str(tmp_path / "other.csv")).train
    reader = data.Reader(split, plan.BatchPlan(3, 8, 0), plan.assign(8, 8, 0, 1), CPU)
    seen = torch.cat([reader.take(step)[0].inputs for step in range(3)])
    assert seen.flatten().int().bincount().tolist() == [8, 8, 8]


def test_workers_go_on_from_step_to_step_and_end_with_their_reader(image_folder, monkeypatch):
    started = []

    class Loader(workers.DataLoader):
        def __init__(self, *arguments, **named):
            started.append(named["num_workers"])
            super().__init__(*arguments, **named)

    monkeypatch.setattr(workers, "DataLoader", Loader)
    split = load("label", source=image_folder, in_memory=False, workers=1).train
    reader = data.Reader(split, plan.BatchPlan(26, 8, 0), plan.assign(8, 4, 0, 1), CPU)
    state = torch.get_rng_state()
    for step in (0, 1, 2, 3):
        reader.take(step)
    assert started == [1]
    reader.take(9)
    assert started == [1, 1] and len(multiprocessing.active_children()) == 1
    assert torch.get_rng_state().equal(state)  # the run's own random numbers
    begin = time.monotonic()
    del reader  # without the cyclic garbage collector, in which workers take 5 seconds each
    assert not multiprocessing.active_children() and time.monotonic() - begin < 4


def test_workers_outlive_the_signals_that_schedulers_and_terminals_send(image_folder):
    split = load("label", source=image_folder, in_memory=False, workers=2).train
    reader = data.Reader(split, plan.BatchPlan(26, 8, 0), plan.assign(8, 4, 0, 1), CPU)
    reader.take(0)  # of both workers, which are therefore well under way
    workers = multiprocessing.active_children()
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        for worker in workers:
            os.kill(worker.pid, getattr(signal, name))
    for step in range(1, 9):
        reader.take(step)
    assert len(workers) == 2 and all(worker.is_alive() for worker in workers)
    begin = time.monotonic()
    del reader
    assert not any(worker.is_alive() for worker in workers) and time.monotonic() - begin < 10


@pytest.mark.parametrize("end", ["sys.exit(7)", "raise ValueError('here')", "pass"])
@pytest.mark.parametrize("seconds", [0, 60], ids=["idle", "busy"])
def test_a_script_that_leaves_its_workers_half_way_ends(end, seconds):
    """Held by a global name or by a traceback, a loader is not freed before its script has ended.

    A worker may also be in the middle of what takes long.
    """
    script = f"""
import multiprocessing, sys, time
import numpy, torch
from trainlib.data import workers

def decode(rows):
    time.sleep({seconds} * (rows[0] > 1))
    return torch.zeros(1)

stream = workers.decoded(decode, [numpy.array([number]) for number in range(99)], 2)
next(stream), next(stream)
print(*(child.pid for child in multiprocessing.active_children()))
{end}
"""
    begin = time.monotonic()
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                            text=True, timeout=60)
    workers = [int(number) for number in result.stdout.split()]
    code = {"sys.exit(7)": 7, "pass": 0}.get(end, 1)
    assert result.returncode == code and len(workers) == 2, result.stderr
    # Nothing is said but the script's own error.
    assert result.stderr.strip().splitlines()[-1:] == ["ValueError: here"] * (code == 1)
    assert time.monotonic() - begin < 20  # of which the start takes up to ten
    for worker in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(worker, 0)


def test_a_data_set_stays_in_memory_where_it_fits_in_a_quarter(image_folder, monkeypatch):
    size = 29 * 3 * 6 * 5

    class Memory:
        total = 4 * size

    monkeypatch.setattr(loading.psutil, "virtual_memory", Memory)
    assert load("label", source=image_folder).train.inputs is not None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # each process has its share
    assert load("label", source=image_folder).train.inputs is None
    assert load("label", source=image_folder, in_memory=True).train.inputs is not None


def test_a_device_named_with_or_without_its_index_is_one_device():
    split = data.Split(torch.zeros(2, 3), {}, torch.arange(2))
    assert split.inputs.device != torch.device("cpu", 0)  # what a plain comparison says
    assert split.is_on(torch.device("cpu", 0)) and split.is_on(torch.device("cpu"))
    assert not split.is_on(torch.device("cuda")) and not split.is_on(torch.device("cuda", 1))
    on_disk = data.Split(None, {}, torch.arange(2))
    assert not on_disk.is_on(torch.device("cpu"))
