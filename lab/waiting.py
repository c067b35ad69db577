"""Waiting for a condition with a deadline, instead of sleeping for some time and hoping."""

import os
import time
from collections.abc import Callable
from typing import TypeVar

_Result = TypeVar("_Result")
# A pause is a tenth of the time that was waited already, but no shorter than it took to look: some list a whole host.
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
        looked_s = time.monotonic()
        result = condition()
        if result:
            return result
        now_s = time.monotonic()
        waited_s = now_s - began_s
        if waited_s > patience_s:
            raise AssertionError(f"timed out after {patience_s:g} s waiting for {what}")
        time.sleep(min(max(waited_s / 10, now_s - looked_s, _PAUSES_S[0]), _PAUSES_S[1]))
