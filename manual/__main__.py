"""Draw the pictures again, and run the commands of pages again, whose output is then in the pages.

python3 -m manual [PAGE…]       all pages, if none is named
"""

import sys
from pathlib import Path

from manual import chart, roads
from manual.consoles import left_open, with_output
from manual.pages import PAGES, ROADS, played


def main() -> None:
    """Write what has changed."""
    _write(chart.CHART, chart.draw(chart.RESULTS.read_text()))
    _write(ROADS, roads.draw(roads.explained()))
    for path in [Path(name).resolve() for name in sys.argv[1:]] or PAGES:
        page = path.read_text()
        changed = [(command, left_open(lines)) for command, lines, _ in played(page) if not command.prints(lines)]
        _write(path, with_output(page, changed))


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
        print(f"written: {path}")


main()
