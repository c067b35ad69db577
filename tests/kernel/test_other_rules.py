"""Other programs' rules: gangway works beside them, explains their effects, and repairs its own."""

import re
import socket

import pytest

from lab import echo_server
from lab.waiting import wait_until
from tests.kernel.crossings import everywhere, reached
from tests.kernel.snapshot import snapshot
from tests.kernel.street import HOST4, HOST6, NEIGHBOUR4, NEIGHBOUR6, PORT, Street

pytestmark = pytest.mark.any_kernel

_SOON_S = 5
_EMPTY = re.compile(r"\s*(table|chain|type|\})")
_UFW = """*filter
:INPUT DROP [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:ufw-before-input - [0:0]
:ufw-before-forward - [0:0]
:ufw-user-input - [0:0]
-A INPUT -j ufw-before-input
-A INPUT -j ufw-user-input
-A FORWARD -j ufw-before-forward
-A ufw-before-input -i lo -j ACCEPT
-A ufw-before-input -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-input -p ICMP -j ACCEPT
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
"""
_UFW_OF = {"iptables": _UFW.replace("ICMP", "icmp"), "ip6tables": _UFW.replace("ICMP", "ipv6-icmp")}
_FIREWALLD = """nft -f - <<'END'
table inet firewalld {
    chain filter_INPUT {
        type filter hook input priority filter + 10; policy accept;
    }
    chain filter_FORWARD {
        type filter hook forward priority filter + 10; policy drop;
        ct state established,related accept
        iifname "lo" accept
    }
}
END
"""


def _nat_works(street: Street) -> None:
    with street.published(street.server, "8080:80") as port:
        assert street.road(street.neighbour, "tcp", HOST4, port) == ("nat", NEIGHBOUR4)
        assert street.road(street.neighbour, "tcp", HOST6, port) == ("nat", NEIGHBOUR6)
        assert street.road(street.far.space, "tcp", HOST4, port) == ("nat", street.far.address4)
        assert street.road(street.near.space, "tcp", HOST4, port) == ("nat", "172.30.0.1")
        assert street.road(street.server.space, "tcp", HOST4, port) == ("nat", "172.30.0.1")
        assert street.road(street.host, "tcp", HOST4, port) == ("nat", HOST4)
        assert street.road(street.host, "tcp", "127.0.0.1", port) == ("redirect", "172.30.0.1")
        assert street.road(street.host, "tcp", "::1", port) == ("redirect", "fd30::1")


def _leaves_no_rules(street: Street) -> None:
    """Assert that our rules are removed with our last network."""
    street.leave()
    rules = (street.host.run(*words).stdout for words in (["nft", "list", "ruleset"], ["iptables-save"]))
    text = "".join(rules).lower()
    assert "gangway" not in text
    assert "gw-" not in text


def _explained(street: Street) -> tuple[str, str, str]:
    """Return what `explain` says of a remote client: the firewall, the road, and the whole text."""
    with street.published(street.server, "8099:80"):
        answer = street.gangway.json("explain", f"{HOST4}:8099", "--from", "remote")[0]
        text = street.gangway("explain", f"{HOST4}:8099", "--from", "remote")
    return answer["firewall"], answer["mapping"]["routes"][0]["road"], text


def test_with_ufw_published_ports_work_and_others_stay_closed() -> None:
    prepare = "".join(f"{program}-restore <<'END'\n{rules}END\n" for program, rules in _UFW_OF.items())
    with Street(prepare=prepare) as street:
        assert _explained(street)[:2] == ("iptables", "nat")
        _nat_works(street)
        with street.published(street.server, "80:80"):
            direct = everywhere([street.neighbour, street.far.space], [street.server.address4], PORT, ["tcp"])
            assert reached(street, direct) == []
        _leaves_no_rules(street)
        for program, rules in _UFW_OF.items():
            left = street.host.run(f"{program}-save").stdout
            for line in rules.splitlines():
                assert line.partition(" [")[0] in left


def test_relay_serves_beside_a_firewalld_that_drops() -> None:
    with Street(prepare=_FIREWALLD) as street:
        before = street.host.run("nft", "list", "table", "inet", "firewalld").stdout
        firewall, road, text = _explained(street)
        assert (firewall, road) == ("nftables", "relay")
        assert "inet firewalld filter_FORWARD" in text
        with street.published(street.server, "8080:80/tcp", "8080:80/udp") as port:
            for protocol in ("tcp", "udp"):
                assert street.road(street.neighbour, protocol, HOST4, port) == ("relay", "172.30.0.1")
                assert street.road(street.neighbour, protocol, HOST6, port) == ("relay", "fd30::1")
                assert street.road(street.far.space, protocol, HOST4, port) == ("relay", "172.30.0.1")
                assert street.road(street.host, protocol, HOST4, port) == ("nat", HOST4)
        _leaves_no_rules(street)
        assert street.host.run("nft", "list", "table", "inet", "firewalld").stdout == before


def test_a_chain_that_drops_is_added_and_removed() -> None:
    with Street() as street, street.published(street.server, "8080:80") as port:
        assert street.road(street.neighbour, "tcp", HOST4, port)[0] == "nat"
        street.host.run("sh", "-ec", _FIREWALLD)
        _is_served_by(street, port, "relay")
        said = "inet firewalld filter_FORWARD drops"
        wait_until(lambda: said in street.gangway.log.read_text(), "the line in the log")
        street.host.run("nft", "delete", "table", "inet", "firewalld")
        _is_served_by(street, port, "nat")


