"""What files of conf.d may say, and how mistakes are reported: file, key and reason in one line."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.daemon.declaration import Document, PublishTable, document_text, merge, parse_document
from gangway.daemon.declared_files import DeclaredFiles, check_files, folder_for, read_files, written
from gangway.daemon.kept import names, with_ports, without_network, without_ports
from gangway.daemon.messages import NetworkRequest
from gangway.errors import InvalidRequest
from gangway.model import PortRequest, parse_port

WEB = """
[[network]]
name = "web"
subnets = ["172.30.0.0/24"]

[[publish]]
container = "box"
network = "web"
ports = ["8000:80", "80"]
from = ["10.0.0.0/8"]
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[[network]\n", "Expected ']]' at the end of an array declaration (at line 1, column 10)"),
        ("[[nets]]\n", "Object contains unknown field `nets`"),
        ("[[network]]\nsubnets = []", "Object missing required field `name` - at `$.network[0]`"),
        ('[[publish]]\ncontainer = "b"\nportz = 1', "Object contains unknown field `portz` - at `$.publish[0]`"),
        ('[[publish]]\ncontainer = "b"\nports = [80]', "Expected `str`, got `int` - at `$.publish[0].ports[0]`"),
        ('[[publish]]\ncontainer = "b"\nports = ["80x:80"]', "publish b: ports: invalid -p '80x:80': '80x' is not"),
        ('[[publish]]\ncontainer = "b"\nfrom = ["ten"]', "publish b: from: invalid subnet of clients 'ten'"),
        ('[[publish]]\ncontainer = "b"\naddresses = ["ten"]', "publish b: addresses: 'ten' is not an IP address"),
        ('[[publish]]\ncontainer = "a b"', "publish a b: invalid container 'a b'"),
        ('[[publish]]\ncontainer = "pid:x"', "publish pid:x: container: 'x' is not a process id"),
        ('[[publish]]\ncontainer = "docker:b"\nnetwork = "w"', "publish docker:b: network: Docker attaches this"),
        ('[[publish]]\ncontainer = "b"\nnetwork = 1', "Expected `str | array`, got `int` - at `$.publish[0].network`"),
        ('[[publish]]\ncontainer = "b"\nnetwork = ["w", "w"]', "publish b: network: w is named twice"),
        ('[[network]]\nname = "a b"', "network a b: invalid network name 'a b'"),
        ('[[network]]\nname = "w"\nsubnets = ["ten"]', "network w: invalid subnet 'ten'"),
        ('[[network]]\nname = "w"\ngateways = ["10.0.0.1"]', "network w: the gateway 10.0.0.1 needs a subnet"),
    ],
)
def test_a_mistake_is_one_line(text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        parse_document(text, "/etc/web.toml")
    assert str(refused.value).startswith(f"/etc/web.toml: {reason}")
    assert "\n" not in str(refused.value)


def test_files_say_together_what_is_declared() -> None:
    more = '[[publish]]\ncontainer = "box"\nnetwork = "web"\nports = ["8000:80/udp", "8000:80"]\n'
    files = {"a": parse_document(WEB, "a"), "b": parse_document(more, "b")}
    declared, problems = merge(files)
    assert problems == []
    ports = [(str(one.request), len(one.request.admitted), one.file) for one in declared.containers["box"].ports]
    assert ports == [("8000:80", 1, "a"), ("80", 1, "a"), ("8000:80/udp", 0, "b"), ("8000:80", 0, "b")]


def test_files_that_contradict_each_other() -> None:
    other = WEB.replace('network = "web"', 'network = "other"')
    declared, problems = merge({"a": parse_document(WEB, "a"), "b": parse_document(other, "b")})
    assert problems == [
        "b: network web: name: a declares this network already",
        "b: publish box: network: a declares this container otherwise",
    ]
    first, _ = merge({"a": parse_document(WEB, "a")})
    assert (declared.networks, declared.containers) == (first.networks, first.containers)
    assert declared.unknown_networks == {"web"}
    assert declared.unknown_containers == {"box"}


PORTS = st.one_of(
    st.sampled_from(("80", "127.0.0.1::80", "[::1]:8000:80/udp", "8000-8010:80", "8000-8010:80-90/sctp", "7-8:9-10")),
    st.builds("{}:{}".format, st.integers(1, 65535), st.integers(1, 65535)),
)
TABLES = st.builds(
    PublishTable,
    container=st.sampled_from(("box", 'q"\\', "/run/ä")),
    network=st.sampled_from(("", "web", ["web", "back"])),
    ports=st.lists(PORTS),
    admitted=st.sampled_from(([], ["10.0.0.0/8", "fd00::/8"])),
)
NETWORKS = st.builds(
    NetworkRequest,
    name=st.just("web"),
    subnets=st.just(["172.30.0.0/24"]),
    icc=st.booleans(),
    mtu=st.sampled_from((None, 1400)),
)


@given(PORTS)
def test_a_port_is_read_as_it_was_written(text: str) -> None:
    assert parse_port(str(parse_port(text))) == parse_port(text)


@given(st.builds(Document, st.lists(NETWORKS), st.lists(TABLES)))
def test_a_document_is_read_as_it_was_written(document: Document) -> None:
    assert parse_document(document_text(document), "file") == document


@given(
    st.lists(TABLES),
    st.lists(PORTS, min_size=1),
    st.sampled_from((["gangway0"], ["web"], ["web", "gangway0"])),
    st.sampled_from((None, NetworkRequest("web", ["10.1.0.0/24"]))),
)
def test_ports_that_were_kept_are_removed_again(
    tables: list[PublishTable], texts: list[str], networks: list[str], created: NetworkRequest | None
) -> None:
    requests = [one for one in map(parse_port, texts) if not one.is_choice]
    before = without_ports(Document([], tables), "new", ())
    if requests:
        kept = with_ports(before, "new", networks, requests, [created] if created else [])
        assert {*map(parse_port, kept.publish[-1].ports)} == {*requests}
        assert without_ports(kept, "new", requests).publish == before.publish
        assert without_ports(kept, "new", ()).publish == before.publish
        assert all(any(names(one, other) for other in requests) for one in requests)


def test_what_is_left_of_a_port_stays_kept() -> None:
    created = NetworkRequest("web", ["10.1.0.0/24"])
    kept = with_ports(Document(), "box", ["web"], [parse_port("8000:80"), parse_port("9000:90")], [created])
    kept = without_ports(kept, "box", [parse_port("0.0.0.0:8000:80")])
    assert kept.publish[0].ports == ["[::]:8000:80", "9000:90"]
    kept = without_ports(kept, "box", [parse_port("[::]:8000:80"), parse_port("9000:91")])
    assert kept.publish[0].ports == ["9000:90"]
    assert kept.network == [created]
    assert without_ports(kept, "box", [parse_port("9000:90")]) == Document()


def test_a_container_that_has_moved_is_kept_where_it_is() -> None:
    ports: list[PortRequest] = [parse_port("8000:80")]
    kept = with_ports(with_ports(Document(), "box", ["web"], ports, []), "box", ["back"], [parse_port("1:1")], [])
    assert [msgspec.to_builtins(one)["network"] for one in kept.publish] == ["back"]


def test_a_network_that_a_container_has_left_is_not_kept() -> None:
    networks = [NetworkRequest(name, [f"10.{number}.0.0/24"]) for number, name in enumerate(("web", "back"), 1)]
    kept = with_ports(Document(), "box", ["web", "back"], [parse_port("8000:80")], networks)
    assert kept.publish[0].network == ["web", "back"]
    left = without_network(kept, "box", "back")
    assert (left.publish[0].network, left.publish[0].ports, left.network) == ("web", ["8000:80"], networks[:1])


def test_wrong_files_say_what_they_said_before(tmp_path: Path) -> None:
    assert read_files(tmp_path / "none", {}) == ({}, {})
    good, wrong = tmp_path / "a.toml", tmp_path / "b.toml"
    good.write_text(WEB)
    wrong.write_text("[[")
    (tmp_path / "c.toml.bak").write_text("[[")
    found = read_files(tmp_path, {str(wrong): Document()})
    assert list(found.documents) == [str(good), str(wrong)]
    assert list(found.problems) == [str(wrong)]
    assert [text.partition(": ")[0] for text in check_files(tmp_path)] == [str(wrong)]
    wrong.write_text(WEB)
    assert check_files(tmp_path)[0] == f"{wrong}: network web: name: {good} declares this network already"
    wrong.write_bytes(b"\xff")
    assert len(read_files(tmp_path, {}).problems) == 1


def test_a_file_is_replaced_or_stays(tmp_path: Path) -> None:
    path = tmp_path / "conf.d/web.toml"
    with written(str(path), WEB):
        assert path.read_text() == WEB
    with pytest.raises(FileNotFoundError), written(str(path), ""):
        path.read_text()
    assert path.read_text() == WEB
    assert [one.name for one in path.parent.iterdir()] == ["web.toml"]


def test_where_files_are(tmp_path: Path) -> None:
    assert folder_for("/etc/other/gangway.toml") == Path("/etc/other/conf.d")
    files = DeclaredFiles(tmp_path)
    assert files.path_for("web.toml") == str(tmp_path / "web.toml")
    for name in ("web", "../web.toml", ".toml", "kept.toml", ""):
        with pytest.raises(InvalidRequest, match="invalid file name"):
            files.path_for(name)
