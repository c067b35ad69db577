"""The manual pages: there is one of each command and of the settings file, and man has nothing to warn of."""

import os
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from gangway.cli import manual
from gangway.cli.commands import COMMANDS
from gangway.daemon.config import Config
from gangway.relay.settings import TABLE
from scripts.build_man import page_name

_TOP = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the pages.  They are written by Python without other packages, as a wheel's build does."""
    folder = tmp_path_factory.mktemp("man")
    command = (sys.executable, "-I", "-S", _TOP / "scripts/build_man.py", folder)
    subprocess.run(command, check=True, env={"SOURCE_DATE_EPOCH": "86400"})
    return folder


def rendered(page: Path) -> str:
    """Return a page as man shows it.  It fails if man warns of anything."""
    command = ("man", "--warnings", "--no-hyphenation", "--no-justification", "--local-file", page)
    environment = {"PATH": os.environ["PATH"], "MANWIDTH": "80", "LANG": "C.UTF-8"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    return done.stdout


def test_each_command_and_the_settings_have_a_page(pages: Path) -> None:
    names = {f"man1/{page_name(name)}.1" for name in COMMANDS}
    assert {str(path.relative_to(pages)) for path in pages.rglob("*.[15]")} == {
        "man1/gangway.1",
        "man1/gangway-docker-proxy.1",
        "man5/gangway.toml.5",
        *names,
    }


def test_pages_are_reproducible(pages: Path) -> None:
    assert all(" 1970-01-02 " in path.read_text().splitlines()[0] for path in pages.rglob("*.[15]"))


def test_man_shows_a_commands_page_without_warnings(pages: Path) -> None:
    text = " ".join(rendered(pages / "man1/gangway-publish.1").split())
    assert "gangway-publish - publish ports of a container" in text
    assert "gangway publish -p PORTS [--from SUBNET]" in text
    assert "8000-8010:80-90 a range" in text
    assert all(line in text for line, _ in manual.EXAMPLES["publish"])


def test_man_shows_the_overview_without_warnings(pages: Path) -> None:
    text = rendered(pages / "man1/gangway.1")
    assert all(f"{page_name(name)}(1)" in text for name in COMMANDS)


def test_man_shows_every_setting_with_its_default(pages: Path) -> None:
    text = rendered(pages / "man5/gangway.toml.5")
    fields = [field.encode_name for field in msgspec.structs.fields(Config) if field.name not in ("docker", "relay")]
    for key in (*fields, *TABLE, "enabled", "socket"):
        assert re.search(rf"^ +{key} = ", text, re.MULTILINE), key


def test_all_pages_are_without_warnings(pages: Path) -> None:
    files = map(str, sorted(pages.rglob("*.[15]")))
    command = ("groff", "-man", "-Tutf8", "-ww", "-z", *files)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
