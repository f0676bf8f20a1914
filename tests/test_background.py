"""Writing in the background: from copies, in order, with failures that are seen."""

import threading
import time

import pytest
import torch

from trainlib.checkpoint.background import BackgroundWriter


@pytest.fixture
def said():
    return []


@pytest.fixture
def writer(said):
    return BackgroundWriter(said.append)


def test_what_is_written_is_what_was_handed_over(writer):
    weights = torch.arange(6.0).view(2, 3).t()  # not contiguous
    may_write, seen = threading.Event(), []

    def write(files):
        assert may_write.wait(10)
        seen.append({file: {n: t.clone() for n, t in tensors.items()}
                     for file, tensors in files.items()})

    writer.submit("checkpoint", "step 1", {"model": {"w": weights}, "optimizer": {}}, write)
    before = weights.clone()
    weights.add_(1)  # as the next step does
    may_write.set()
    writer.wait()
    assert seen[0]["model"]["w"].equal(before) and seen[0]["optimizer"] == {}


def test_the_same_memory_is_used_again_and_never_while_it_is_written(writer):
    weights, seen = torch.zeros(3), []
    first_may_end = threading.Event()

    def slow(files):
        assert first_may_end.wait(10)
        seen.append((files["m"]["w"].data_ptr(), files["m"]["w"].tolist()))

    writer.submit("checkpoint", "1", {"m": {"w": weights}}, slow)
    weights.fill_(1)
    threading.Timer(0.2, first_may_end.set).start()
    writer.submit("checkpoint", "2", {"m": {"w": weights}}, slow)  # waits for the first
    assert len(seen) == 1
    writer.wait()
    assert [values for _, values in seen] == [[0, 0, 0], [1, 1, 1]]
    assert seen[0][0] == seen[1][0]


def test_another_name_does_not_wait(writer):
    may_end, order = threading.Event(), []
    writer.submit("best", "best", {}, lambda files: (may_end.wait(10), order.append("best")))
    writer.submit("checkpoint", "1", {}, lambda files: order.append("checkpoint"))
    may_end.set()
    writer.wait()
    assert order == ["best", "checkpoint"]


def test_a_failure_is_said_and_kept_until_it_is_made_good(writer, said):
    def full(files):
        raise OSError(28, "No space left on device")

    writer.submit("checkpoint", "step 5", {}, full)
    writer.wait()
    assert said == ["not written: step 5: No space left on device; training goes on"]
    assert list(writer.failures) == ["checkpoint"]
    writer.submit("checkpoint", "step 6", {}, lambda files: None)
    writer.wait()
    assert writer.failures == {}


class Slow:
    """Writes a pair of tensors with a pause between them, so that a copy may come in between."""

    def __init__(self):
        self.seen, self.fails, self.begun = [], False, threading.Semaphore(0)

    def write(self, files):
        self.begun.release()
        first = files["m"]["a"].tolist()
        time.sleep(0.2)
        if self.fails:
            self.fails = False
            raise OSError(28, "No space left on device")
        self.seen.append((first, files["m"]["b"].tolist()))


@pytest.mark.parametrize("is_lost", [False, True])
def test_what_another_job_writes_again_is_of_one_time(writer, is_lost):
    """A checkpoint writes best/ again, while the next best weights are handed over."""
    weights, best, is_retried = {"a": torch.zeros(1), "b": torch.zeros(1)}, Slow(), []

    def checkpoint(files):
        writer.retry("best", is_lost)
        is_retried.append(len(best.seen))

    best.fails = not is_lost
    writer.submit("best", "best/", {"m": weights}, best.write)
    writer.submit("checkpoint", "1", {}, checkpoint)
    if is_lost:  # the checkpoint finds the folder gone after the first has been written
        assert all(best.begun.acquire(timeout=10) for _ in range(2))
    for tensor in weights.values():
        tensor.fill_(1)
    writer.submit("best", "best/", {"m": weights}, best.write)
    writer.wait()
    assert is_retried == [1 + is_lost] and len(best.seen) == 2 + is_lost
    assert all(a == b for a, b in best.seen) and best.seen[-1] == ([1], [1])


def test_half_a_copy_is_never_written(writer, monkeypatch):
    """Memory that runs out while a copy is made leaves the former copy overwritten in part."""
    best = Slow()
    writer.submit("best", "best/", {"m": {"a": torch.zeros(1), "b": torch.zeros(1)}}, best.write)
    writer.wait()

    def no_memory(name, files):
        writer._copies[name]["m", "a"].fill_(1)
        raise MemoryError

    monkeypatch.setattr(writer, "_copy", no_memory)
    with pytest.raises(MemoryError):
        writer.submit("best", "best/", {}, best.write)
    with pytest.raises(OSError, match="was not finished"):
        writer.retry("best", is_lost=True)
    assert best.seen == [([0], [0])]


def test_a_mistake_of_the_code_is_raised(writer):
    writer.submit("checkpoint", "step 5", {}, lambda files: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()


def test_tensors_may_change_their_shape_and_number(writer):
    seen = []
    for tensors in ({"a": torch.zeros(2)}, {"a": torch.ones(3), "b": torch.ones(1)}, {}):
        writer.submit("x", "x", {"f": tensors}, lambda files: seen.append(
            {n: t.tolist() for n, t in files["f"].items()}))
    writer.wait()
    assert seen == [{"a": [0, 0]}, {"a": [1, 1, 1], "b": [1]}, {}]
