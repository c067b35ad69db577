"""`gangway docker cleanup` removes dockerd's rules from the kernel, and no others: by both variants of iptables."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.gangwayd import CommandFailed, Gangway
from lab.netns import Namespace
from lab.waiting import wait_until
from tests.unit.dockers_rules import OTHERS, RELEASE_20, RELEASE_28, RELEASE_28_IPV6, Listing

pytestmark = pytest.mark.any_kernel

VARIANTS = [name for name in ("nft", "legacy") if Path(f"/usr/sbin/iptables-{name}-restore").exists()]
DOCKERS = {"iptables": (RELEASE_20, RELEASE_28), "ip6tables": (RELEASE_28_IPV6,)}
_OPERATORS = "-A DOCKER-USER -s {} -j DROP"
# Matches and targets that are modules of their own, which the kernel may lack; and an address of the other family.
_LEFT_OUT = re.compile(r"sctp|--match-set|CHECKSUM|comment|--mark|MARK|--u32|^-A FORWARD$|172\.19\.0")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of a daemon that finds no dockerd."""
    file: Path = tmp_path_factory.mktemp("settings") / "gangway.toml"
    file.write_text(f'[docker]\nsocket = "{file}.sock"\n')
    return file


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    with Namespace("variant") as space:
        if space.run(f"iptables-{request.param}", "-t", "nat", "-S", check=False).returncode:
            pytest.skip(f"the kernel has no iptables-{request.param}")
    return str(request.param)


@pytest.fixture(scope="module")
def shared(settings: Path) -> Iterator[Gangway]:
    with Namespace("host") as host, Gangway(host, "--config", str(settings)) as made:
        yield made


@pytest.fixture
def gangway(shared: Gangway) -> Iterator[Gangway]:
    """A daemon in a namespace that has no rules."""
    yield shared
    shared.host.run("nft", "flush", "ruleset")
    for tool in DOCKERS if "legacy" in VARIANTS else ():
        for table in shared.host.run(f"{tool}-legacy-save").stdout.splitlines():
            if table.startswith("*"):
                policies = ":FORWARD ACCEPT\n" * (table == "*filter")
                shared.host.run(f"{tool}-legacy-restore", input=f"{table}\n{policies}COMMIT\n")


def add(host: Namespace, tool: str, *listings: Listing, policy: str = "") -> None:
    """Add rules, after those that are there."""
    for listing in listings:
        text = []
        for table, rules in listing.items():
            found = [rule for rule in rules if not _LEFT_OUT.search(rule)]
            if tool.startswith("ip6"):
                found = [rule for rule in found if not re.search(r"\d\.\d", rule)]
            names = {name for rule in found for name in re.findall(r"DOCKER[-\w]*|theirs", rule)}
            text += [f"*{table}", *(f"-N {name}" for name in sorted(names - chains(host, tool, table))), *found]
            text += [f"-P FORWARD {policy}"] * (table == "filter" and policy != "") + ["COMMIT"]
        host.run(f"{tool}-restore", "--noflush", input="\n".join(text) + "\n")


def chains(host: Namespace, tool: str, table: str) -> set[str]:
    return {line.split()[1] for line in host.run(tool, "-t", table, "-S").stdout.splitlines() if line[:2] == "-N"}


def listed(host: Namespace, variant: str) -> list[str]:
    """Return the rules, chains and policies of all tables that have any."""
    texts = (host.run(f"{tool}-{variant}-save").stdout for tool in DOCKERS)
    found = [line.partition(" [")[0] for text in texts for line in text.splitlines() if line[:1] in "*:-"]
    return [line for line in found if line[0] == "-" or " - " in f"{line} " or line == ":FORWARD DROP"]


@pytest.mark.parametrize("family", DOCKERS)
def test_dockerds_rules_are_removed_and_no_others(gangway: Gangway, variant: str, family: str) -> None:
    host, tool = gangway.host, f"{family}-{variant}"
    add(host, tool, OTHERS, policy="DROP")
    before = listed(host, variant)
    for release in DOCKERS[family]:
        add(host, tool, release, policy="DROP")
        assert len(listed(host, variant)) > len(before) + 10
        said = gangway("docker", "cleanup", "--forward-accept")
        assert listed(host, variant) == before
        assert "FORWARD keeps the policy DROP, for rules of others: -A FORWARD" in said
    assert "nothing was removed" in gangway("docker", "cleanup")


def test_the_operators_rules_stay_and_are_named(gangway: Gangway, variant: str) -> None:
    host = gangway.host
    for tool, address in (("iptables", "203.0.113.0/24"), ("ip6tables", "2001:db8::/32")):
        add(host, f"{tool}-{variant}", DOCKERS[tool][-1], {"filter": (_OPERATORS.format(address),)}, policy="DROP")
    said = gangway("docker", "cleanup")
    left = [":DOCKER-USER -", ":FORWARD DROP", "-A FORWARD -j DOCKER-USER"]
    rules = [_OPERATORS.format(address) for address in ("203.0.113.0/24", "2001:db8::/32")]
    assert sorted(listed(host, variant)) == sorted([*left, *left, *rules])
    for rule in rules:
        assert f"kept DOCKER-USER, which rules of others use: {rule}" in said
    done = gangway.run("docker", "check").stdout
    assert "kept DOCKER-USER" in done
    for tool in DOCKERS:
        host.run(f"{tool}-{variant}", "-F", "DOCKER-USER")
    said = gangway("docker", "cleanup", "--forward-accept")
    assert said.count("the policy of FORWARD was set to ACCEPT") == 2
    assert listed(host, variant) == []


