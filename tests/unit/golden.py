"""Texts that are kept in tests/golden and compared exactly; GANGWAY_WRITE_GOLDEN=1 writes them anew."""

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"
WRITE = os.environ.get("GANGWAY_WRITE_GOLDEN") == "1"


def assert_golden(name: str, text: str) -> None:
    """`text` is what tests/golden/NAME has, to the letter."""
    path = FOLDER / name
    if WRITE:
        path.write_text(text)
    assert text == path.read_text(), f"{path} says otherwise; if it is out of date: GANGWAY_WRITE_GOLDEN=1"
