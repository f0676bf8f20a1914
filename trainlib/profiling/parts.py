"""The parts of a step, by the wall time of the main thread."""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch.autograd.profiler import record_function

PREFIX = "part: "  # of a part's name in the trace
COMMUNICATION, REST = "communication", "rest"
PARTS = ("data", "augmentation", "forward", "teachers", "backward", "exact sum", COMMUNICATION,
         "clipping", "optimizer", REST)


class Parts:
    """How long the main thread spends in each part of the steps.

    It is in one part at any moment: what begins ends what was going on. So nothing is counted
    twice, and the parts add up to the whole.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._clock, self._since = clock, 0.0
        self._part: str | None = None
        self._range: Any = None
        self._undo: list[Callable[[], None]] = []

    def enter(self, part: str | None) -> str | None:
        """Begins a part, or with none leaves the step, and returns what was going on."""
        former = self._part
        if part == former:
            return former
        now = self._clock()
        if former is not None:
            self.seconds[former] += now - self._since
            self._range.__exit__(None, None, None)
        self._part, self._since = part, now
        if part is not None:
            self._range = record_function(PREFIX + part)
            self._range.__enter__()
        return former

    def mark(self, owner: Any, name: str, part: str, then: str | None = None) -> None:
        """Has a function of an object, or of a module, count as a part when a step calls it.

        Args:
            then: the part that begins when the function returns; none: what was going on before.
        """
        function, own = getattr(owner, name), vars(owner)
        is_own = name in own

        @wraps(function)  # the signature of an optimizer's step is looked at
        def marked(*args: Any, **kwargs: Any) -> Any:
            if self._part is None:
                return function(*args, **kwargs)
            former = self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.enter(then or former)

        setattr(owner, name, marked)
        self._undo.append(
            (lambda: setattr(owner, name, function)) if is_own else lambda: delattr(owner, name)
        )

    def unmark(self) -> None:
        """Takes all marks away."""
        while self._undo:
            self._undo.pop()()