def test_a_table_that_changes_meanwhile_is_left_as_it_was(settings: Path, tmp_path: Path) -> None:
    """Just before the rules are removed, the operator adds one to DOCKER-USER."""
    wrapper = tmp_path / "iptables-restore"
    wrapper.write_text(
        "#!/bin/sh\niptables -I DOCKER-USER -s 203.0.113.9/32 -j DROP\nexec /usr/sbin/iptables-restore $*\n"
    )
    wrapper.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    with Namespace("host") as host:
        add(host, "iptables", RELEASE_28)
        host.run("nft", "add table ip6 docker-bridges; add chain ip6 docker-bridges nat-output")
        before = [rule for rule in listed(host, "nft") if rule in RELEASE_28["filter"]]
        with (
            Gangway(host, "--config", str(settings), environment={"PATH": path}) as gangway,
            pytest.raises(CommandFailed, match=r"DOCKER-USER \(iptables raw: removed .* nat: removed chain DOCKER "),
        ):
            gangway("docker", "cleanup")
        after = listed(host, "nft")
        assert [rule for rule in after if rule in RELEASE_28["filter"]] == before
        assert "-A DOCKER-USER -s 203.0.113.9/32 -j DROP" in after
        assert "docker-bridges" not in host.run("nft", "list", "tables").stdout  # what can be removed is


@pytest.mark.parametrize("prefix", ["GANGWAY", "DOCKER"])
def test_gangways_own_rules_stay(settings: Path, prefix: str) -> None:
    """On a bridge that is called docker0, some of them are the same as dockerd's."""
    flags = ("--config", str(settings), "--firewall", "iptables", "--chain-prefix", prefix)
    with Namespace("host") as host, Namespace("box") as box, Gangway(host, *flags) as gangway:
        gangway("network", "create", "web", "--subnet", "172.17.0.0/16", "--bridge", "docker0")
        gangway("attach", "--network", "web", box.path)
        gangway("publish", box.path, "-p", "8000:80")
        own = listed(host, "nft")
        assert "-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE" in own
        if prefix == "DOCKER":
            with pytest.raises(
                CommandFailed, match=r"look like dockerd's \(chain-prefix DOCKER\): nothing was removed"
            ):
                gangway("docker", "cleanup")
            assert "not told apart" in gangway.run("docker", "check").stdout
        else:
            add(host, "iptables", RELEASE_28)
            assert listed(host, "nft") != own
            gangway("docker", "cleanup")
        # Of two rules that are the same, the first one was deleted; gangway puts its own where it was.
        wait_until(lambda: listed(host, "nft") == own, "gangway's rules as they were")


def test_tables_of_dockerds_nftables_backend_are_removed(gangway: Gangway) -> None:
    host = gangway.host
    for family in ("ip", "ip6"):
        text = f"table {family} docker-bridges {{ chain nat-out {{ type nat hook output priority 0; }}; }}"
        host.run("nft", "-f", "-", input=text)
    host.run("nft", "add table ip docker-overlay; add chain ip docker-overlay enc-in")
    host.run("nft", "add", "table", "ip", "docker-bridges-of-mine")
    assert "tables ip docker-bridges, ip6 docker-bridges, ip docker-overlay" in gangway.run("docker", "check").stdout
    said = gangway("docker", "cleanup")
    assert "nftables: removed the table ip6 docker-bridges" in said
    assert host.run("nft", "list", "tables").stdout == "table ip docker-bridges-of-mine\n"


def test_settings_of_a_dockerd_that_does_not_run_are_edited(gangway: Gangway, tmp_path: Path) -> None:
    file = tmp_path / "daemon.json"
    words = ("--config-file", os.path.relpath(file))
    said = gangway("docker", "enable", *words)
    assert f"{file}: iptables, ip6tables, userland-proxy set to false" in said
    assert "start dockerd" in said
    assert [row["holds"] for row in gangway_rows(gangway, *words) if row["check"].startswith("daemon.json")] == [
        True
    ] * 4
    assert f"{file}: iptables, ip6tables, userland-proxy restored" in gangway("docker", "disable", *words)
    assert not list(tmp_path.iterdir())
    file.write_text("{\n  iptables: false\n}\n")
    done = gangway.run("docker", "check", *words)
    assert done.returncode == 1
    assert f"{file}: line 2, column 3: " in done.stdout
    for command in ("enable", "disable"):
        assert gangway.run("docker", command, *words).returncode == 1
    assert file.read_text() == "{\n  iptables: false\n}\n"


def gangway_rows(gangway: Gangway, *words: str) -> list[dict[str, Any]]:
    """Return what `docker check --json` prints."""
    done = gangway.run("docker", "check", *words, "--json")
    assert done.returncode == 1
    rows: list[dict[str, Any]] = json.loads(done.stdout)[0]["checks"]
    return rows
