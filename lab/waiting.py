"""Waiting for a condition, with a deadline: the tests, the benchmark and the demo have no sleeps for luck."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")
_PAUSE_S = 0.02

# tests/vm emulates the processor, which takes its time.
_SLOWNESS = 10 if "GANGWAY_VM" in os.environ else 1


def wait_until(condition: Callable[[], _Result], what: str, patience_s: float = 10) -> _Result:
    """Asks until the answer is true, and gives that answer; AssertionError if it is not within `patience_s` seconds.

    `what` ends the sentence "waited in vain for", and names what should have come true.
    """
    deadline = time.monotonic() + patience_s * _SLOWNESS
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise AssertionError(f"waited in vain for {what}, {patience_s:g} s long")
        time.sleep(_PAUSE_S)
