"""Requests that want what a container has that is gone.

What this file knows: that a refusal may be due to one.  What it must not know: what is asked for, how it is withdrawn.

A container's end gives notice, and is looked after within a tenth of a second; a request may come before that.
"""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from gangway.errors import Conflict, PortInUse


class Withdrawing(Protocol):
    """Who can withdraw the containers whose namespace has ended, and says whether there was one."""

    def withdraw_what_is_gone(self) -> bool: ...


_Host = TypeVar("_Host", bound=Withdrawing)
_Given = ParamSpec("_Given")
_Answer = TypeVar("_Answer")


def again_without_the_gone(
    method: Callable[Concatenate[_Host, _Given], _Answer],
) -> Callable[Concatenate[_Host, _Given], _Answer]:
    """A request that is refused is tried again, if what it wants was perhaps a container's whose namespace has ended.

    To look at all of them before each request would cost more than most requests do.
    """

    @wraps(method)
    def asked(service: _Host, /, *given: _Given.args, **named: _Given.kwargs) -> _Answer:
        try:
            return method(service, *given, **named)
        except (Conflict, PortInUse):
            if not service.withdraw_what_is_gone():
                raise
        return method(service, *given, **named)

    return asked
