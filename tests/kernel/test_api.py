"""The daemon's HTTP API: every operation, and that it matches its OpenAPI document."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

from gangway import __version__
from lab.gangwayd import Gangway
from lab.netns import Namespace
from lab.waiting import wait_until

pytestmark = pytest.mark.any_kernel


class Api:
    """An independent client: curl."""

    def __init__(self, gangway: Gangway, box: Namespace) -> None:
        self.gangway = gangway
        self.box = box
        self.document = self.ask("GET", "/openapi.json")[1]

    def ask(self, method: str, path: str, body: object = None) -> tuple[int, Any]:
        """Send a request; return the status and the answer."""
        words = ["curl", "-sS", "--unix-socket", str(self.gangway.socket), "-X", method, f"http://localhost{path}"]
        words += ["-w", "\n%{http_code}", *(() if body is None else ("-d", json.dumps(body)))]
        answer, _, status = self.gangway.host.run(*words).stdout.rpartition("\n")
        return int(status), json.loads(answer)

    def first_event(self) -> tuple[bytes, Any]:
        """Return the head of the answer that follows events, and the first of them."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            sock.connect(str(self.gangway.socket))
            sock.sendall(b"GET /events HTTP/1.0\r\nHost: gangway\r\n\r\n")
            received = b""
            while received.count(b"\n\n") == 0:
                received += sock.recv(65536)
        head, _, body = received.partition(b"\r\n\r\n")
        return head, json.loads(body.partition(b"\n\n")[0].removeprefix(b"data: "))

    def check(self, path: str, method: str, answer: object, status: str = "200") -> None:
        """Check that the answer matches the document's schema."""
        ((_, content),) = self.document["paths"][path][method]["responses"][status]["content"].items()
        described = content["schema"]
        schema = {**described, "components": self.document["components"]}
        Draft202012Validator(schema).validate(answer)


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    with Namespace("host") as host, Namespace("box") as box, Gangway(host) as gangway:
        yield Api(gangway, box)


def test_the_document_is_valid(api: Api) -> None:
    validate(api.document)
    assert api.document["info"]["version"] == __version__
    assert api.ask("GET", "/version") == (200, {"version": __version__, "relay_version": ""})


def test_events_are_streamed_as_documented(api: Api) -> None:
    head, started = api.first_event()
    assert b"200 OK" in head
    assert b"Content-Type: text/event-stream" in head
    api.check("/events", "get", started)
    assert (started["event"], started["version"]) == ("started", __version__)
    assert api.gangway.daemon is not None
    assert started["pid"] == api.gangway.daemon.pid


def test_health_names_the_reasons(tmp_path: Path) -> None:
    config = tmp_path / "gangway.toml"
    config.write_text(f'[docker]\nenabled = true\nsocket = "{tmp_path}/docker.sock"\n')
    with Namespace("host") as host, Gangway(host, "--config", str(config)) as gangway:
        api = Api(gangway, host)
        wait_until(lambda: api.ask("GET", "/health")[0] == 503, "the daemon to see that there is no dockerd")
        status, answer = api.ask("GET", "/health")
        api.check("/health", "get", answer, str(status))
        assert answer["is_healthy"] is False
        assert [f"{tmp_path}/docker.sock" in reason for reason in answer["reasons"]] == [True]


