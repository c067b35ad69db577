"""`make demo` on a minimal Debian 12, as a new user runs it."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.roots import Root, fresh_root

_README = (Path(__file__).parents[2] / "README.md").read_text()
_SOURCES = "/root/gangway"


@pytest.fixture(scope="module")
def root() -> Iterator[Root]:
    """Debian 12 with what the README asks for, after `make demo`."""
    with fresh_root("bookworm") as made:
        made.install("git", "make", "python3")
        made.run("apt-get", "clean")
        made.add_sources(_SOURCES)
        yield made


def test_demo_installs_little_and_shows_progress(root: Root) -> None:
    before_mb, start_s = root.size_mb(), time.monotonic()
    shown = root.run("make", "-C", _SOURCES, "demo").stdout
    took_s, grew_mb = time.monotonic() - start_s, root.size_mb() - before_mb
    print(f"make demo took {took_s:.0f} s and {grew_mb} MB")
    assert "Everything was cleaned up" in shown
    assert "make: Debian packages: installing, " in shown
    assert grew_mb <= 350
    assert not (root.path / "usr/bin/clang").exists()


def test_the_readmes_first_command_works_as_it_is_written(root: Root) -> None:
    command = re.search(r"`(make build && .*gangway run .*)`", _README)
    assert command
    assert root.answer(f"(cd {_SOURCES}; {command[1]})", "http://127.0.0.1:8000") == "200"
