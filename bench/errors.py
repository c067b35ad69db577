"""The errors of the benchmark."""


class CannotCarry(Exception):
    """A contender failed in a row. That is a result: the table shows it instead of a figure."""


class CannotMeasure(Exception):
    """The benchmark itself cannot run; the user sees the message as one line."""
