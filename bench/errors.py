"""Who must act when something goes wrong."""


class CannotCarry(Exception):
    """A contender does not get through a row.  That is a result: it stands in the table instead of a figure."""


class CannotMeasure(Exception):
    """The benchmark itself cannot run; the message is the one line that the user sees."""
