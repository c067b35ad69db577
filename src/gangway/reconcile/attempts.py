"""Attempts that may fail, in rounds: a failure that is the same as in the round before is not logged again."""

from collections.abc import Callable

from gangway.errors import GangwayError, leaves


class Attempts:
    """What has failed in this round, and in the one before; `warn` logs it."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._failures: set[str] = set()  # as they were logged
        self._former: set[str] = set()

    @property
    def failures(self) -> tuple[str, ...]:
        """What has failed in this round, or in the one before if nothing has yet."""
        return tuple(sorted(self._failures or self._former))

    def begin_round(self) -> None:
        self._former, self._failures = self._failures, set()

    def forget(self) -> None:
        """Log every failure again: nothing has failed."""
        self._former, self._failures = set(), set()

    def attempt(self, call: Callable[[], object], what: str = "") -> bool:
        """Try something; True if it was done.  A failure is logged with `what` before it."""
        done = True
        try:
            call()
        except* GangwayError as errors:
            done = False
            for text in (f"{what}: {error}" if what else str(error) for error in leaves(errors)):
                if text not in self._failures | self._former:
                    self._warn(text)
                self._failures.add(text)
        return done
