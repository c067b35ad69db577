"""The runtime folder: what is left of it when the daemon ends."""

from pathlib import Path

import pytest

from gangway import runtime
from gangway.daemon.home import Home


@pytest.mark.parametrize("is_abandoned", [False, True])
@pytest.mark.parametrize("has_options", [False, True])
def test_only_an_operators_options_outlive_an_abandoned_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_abandoned: bool, has_options: bool
) -> None:
    monkeypatch.setattr(runtime, "BASE", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with Home(None, -1) as home:
        (home.folder / runtime.STATE).touch()
        if has_options:
            (home.folder / runtime.START).touch()
        home.is_abandoned = is_abandoned
    left = {path.name for path in home.folder.iterdir()} if home.folder.exists() else None
    if is_abandoned:
        assert left == ({runtime.START} if has_options else None)
    else:
        assert left == {runtime.LOCK, runtime.STATE} | ({runtime.START} if has_options else set())
