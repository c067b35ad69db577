"""The dockerds of other releases (lab/engines.py)."""

from pathlib import Path

from gangway.docker.leftovers import find, parse
from tests.docker.dockerhost import Site

VERSIONS = {"13": "26.1."}  # by Debian release; others are whatever the machine or the day has


def test_engine_is_the_releases_own_and_its_mounts_are_not_the_machines(engine_site: Site) -> None:
    root = Path(f"/proc/{engine_site.docker.pid}/root")
    release = (root / "etc/debian_version").read_text().partition(".")[0]
    version = engine_site.docker.run("version", "--format", "{{.Server.Version}}").stdout
    assert version.startswith(VERSIONS.get(release, version))
    assert "build/engines" not in Path("/proc/self/mountinfo").read_text()


def test_cleanup_knows_every_rule_of_the_release(engine_site: Site) -> None:
    """And takes no chain for one that others use."""
    docker = engine_site.docker
    docker.run("network", "create", "--internal", "inner")
    docker.run("network", "create", "-o", "com.docker.network.bridge.enable_icc=false", "strict")
    modes = {"direct": ("routed",), "cell": ("isolated", "--internal")}  # which old releases ignore
    for name, (mode, *words) in modes.items():
        docker.run("network", "create", "-o", f"com.docker.network.bridge.gateway_mode_ipv4={mode}", *words, name)
    direct = engine_site.container("--network", "direct", "-p", "8012:80")
    name = engine_site.container("--network", "strict", "-p", "8010:80", "-p", "127.0.0.1:8011:81/udp")
    listings = [engine_site.host.run(f"{tool}-save").stdout for tool in ("iptables", "ip6tables")]
    engine_site.remove(name, direct)
    docker.run("network", "rm", "inner", "strict", *modes)
    for listing in listings:
        found = find(parse(listing), {})
        assert not [one for one in found if one.kept]
        known = [str(rule) for one in found for rule in one.rules]
        assert sorted(known) == sorted(line for line in listing.splitlines() if line.startswith("-A"))
    assert "8011" in listings[0]
