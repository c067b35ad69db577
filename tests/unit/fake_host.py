"""A host's settings in memory: sysctls, with what the kernel changes by itself, and a storage for what was saved."""

import pytest

from gangway.errors import HostRefused
from gangway.firewall.nat_guard import NatGuard
from gangway.host import probe, saved_settings, sysctl

IPV4, IPV6 = "net.ipv4.ip_forward", "net.ipv6.conf.all.forwarding"
REDIRECTS = "net.ipv4.conf.all.accept_redirects"


class FakeHost:
    """Sysctls by name, with dots."""

    def __init__(self, patch: pytest.MonkeyPatch, settings: dict[str, str]) -> None:
        self.settings = settings
        self.boot, self.cookie = "a boot", 1
        self.refused: set[str] = set()
        """Settings that cannot be written."""
        for name in ("read", "write", "interfaces", "unwritable"):
            patch.setattr(sysctl, name, getattr(self, name))
        patch.setattr(probe, "boot_id", lambda: self.boot)
        patch.setattr(saved_settings, "netns_identity", lambda: str(self.cookie))

    def read(self, name: str) -> str | None:
        return self.settings.get(name.replace("/", "."))

    def write(self, name: str, value: str) -> None:
        name = name.replace("/", ".")
        if name in self.refused or name not in self.settings:
            raise HostRefused(f"{name} cannot be set: run as root")
        if self.settings[name] != value:
            self.settings[name] = value
            self._copy(name, value)

    def unwritable(self, name: str) -> str:
        return "read-only" if name.replace("/", ".") in self.refused else ""

    def interfaces(self, family: int) -> list[str]:
        prefix, suffix = f"net.ipv{family}.conf.", ".forwarding"
        names = [name[len(prefix) : -len(suffix)] for name in self.settings if name.startswith(prefix)]
        return sorted({name for name in names if f"{prefix}{name}{suffix}" in self.settings} - {"all"})

    def _copy(self, name: str, value: str) -> None:
        """Change what the kernel does along with a forwarding switch."""
        for main, prefix in ((IPV4, "net.ipv4.conf."), (IPV6, "net.ipv6.conf.")):
            if name == main:
                for other in self.settings:
                    if other.startswith(prefix) and other.endswith(".forwarding"):
                        self.settings[other] = value
        if name == IPV4 and REDIRECTS in self.settings:
            self.settings[REDIRECTS] = "0" if value == "1" else "1"


class FakeGuard(NatGuard):
    """A guard that changes nothing on the host."""

    def __init__(self, unavailable: str = "") -> None:
        super().__init__()
        self.unavailable, self.is_on = unavailable, False

    def start(self) -> None:
        self.is_on = not self.unavailable

    def stop(self) -> None:
        self.is_on = False


class FakeStorage:
    """A storage that survives the objects that use it."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}

    def remember(self, what: str, value: str) -> None:
        self.texts[what] = value

    def recall(self, what: str) -> str | None:
        return self.texts.get(what)

    def forget(self, what: str) -> None:
        self.texts.pop(what, None)
