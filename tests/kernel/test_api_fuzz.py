"""The HTTP API under arbitrary requests: each is answered as documented, not by a 500, and leaves nothing."""

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from requests.adapters import HTTPAdapter
from schemathesis import checks
from urllib3.connection import HTTPConnection
from urllib3.connectionpool import HTTPConnectionPool

from lab.gangwayd import Gangway
from lab.netns import Namespace

pytestmark = pytest.mark.any_kernel

_BASE = "http://gangway"
schemathesis.checks.load_all_checks()
_CHECKS: Any = [
    checks.not_a_server_error,
    *map(
        checks.CHECKS.get_one,
        ("content_type_conformance", "response_schema_conformance", "status_code_conformance", "unsupported_method"),
    ),
]
_QUICK = settings(
    deadline=None,
    derandomize=True,
    max_examples=30,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


class _UnixAdapter(HTTPAdapter):
    """Sends requests to a unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def get_connection_with_tls_context(self, *_: Any, **__: Any) -> HTTPConnectionPool:
        path = self._path

        class Connection(HTTPConnection):
            def connect(self) -> None:
                self.sock = socket.socket(socket.AF_UNIX)
                self.sock.settimeout(20)
                self.sock.connect(path)

        pool = HTTPConnectionPool("gangway")
        pool.ConnectionCls = Connection
        return pool


class Api:
    """A daemon, and a client of its API."""

    def __init__(self, gangway: Gangway) -> None:
        self.gangway = gangway
        self.session = requests.Session()
        self.session.mount(_BASE, _UnixAdapter(str(gangway.socket)))

    def ask(self, method: str, target: str, body: Any = None, data: bytes | None = None) -> tuple[int, Any]:
        """Send a request; return the status and the answer, which has to be JSON."""
        answer = self.session.request(method, _BASE + target, json=body, data=data, timeout=20)
        assert answer.headers["Content-Type"] == "application/json"
        return answer.status_code, answer.json()

    def raw(self, request: bytes) -> bytes:
        """Send bytes, and return the answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(20)
            sock.connect(str(self.gangway.socket))
            sock.sendall(request)
            return b"".join(iter(lambda: sock.recv(65536), b""))


@pytest.fixture(scope="module")
def api() -> Iterator[Api]:
    """A daemon that has a network; whatever is requested, it logs no traceback, and its state is as before."""
    with Namespace("host") as host, Gangway(host) as gangway:
        gangway("network", "create", "web", "--subnet", "172.30.0.0/24")
        before = _links(host)
        yield Api(gangway)
        assert [network["name"] for network in gangway.json("network", "ls")] == ["web"]
        assert _links(host) == before
        assert "Traceback" not in gangway.log.read_text()


def _links(host: Namespace) -> set[str]:
    return {line.split()[1] for line in host.ip("-o", "link").splitlines()}


def test_every_operation_withstands_generated_requests(api: Api) -> None:
    """Requests are generated from the OpenAPI document, valid ones and invalid ones.

    Those that would change the machine's own dockerd, or end the daemon, are left out, and so is the endless one.
    """
    schema = schemathesis.openapi.from_dict(api.ask("GET", "/openapi.json")[1])
    schema.config.update(base_url=_BASE)
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) >= 12
    for operation in (one for one in operations if not one.path.startswith(("/docker/", "/stop", "/down", "/events"))):
        modes = list(schemathesis.GenerationMode)  # valid and invalid; any text is a valid parameter of path or query
        for mode in modes if operation.body else modes[:1]:

            @settings(_QUICK, max_examples=12)
            @given(case=operation.as_strategy(generation_mode=mode))
            def withstands(case: Any) -> None:
                case.call_and_validate(session=api.session, checks=_CHECKS, timeout=20)

            withstands()


_TEXT = st.one_of(
    st.text(max_size=40),
    st.text("0123456789.:/-[]%", max_size=30),
    st.sampled_from(
        ["\0", "web\0", "9" * 5000, "x" * 100_000, "../../etc", "pid:" + "9" * 5000, "pid:²", "::ffff:0.0.0.0"]
    ),
)


