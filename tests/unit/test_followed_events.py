"""`gangway log`: how it reads the API's stream."""

import json
import socket
import threading
from pathlib import Path

import pytest

from gangway.cli.client import NoDaemon, Refused
from gangway.cli.log import follow, line_of

HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\n"
FIRST = {"time": "2026-11-28T23:00:00.000+00:00", "level": "info", "event": "started", "message": "daemon started"}
SECOND = {**FIRST, "level": "warning", "event": "refused", "message": "POST /mappings refused: “no”"}


def serve(path: Path, *parts: bytes) -> threading.Thread:
    """Answer one client with these parts, and close the connection."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def answer() -> None:
        with listener, listener.accept()[0] as client:
            assert client.recv(1000).startswith(b"GET /events HTTP/1.0\r\n")
            for part in parts:
                client.sendall(part)

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


@pytest.mark.parametrize("as_json", [False, True])
def test_events_are_printed_however_they_arrive(
    as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sent = HEAD + b": no event\n\n"
    sent += b"".join(f"data: {json.dumps(one, ensure_ascii=False)}\n\n".encode() for one in (FIRST, SECOND))
    thread = serve(tmp_path / "socket", *(sent[start : start + 7] for start in range(0, len(sent), 7)))
    follow(str(tmp_path / "socket"), as_json)
    thread.join()
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert ([*map(json.loads, lines)] == [FIRST, SECOND]) if as_json else (lines == [line_of(FIRST), line_of(SECOND)])
    assert printed.err == "gangway: the daemon has ended\n"


def test_a_line_names_the_level_of_what_may_need_action() -> None:
    assert line_of(FIRST) == "2026-11-28T23:00:00.000+00:00 daemon started"
    assert line_of(SECOND) == "2026-11-28T23:00:00.000+00:00 warning: POST /mappings refused: “no”"


def test_a_refusal_is_an_error(tmp_path: Path) -> None:
    body = b'{"kind": "InvalidRequest", "error": "GET /events: Not Found"}'
    thread = serve(tmp_path / "socket", b"HTTP/1.0 404 Not Found\r\nContent-Length: 60\r\n\r\n" + body)
    with pytest.raises(Refused, match="GET /events: Not Found") as refused:
        follow(str(tmp_path / "socket"), False)
    thread.join()
    assert refused.value.kind == "InvalidRequest"
    with pytest.raises(NoDaemon):
        follow(str(tmp_path / "nowhere"), False)


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0\r\n", b"HTTP/1.0 500 Oops\r\n\r\nsorry"])
def test_another_program_at_the_socket_is_an_error(answer: bytes, tmp_path: Path) -> None:
    thread = serve(tmp_path / "socket", answer)
    with pytest.raises(Refused, match="no valid answer from the daemon"):
        follow(str(tmp_path / "socket"), False)
    thread.join()
