"""What iptables' programs print when they fail, as an error."""

import os
from pathlib import Path

import pytest

from gangway.errors import HostRefused
from gangway.firewall.iptables.tool import Iptables


def _install(folder: Path, says: str) -> None:
    """Put programs that fail with a message into a folder."""
    for name in ("ip6tables", "ip6tables-save", "ip6tables-restore"):
        (folder / name).write_text(f"#!/bin/sh\nprintf '{says}' >&2\nexit 3\n")
        (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("says", "error"),
    [
        (
            "ip6tables-save v1.8.9 (legacy): Cannot initialize: ip6tables who? (do you need to insmod?)",
            "ip6tables-save: the kernel module ip6_tables is not loaded: "
            "modprobe ip6_tables, and add it to /etc/modules",
        ),
        ("# Warning: …\\nip6tables v1.8.9 (nf_tables):\\nline 4: refused\\n", "ip6tables-save: line 4: refused"),
        ("", "ip6tables-save: refused"),
    ],
)
def test_the_reason_is_named(says: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    _install(tmp_path, says)
    with pytest.raises(HostRefused) as raised:
        Iptables(6).policy()
    assert str(raised.value) == error
