"""The dockerds of other releases (lab/engines.py)."""

from pathlib import Path

from tests.docker.dockerhost import Site

VERSIONS = {"13": "26.1."}  # by Debian release; others are whatever the machine or the day has


def test_engine_is_the_releases_own_and_its_mounts_are_not_the_machines(engine_site: Site) -> None:
    root = Path(f"/proc/{engine_site.docker.pid}/root")
    release = (root / "etc/debian_version").read_text().partition(".")[0]
    version = engine_site.docker.run("version", "--format", "{{.Server.Version}}").stdout
    assert version.startswith(VERSIONS.get(release, version))
    assert "build/engines" not in Path("/proc/self/mountinfo").read_text()
