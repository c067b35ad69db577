"""Compares texts with the files in tests/golden; WRITE_GOLDEN=1 writes these files."""

import os
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "golden"
WRITE = os.environ.get("WRITE_GOLDEN") == "1"


def assert_golden(name: str, text: str) -> None:
    """Assert that `text` is the content of tests/golden/NAME."""
    path = FOLDER / name
    if WRITE:
        path.write_text(text)
    assert text == path.read_text(), f"{path} differs; if it is out of date, run the test with WRITE_GOLDEN=1"
