"""Completion in zsh and fish; tests/unit/test_completion.py tries bash."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.shells import complete
from tests.unit.answering import COMPLETED, answering

_SCRIPTS = {"zsh": "_gangway", "fish": "gangway.fish"}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with answering(tmp_path_factory.mktemp("answers") / "gangway.sock") as found:
        yield found


@pytest.mark.parametrize(("typed", "completed"), COMPLETED)
@pytest.mark.parametrize("shell", _SCRIPTS)
def test_shell_completes(shell: str, typed: str, completed: str, tmp_path: Path, environment: dict[str, str]) -> None:
    script = Path(__file__).parents[2] / "packaging/completions" / _SCRIPTS[shell]
    (tmp_path / "something.toml").touch()
    assert complete(shell, script, typed, tmp_path, environment) == completed
