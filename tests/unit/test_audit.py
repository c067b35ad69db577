"""What the log says about requests: who asked for what."""

import os
import socket
from pathlib import Path

import msgspec

from gangway.daemon import audit
from gangway.daemon.audit import NOBODY, Client, client_of
from gangway.daemon.config import Config, Docker
from gangway.daemon.messages import ApplyAnswer, EndpointAnswer, ErrorAnswer, MappingAnswer, NetworkAnswer
from gangway.daemon.operations import OPERATIONS
from tests.unit.samples import WEB, endpoint, held, lease, mapping, planned

ASKED = Client(812, 1000, "gangway")


def test_the_client_is_the_process_that_has_connected() -> None:
    sock, other = socket.socketpair()
    with sock, other:
        assert client_of(sock) == (os.getpid(), os.geteuid(), Path("/proc/self/comm").read_text().strip())
    assert str(ASKED) == "gangway (pid 812, uid 1000)"
    assert str(NOBODY) == "a process (pid 0, uid -1)"


def test_published_ports_are_named_with_who_asked() -> None:
    answers = [MappingAnswer.of(planned(mapping("0.0.0.0", f"{8000 + number}"))) for number in range(10)]
    made = audit.carried_out(audit.published({"container": "box"}, answers[:1]), ASKED)
    ports = f"0.0.0.0:8000 -> {answers[0].container_address}:{answers[0].container_ports}/tcp"
    assert made.text == f"published {ports} of container box, by gangway (pid 812, uid 1000)"
    assert made.name == "published"
    assert made.fields == {"container": "box", "ports": ports, "pid": 812, "uid": 1000, "command": "gangway"}
    many = audit.unpublished({"container": "box"}, answers)
    assert (many.name, many.text.endswith(" and 2 more of container box")) == ("unpublished", True)
    assert audit.unpublished({"container": "box"}, []).text == "unpublished no ports of container box"
    assert audit.unpublished({"container": ""}, answers[:1]).text == f"unpublished {ports} of all containers"


def test_networks_and_containers() -> None:
    network = audit.network_created({}, NetworkAnswer.of(WEB, ()))
    assert (network.name, network.fields["network"]) == ("network-created", WEB.name)
    assert network.text.startswith(f"network {WEB.name} created: bridge {WEB.bridge}, ")
    made = audit.attached({}, EndpointAnswer.of(endpoint()))
    assert made.name == "attached"
    assert made.text.startswith(f"container {endpoint().container} attached to network {endpoint().network}: ")
    assert audit.detached({"container": "box"}, None).text == "container box detached"
    left = audit.detached({"container": "box", "network": "web"}, None)
    assert left.text == "container box detached from network web"
    assert left.fields == {"container": "box", "network": "web"}
    assert audit.network_removed({"name": "web"}, None).text == "network web removed"


def test_a_lease_names_the_containers_address() -> None:
    mapped = lease("0.0.0.0")
    granted = audit.lease_granted(mapped, Client(99, 0, "gangway-docker-"))
    assert granted.fields["container_address"] == mapped.container
    assert granted.text.startswith("lease granted: ")
    assert granted.text.endswith(", by gangway-docker- (pid 99, uid 0)")
    assert audit.lease_ended(mapped).name == "lease-ended"


def test_ports_of_dockers_containers() -> None:
    made = audit.adopted("published", "docker:web", [planned(held("0.0.0.0"))])
    assert made.text.startswith("published 0.0.0.0:8000 -> ")
    assert made.text.endswith("/tcp of container docker:web, as Docker says")


def test_what_files_declare() -> None:
    published = audit.planned_ports("published", "box", [planned(held("0.0.0.0"))])
    made = audit.declared(published, {"b.toml", "a.toml"}, is_removed=False)
    assert (made.name, made.fields) == ("published", published.fields | {"file": "a.toml, b.toml"})
    assert made.text == f"{published.text}, declared in a.toml, b.toml"
    removed = audit.network_removed({"name": "web"}, None)
    assert audit.declared(removed, {"a.toml"}, is_removed=True).text.endswith(" removed, no longer declared in a.toml")
    unknown = audit.declared(removed, (), is_removed=True)
    assert (unknown.text, unknown.fields) == (f"{removed.text}, not declared in any file", removed.fields)


def test_a_refused_request() -> None:
    made = audit.refused("POST", "/mappings", 409, ErrorAnswer("PortInUse", "port 80 is in use"), ASKED)
    assert made.text == "POST /mappings refused: port 80 is in use (by gangway (pid 812, uid 1000))"
    assert (made.fields["status"], made.fields["kind"], made.fields["uid"]) == (409, "PortInUse", 1000)


def test_every_setting_is_said() -> None:
    made = audit.settings(Config(exclude=("eth1",), docker=Docker(enabled=True), relay={"workers": 3}))
    assert "firewall auto, ip-forward true, " in made.text
    assert "relay.workers 3" in made.text
    assert made.fields["docker_enabled"] == "true"
    assert made.fields["exclude"] == "eth1"
    names = {field.encode_name.replace("-", "_") for field in msgspec.structs.fields(Config)}
    assert names - {"relay", "docker"} <= made.fields.keys()
    assert "log_level" in made.fields


def test_every_change_has_an_event() -> None:
    """Those that change nothing of what is published have a common one."""
    described = {" ".join(operation.route) for operation in OPERATIONS if operation.describe is not None}
    assert {"POST /mappings", "POST /mappings/withdraw", "POST /networks", "DELETE /networks/{name}"} <= described
    assert {"POST /endpoints", "DELETE /endpoints/{container}", "POST /apply"} <= described
    assert not [pattern for pattern in described if pattern.startswith("GET")]
    assert audit.requested("POST /docker/enable").text == "POST /docker/enable carried out"


def test_what_was_applied() -> None:
    answer = ApplyAnswer([f"+ network net{number}: free subnets" for number in range(10)], [])
    made = audit.applied({"name": "web.toml", "dry_run": False}, answer)
    assert made.text.startswith("web.toml applied: + network net0: free subnets; ")
    assert made.text.endswith("net7: free subnets and 2 more")
    assert made.name == "applied"
    dry = audit.applied({"name": "web.toml", "dry_run": True}, ApplyAnswer([], []))
    assert (dry.name, dry.text) == ("compared", "web.toml compared: nothing to change")


def test_a_condition_is_said_as_the_answer_does_not_say_whether_it_held() -> None:
    removed = audit.network_removed({"name": "web", "if_exists": "true"}, None)
    assert removed.text == "network web removed, if it was there"
    published = audit.published({"container": "box", "if_not_exists": True}, [])
    assert published.text.endswith(", as far as it was not there")
