"""What goes wrong, named by who has to act.  Knows no exit code and no HTTP status; the text is for a person: what
failed, on what, what to do."""


class GangwayError(Exception):
    """Any of those below."""


class InvalidRequest(GangwayError):
    """What was asked for makes no sense: whoever asked has to ask for something else."""


class Conflict(GangwayError):
    """What was asked for does not fit what is there: whoever asked has to ask for something else, or change that."""


class PortTaken(GangwayError):
    """A host port is somebody else's: whoever has it (the text says who) has to let it go, or another be taken."""


class HostRefused(GangwayError):
    """The kernel, or one of its tools, did not do what was asked: the host's operator has to see to it."""


class Unsupported(GangwayError):
    """The host lacks what this needs: a kernel's feature, a program, a right."""