@_QUICK
@given(name=_TEXT, subnet=_TEXT, bridge=_TEXT, mtu=st.one_of(st.integers(), st.just(10**4000)))
def test_networks_with_arbitrary_values_are_refused(api: Api, name: str, subnet: str, bridge: str, mtu: int) -> None:
    status, answer = api.ask("POST", "/networks", {"name": name, "subnets": [subnet], "bridge": bridge, "mtu": mtu})
    assert 400 <= status < 500, answer


@_QUICK
@given(container=_TEXT, namespace=_TEXT, address=_TEXT)
def test_attaching_arbitrary_names_is_refused(api: Api, container: str, namespace: str, address: str) -> None:
    body = {"container": container, "network": "web", "namespace": namespace, "addresses": [address]}
    status, answer = api.ask("POST", "/endpoints", body)
    assert 400 <= status < 500, answer
    assert len(answer["error"]) < 1100


@_QUICK
@given(text=_TEXT, host=st.sampled_from(["", "127.0.0.1:", "224.0.0.1:", "[0.0.0.0]:"]))
def test_arbitrary_ports_and_addresses_are_refused(api: Api, text: str, host: str) -> None:
    for method, target, body in (
        ("POST", "/mappings", {"container": text, "ports": [f"{host}{text}"]}),
        ("POST", "/mappings/withdraw", {"container": "web", "ports": [f"{host}{text}:80"]}),
        ("GET", f"/explain?at={quote(host + text, safe='')}"[:8000], None),
        ("GET", f"/networks/{quote(text, safe='')}"[:8000], None),
        ("DELETE", f"/endpoints/{quote(text, safe='')}"[:8000], None),
    ):
        status, answer = api.ask(method, target, body)
        if target != "/networks/":
            assert status == 200 or 400 <= status < 500, (method, target, answer)


@pytest.mark.parametrize(
    ("method", "target", "data", "status", "message"),
    [
        ("GET", "/no/such", None, 404, "GET /no/such: Not Found"),
        ("PUT", "/networks", b"{}", 405, "PUT /networks: Method Not Allowed"),
        ("POST", "/networks", b'"' + b"x" * (1 << 21) + b'"', 413, "Request Entity Too Large"),
        ("POST", "/networks", b"{", 400, "truncated"),
        ("POST", "/networks", b"\xff\xfe", 400, "malformed"),
        ("POST", "/networks", b'{"name": "\\ud800", "subnets": ["10.0.0.0/24"]}', 400, ""),
        ("POST", "/networks", b'{"name": "' + b"x" * 100_000 + b'", "subnets": ["10.9.0.0/24"]}', 400, "at most 128"),
    ],
    ids=["unknown path", "method", "over 1 MB", "cut", "no text", "surrogate", "long name"],
)
def test_what_the_server_refuses_is_answered_as_documented(
    api: Api, method: str, target: str, data: bytes | None, status: int, message: str
) -> None:
    found, answer = api.ask(method, target, data=data)
    assert (found, answer["kind"]) == (status, "InvalidRequest")
    assert message in answer["error"]


@pytest.mark.parametrize("path", ["/networks", "/no/such"])
def test_unknown_expectation_is_answered_as_documented(api: Api, path: str) -> None:
    answer = api.raw(f"GET {path} HTTP/1.1\r\nHost: gangway\r\nExpect: tea\r\nConnection: close\r\n\r\n".encode())
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == b"417"
    assert body.startswith(b'{"kind":"InvalidRequest","error":"')


@pytest.mark.parametrize(
    "request_line",
    [b"GET /\0 HTTP/1.1", b"NONSENSE", b"GET /" + b"x" * 20_000 + b" HTTP/1.1"],
    ids=["NUL", "no", "long"],
)
def test_invalid_http_is_answered_as_documented(api: Api, request_line: bytes) -> None:
    head, _, body = api.raw(request_line + b"\r\nHost: gangway\r\n\r\n").partition(b"\r\n\r\n")
    assert head.split()[1] == b"400"
    assert b"application/json" in head
    assert body.startswith(b'{"kind":"InvalidRequest","error":"')
