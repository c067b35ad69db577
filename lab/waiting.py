"""Waiting for a condition with a deadline, instead of sleeping for some time and hoping."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")
# A pause is a tenth of the time that was waited already: whether a process has ended takes milliseconds to find out.
_PAUSES_S = 0.005, 0.1

# tests/vm emulates the processor, which makes everything slower.
_SLOWNESS = 10 if "GANGWAY_VM" in os.environ else 1


def wait_until(condition: Callable[[], _Result], what: str, patience_s: float = 10) -> _Result:
    """Call `condition` until its result is true, and return that result.

    AssertionError: it was not true within `patience_s` seconds. `what` names in the message what should have happened.
    """
    patience_s *= _SLOWNESS
    began_s = time.monotonic()
    while True:
        result = condition()
        if result:
            return result
        waited_s = time.monotonic() - began_s
        if waited_s > patience_s:
            raise AssertionError(f"timed out after {patience_s:g} s waiting for {what}")
        time.sleep(min(max(waited_s / 10, _PAUSES_S[0]), _PAUSES_S[1]))
