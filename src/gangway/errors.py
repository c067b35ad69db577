"""What goes wrong, named by who has to act.  Knows no exit code and no HTTP status; the text is for a person."""


class InvalidRequest(Exception):
    """What was asked for makes no sense: whoever asked has to ask for something else."""