def test_nftables_is_used_again_when_nobody_decides_in_forward_any_more() -> None:
    """Without another program's policy or rule there; an established connection goes on all the while."""
    with Street() as street, street.published(street.server, "8080:80") as port:
        connect = (HOST4, port)
        with street.neighbour.entered(), socket.create_connection(connect, 5) as client:
            street.host.run("iptables", "-P", "FORWARD", "DROP")
            _is_written_by(street, "iptables")
            street.host.run("iptables", "-P", "FORWARD", "ACCEPT")
            _is_written_by(street, "nftables")
            assert street.host.run("iptables", "-S", "FORWARD").stdout == "-P FORWARD ACCEPT\n"
            _is_served_by(street, port, "nat")
            rule = "FORWARD", "-s", "192.0.2.1", "-j", "ACCEPT"
            street.host.run("ip6tables", "-A", *(word.replace("192.0.2.1", "2001:db8::1") for word in rule))
            _is_written_by(street, "iptables")
            street.host.run("iptables", "-A", *rule)
            street.host.run("ip6tables", "-D", *(word.replace("192.0.2.1", "2001:db8::1") for word in rule))
            street.gangway("network", "create", "more", "--subnet", "172.28.0.0/24")
            assert _firewall(street) == "iptables"
            street.host.run("iptables", "-D", *rule)
            _is_written_by(street, "nftables")
            assert echo_server.request_over(client).peer == NEIGHBOUR4
        _is_served_by(street, port, "nat")


def _firewall(street: Street) -> str:
    (found,) = (one["check"] for one in street.gangway.json("doctor") if one["note"] == "in use")
    return str(found).removeprefix("firewall: ")


def _is_written_by(street: Street, firewall: str) -> None:
    wait_until(lambda: _firewall(street) == firewall, f"rules of {firewall}", _SOON_S)


def _is_served_by(street: Street, port: int, road: str) -> None:
    def is_so() -> bool:
        client = street.neighbour
        is_reached = street.reaches(client, "tcp", HOST4, port)
        return is_reached and street.road(client, "tcp", HOST4, port)[0] == road

    wait_until(is_so, f"the road {road}", _SOON_S)


@pytest.mark.parametrize(
    "destroy",
    [
        "nft flush ruleset",
        "iptables -F; ip6tables -F; iptables -t nat -F; ip6tables -t nat -F",
        "iptables -t nat -D POSTROUTING 1 2>/dev/null || nft flush chain inet gangway postrouting",
        "iptables -D FORWARD 1 2>/dev/null || nft flush chain inet gangway forward",
        "nft delete table inet gangway 2>/dev/null || iptables -t mangle -F",
    ],
    ids=["everything", "tables", "masquerade", "forward", "ours"],
)
def test_removed_rules_are_restored(street: Street, destroy: str) -> None:
    with street.published(street.server, "8080:80", "9000-9002:9000-9002", f"{HOST4}:8081:80"):
        before = _rules(street)
        street.host.run("sh", "-c", destroy)
        wait_until(lambda: _rules(street) == before, "the rules as they were", _SOON_S)
    _nat_works(street)


def _rules(street: Street) -> list[str]:
    """Return the words of all rules, elements and dropping chains: sets have no order, and empty chains no effect."""
    lines = [line for line in snapshot(street.host)["nftables"] if "drop" in line or not _EMPTY.match(line)]
    return sorted(word for line in lines for word in line.replace(",", " ").split())


@pytest.mark.parametrize("firewall", ["nftables", "iptables"])
def test_a_mapping_whose_rules_were_removed_is_unpublished_or_restored(firewall: str) -> None:
    with Street("--firewall", firewall) as street:
        with street.published(street.server, "8080:80"):
            _remove_mappings(street)
        with street.published(street.server, "8080:80"):
            before = _rules(street)
            _remove_mappings(street)
            wait_until(lambda: _rules(street) == before, "the rules as they were", _SOON_S)


def _remove_mappings(street: Street) -> None:
    if "inet gangway" in street.host.run("nft", "list", "tables").stdout:
        street.host.run("nft", "flush map inet gangway ports4; flush map inet gangway ports6")
    else:
        street.host.run("sh", "-c", "iptables -t nat -F GANGWAY; iptables -F GANGWAY; ip6tables -t nat -F GANGWAY")


def test_a_deleted_bridge_is_restored_with_its_containers(street: Street) -> None:
    street.host.ip("link", "delete", _bridge(street))
    _is_whole(street)


def test_a_deleted_container_interface_is_restored(street: Street) -> None:
    street.server.space.ip("link", "delete", "eth0")
    _is_whole(street)


def test_deleted_host_interfaces_are_restored(street: Street) -> None:
    for line in street.host.ip("-oneline", "link", "show", "master", _bridge(street)).splitlines():
        street.host.ip("link", "delete", line.split()[1].partition("@")[0])
    _is_whole(street)


def _bridge(street: Street) -> str:
    found = street.gangway.json("network", "inspect", "web")[0]["bridge"]
    assert isinstance(found, str)
    return found


def _is_whole(street: Street) -> None:
    inside = everywhere([street.near.space, street.host], [street.server.address4, street.server.address6], PORT)
    wait_until(lambda: reached(street, inside) == list(map(str, inside)), "the server", _SOON_S)
    _nat_works(street)


def test_everything_is_removed_after_a_flush(street: Street) -> None:
    """This has to be the last test with this fixture."""
    street.publish(street.server, "8080:80")
    street.host.run("nft", "flush", "ruleset")
    _leaves_no_rules(street)
    assert street.host.sysctl("net.ipv4.ip_forward") == "0"
    assert street.host.sysctl("net.ipv6.conf.all.forwarding") == "0"
