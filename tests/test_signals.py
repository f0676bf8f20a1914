"""Signals during start-up and later, with a free and with a blocked main thread, and requests."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from warm import fork

from trainlib.runtime.signals import SIGNALS, Preempted, Requests, Signals

ROOT = Path(__file__).resolve().parent.parent
# The module alone, because the package around it imports torch. ``block`` is a wait in C that no
# signal ends: a mutex locked twice.
START = """
import ctypes, importlib.util, os, signal, sys, threading, time
spec = importlib.util.spec_from_file_location("signals", "trainlib/runtime/signals.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

def say(*words):
    print(*words, flush=True)

def leave(reason):
    say(reason)
    os._exit(75)

def block():
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_lock(mutex)
    threading.Timer(0.1, say, ["ready"]).start()  # by when the main thread is in C
    library.pthread_mutex_lock(mutex)
    say("not blocked")

def wait_for(condition):
    while not condition():
        time.sleep(0.01)

signals = module.Signals(leave, second_after_seconds=0.3, startup_grace_seconds=0.3)
"""
NAMES = [number.name for number in SIGNALS]


@contextmanager
def started(script: str):
    """A process that has said that it is ready."""
    command = [sys.executable, "-c", START + script]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:
        try:
            assert process.stdout.readline() == "ready\n", process.stdout.read()
            yield process
        finally:
            process.kill()


def end_of(process: subprocess.Popen) -> tuple[str, int]:
    output, _ = process.communicate(timeout=20)
    return output, process.returncode


def test_all_five_are_caught():
    assert NAMES == ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"]


def test_under_nohup_the_loss_of_the_terminal_stays_ignored():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signals = Signals(lambda reason: None)
    try:
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signals.restore()
        signal.signal(signal.SIGHUP, former)


def test_preempted_passes_what_catches_exceptions_and_says_to_run_again():
    assert Preempted.exit_code == 75 and not issubclass(Preempted, Exception)
    assert str(Preempted("SIGTERM during start-up")) == "SIGTERM during start-up"


@pytest.mark.parametrize("name", NAMES)
def test_during_start_up_a_signal_ends_the_run(name):
    script = """
try:
    say("ready")
    time.sleep(60)
except module.Preempted as preempted:
    signal.raise_signal(signal.SIGINT)  # a forwarded repeat does not disturb the clean-up
    say(preempted, signals.received)
    sys.exit(preempted.exit_code)
"""
    with started(script) as process:
        os.kill(process.pid, signal.Signals[name])
        assert end_of(process) == (f"{name} during start-up {name}\n", 75)


def test_a_start_up_stuck_in_c_is_left_after_the_grace():
    with started("block()") as process:
        before = time.monotonic()
        os.kill(process.pid, signal.SIGTERM)
        assert end_of(process) == ("SIGTERM during start-up, which did not end\n", 75)
        assert 0.3 <= time.monotonic() - before < 5


def test_a_signal_that_a_library_swallows_is_raised_at_the_end_of_start_up():
    script = """
try:
    say("ready")
    time.sleep(60)
except BaseException:
    pass
try:
    signals.hold()
except module.Preempted as preempted:
    say(preempted)
"""
    with started(script) as process:
        os.kill(process.pid, signal.SIGUSR2)
        assert end_of(process) == ("SIGUSR2 during start-up\n", 0)


def test_a_signal_at_the_very_end_of_start_up_is_noted():
    script = """
signals._writer.send(bytes([signal.SIGTERM]))  # as C does, before Python's handler runs
time.sleep(0.1)
signals.hold()
say("ready")
time.sleep(0.5)
say("went on")
"""
    with started(script) as process:
        assert end_of(process) == ("went on\n", 0)


@pytest.mark.parametrize("name", NAMES)
def test_later_a_signal_is_noted_and_no_more(name):
    script = """
signals.hold()
say("ready")
wait_for(lambda: signals.received)
time.sleep(0.5)  # longer than the grace, which is start-up's
say(signals.received)
"""
    with started(script) as process:
        os.kill(process.pid, signal.Signals[name])
        assert end_of(process) == (f"{name}\n", 0)


def test_repeats_in_quick_succession_are_one_request():
    script = """
signals.hold()
say("ready")
wait_for(lambda: signals.received)
signal.raise_signal(signal.SIGINT)
signal.raise_signal(signal.SIGTERM)
time.sleep(0.5)
say("went on after", signals.received)
"""
    with started(script) as process:
        os.kill(process.pid, signal.SIGINT)
        assert end_of(process) == ("went on after SIGINT\n", 0)


@pytest.mark.parametrize("wait", ["block()", "say('ready'); time.sleep(60)"],
                         ids=["main thread in C", "main thread free"])
def test_a_second_signal_leaves_at_once(wait):
    with started(f"signals.hold()\n{wait}") as process:
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        before = time.monotonic()
        os.kill(process.pid, signal.SIGINT)
        assert end_of(process) == ("a second SIGINT\n", 75)
        assert time.monotonic() - before < 2


def test_other_handlers_signals_are_no_request():
    script = """
heard = []
signal.signal(signal.SIGALRM, lambda number, frame: heard.append(number))
signals.hold()
say("ready")
for _ in range(2):
    signal.raise_signal(signal.SIGALRM)
    time.sleep(0.4)
say(len(heard), signals.received)
"""
    with started(script) as process:
        assert end_of(process) == ("2 None\n", 0)


@pytest.mark.parametrize("where", ["main", "thread"])
@pytest.mark.parametrize("name", NAMES)
def test_a_forked_child_is_ended_by_its_own_signals_and_the_parent_hears_nothing(name, where):
    script = f"""
module.Signals(leave).restore()  # an earlier one must not take its hook away
signals.restore()
signals = module.Signals(leave, 0.1, 0.5)
signals.hold()

def fork():
    child = os.fork()
    if child == 0:
        try:
            time.sleep(60)
        finally:  # SIGINT alone is raised
            os._exit(int(sys.exc_info()[0] is KeyboardInterrupt))
    for _ in range(2):
        time.sleep(0.15)
        try:
            os.kill(child, signal.{name})
        except ProcessLookupError:
            pass
    status = os.waitpid(child, 0)[1]
    say(os.waitstatus_to_exitcode(status))

say("ready")
for _ in range(2):  # two, because one request would be noted without a word
    if "{where}" == "main":
        fork()
    else:
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
time.sleep(0.1)
say(signals.received)
"""
    code = 1 if name == "SIGINT" else -signal.Signals[name]
    with started(script) as process:
        assert end_of(process) == (f"{code}\n{code}\nNone\n", 0)


def test_a_child_that_runs_a_program_is_ended_by_a_signal():
    script = """
import subprocess
signals.hold()
say("ready")
child = subprocess.Popen(["sleep", "60"])
child.terminate()
say(child.wait(), signals.received)
"""
    with started(script) as process:
        assert end_of(process) == (f"{-signal.SIGTERM} None\n", 0)


def test_restoring_puts_everything_back():
    before = [signal.getsignal(number) for number in SIGNALS]
    wakeup, threads = signal.set_wakeup_fd(-1), threading.active_count()
    signal.set_wakeup_fd(wakeup)
    signals = Signals(pytest.fail)
    assert signal.getsignal(signal.SIGTERM) != before[0]
    signals.restore()
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(wakeup) == wakeup
    assert Signals.installed is None and threading.active_count() == threads


def requests_of(received=None, save_every_seconds=None, is_main=True) -> Requests:
    accelerator = SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, is_main_process=is_main
    )
    return Requests(accelerator, SimpleNamespace(received=received), save_every_seconds)


class Untouchable:
    """Flags that nobody may write to, nor read."""

    def __getitem__(self, index):
        raise AssertionError("touched")


def test_without_a_request_the_flags_are_not_touched():
    requests = requests_of(save_every_seconds=1000)
    requests.add_to(Untouchable())
    requests.take([0.0, 0.0])
    assert requests.stop is False and requests.save is False and requests.agree() is False


@pytest.mark.parametrize("received, seconds, is_main, flags", [
    ("SIGTERM", None, True, [1, 0]), ("SIGTERM", 0, True, [1, 1]), (None, 0, True, [0, 1]),
    (None, 0, False, [0, 0]), ("SIGINT", 0, False, [1, 0]), (None, None, True, [0, 0]),
])
def test_a_process_adds_what_it_asks_for(received, seconds, is_main, flags):
    sums = torch.tensor([2.0, 0.0], dtype=torch.float64)  # of others
    requests_of(received, seconds, is_main).add_to(sums)
    assert sums.tolist() == [2 + flags[0], flags[1]]


def test_a_save_is_asked_for_once_until_it_is_done():
    requests = requests_of(save_every_seconds=0.05)
    time.sleep(0.06)
    flags = torch.zeros(Requests.NUM)
    requests.add_to(flags)
    assert flags.tolist() == [0, 1] and not requests.save  # nobody has agreed yet
    time.sleep(0.06)
    requests.add_to(Untouchable())  # the answer is on its way
    requests.take([0, 1])
    requests.take([0, 0])
    assert requests.save is True and requests.stop is False
    requests.saved()
    assert requests.save is False
    requests.add_to(Untouchable())  # the clock has started again
    time.sleep(0.06)
    requests.add_to(flags)
    assert flags.tolist() == [0, 2]


def test_a_stop_is_for_good():
    requests = requests_of()
    requests.take([3, 0])
    requests.take([0, 0])
    requests.saved()
    assert requests.stop is True and requests.agree() is True


def test_alone_a_process_agrees_with_itself():
    assert requests_of("SIGTERM").agree() is True


def test_one_signalled_process_of_two_stops_both_at_the_same_call(tmp_path):
    result = fork([str(tmp_path)], 2, script="tests/agree_requests.py")
    files = sorted(tmp_path.glob("*.json"))
    assert len(files) == 2, result.stdout + result.stderr
    main, signalled = (json.loads(file.read_text()) for file in files)
    expected = [False] * 3 + [True] * 3
    for seen in (main, signalled):
        assert [step["agreed"] for step in seen] == expected
        assert [step["stop"] for step in seen] == expected
        assert [step["save"] for step in seen] == [True] * 6  # by the main process's clock
    assert {step["received"] for step in main} == {None}
    assert signalled[-1]["received"] == "SIGUSR1"