def test_every_operation_answers_as_documented(api: Api, tmp_path: Path) -> None:
    network = {"name": "web", "subnets": ["172.30.0.0/24", "fd30::/64"]}
    steps: list[tuple[str, str, str, object]] = [
        ("POST", "/networks", "/networks", network),
        ("GET", "/networks", "/networks", None),
        ("GET", "/networks/{name}", "/networks/web", None),
        ("POST", "/endpoints", "/endpoints", {"container": api.box.path, "network": "web"}),
        ("POST", "/networks", "/networks", {"name": "back"}),
        ("POST", "/endpoints", "/endpoints", {"container": api.box.path, "network": "back"}),
        ("GET", "/endpoints", "/endpoints", None),
        ("DELETE", "/endpoints/{container}", f"/endpoints/{api.box.path.replace('/', '%2F')}?network=back", None),
        ("DELETE", "/networks/{name}", "/networks/back", None),
        (
            "POST",
            "/mappings",
            "/mappings",
            {"container": api.box.path, "ports": ["8000:80", "9000-9010:9000-9010/udp"]},
        ),
        ("GET", "/mappings", "/mappings", None),
        ("GET", "/explain", "/explain?at=127.0.0.1:8000&from=loopback", None),
        ("GET", "/doctor", "/doctor", None),
        ("POST", "/apply", "/apply", {"name": "app.toml", "text": '[[network]]\nname = "app"\n'}),
        ("POST", "/apply", "/apply", {"name": "app.toml", "text": ""}),
        ("POST", "/mappings/withdraw", "/mappings/withdraw", {"container": api.box.path, "ports": ["8000:80"]}),
        ("DELETE", "/endpoints/{container}", f"/endpoints/{api.box.path.replace('/', '%2F')}", None),
        ("DELETE", "/networks/{name}", "/networks/web", None),
        ("POST", "/cleanup", "/cleanup", None),
        ("GET", "/docker", f"/docker?config_file={tmp_path}/daemon.json", None),
        ("POST", "/docker/enable", "/docker/enable", {"config_file": f"{tmp_path}/daemon.json"}),
        ("POST", "/docker/disable", "/docker/disable", {"config_file": f"{tmp_path}/daemon.json"}),
        ("POST", "/docker/cleanup", "/docker/cleanup", {}),
        ("GET", "/status", "/status", None),
        ("GET", "/config", "/config", None),
        ("GET", "/version", "/version", None),
        ("GET", "/health", "/health", None),
        ("POST", "/reload", "/reload", None),
        ("GET", "/down", "/down", None),
        ("POST", "/stop", "/stop", None),
        ("POST", "/down", "/down", None),
    ]
    for method, described, path, body in steps:
        status, answer = api.ask(method, path, body)
        assert status == 200, answer
        api.check(described, method.lower(), answer)
        if method == "POST" and path in ("/stop", "/down"):
            assert api.gangway.daemon is not None
            assert api.gangway.daemon.wait(20) == 0
            api.gangway.start()
    assert {(described, method.lower()) for method, described, *_ in steps} == {
        (path, method) for path, methods in api.document["paths"].items() for method in methods if path != "/events"
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind", "message"),
    [
        ("POST", "/networks", {"subnets": []}, 400, "InvalidRequest", "name"),
        ("POST", "/networks", {"name": "web", "subnets": ["10.0.0.0/24"], "more": 1}, 400, "InvalidRequest", "more"),
        ("POST", "/networks", {"name": "web", "subnets": ["10.0.0.1/24"]}, 400, "InvalidRequest", "10.0.0.1/24"),
        ("GET", "/networks/nosuch", None, 409, "Conflict", "nosuch"),
        ("POST", "/mappings", {"container": "nosuch", "ports": ["80"]}, 409, "Conflict", "nosuch"),
        ("GET", "/docker?config_file=daemon.json", None, 400, "InvalidRequest", "absolute"),
        ("POST", "/docker/disable", {"config_file": "/no/such"}, 409, "Conflict", "/no/such"),
        ("GET", "/explain?at=80", None, 400, "InvalidRequest", "HOST-IP:PORT"),
        ("GET", "/explain?at=127.0.0.1:80&from=mars", None, 400, "InvalidRequest", "mars"),
        # What would be left out changes what is asked: without a network, all of them are left.
        ("DELETE", "/endpoints/box?net=web", None, 400, "InvalidRequest", "unknown query parameter 'net'"),
        ("DELETE", "/endpoints/box?network=", None, 400, "InvalidRequest", "network: give one value"),
        ("DELETE", "/endpoints/box?network=a&network=b", None, 400, "InvalidRequest", "network: give one value"),
        ("GET", "/networks?name=web", None, 400, "InvalidRequest", "there is none"),
    ],
)
def test_an_error_names_its_cause(
    api: Api, method: str, path: str, body: object, status: int, kind: str, message: str
) -> None:
    found, answer = api.ask(method, path, body)
    assert (found, answer["kind"]) == (status, kind)
    assert message in answer["error"]
    described = path.partition("?")[0]
    for prefix, parameter in (("/networks/", "{name}"), ("/endpoints/", "{container}")):
        if described.startswith(prefix):
            described = prefix + parameter
    api.check(described, method.lower(), answer, str(status))
