"""The errors, named by who has to act.  Their text is for a person: what failed, on what, what to do."""

from collections.abc import Iterator


class GangwayError(Exception):
    """Base of the errors below."""


class InvalidRequest(GangwayError):
    """The request makes no sense by itself: the client has to change it."""


class Conflict(GangwayError):
    """The request does not fit the current state: the client has to change the request, or that state."""


class PortInUse(GangwayError):
    """Another program uses a host port (the text says which): stop that program, or choose another port."""


class HostRefused(GangwayError):
    """The kernel, or one of its tools, refused or failed: the host's operator has to act."""


class Forbidden(GangwayError):
    """This client may not do that: another one has to ask, who may."""


class Unsupported(GangwayError):
    """The host lacks something that this needs: a kernel feature, a program, a privilege."""


class TimedOut(HostRefused):
    """A tool, or a lock that another program holds, has kept the request waiting for too long."""


class Busy(GangwayError):
    """As many clients as may do this at the same time do it already: end one of them, or try again later."""


def leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """Yield the errors of a group, and of the groups in it."""
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from leaves(error)
        else:
            yield error
