"""A daemon's API that gives prepared answers, and what shells complete with these."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingUnixStreamServer

_PORTS = [
    {"container": "box", "host_address": "0.0.0.0", "host_ports": "8000", "container_ports": "80", "protocol": "tcp"},
    {
        "container": "box",
        "host_address": "::1",
        "host_ports": "5060-5070",
        "container_ports": "5060-5070",
        "protocol": "udp",
    },
]
ANSWERS = {
    "/networks": [{"name": "web", "subnets": ["172.30.0.0/24"]}, {"name": "back", "subnets": ["fd31::/64"]}],
    "/endpoints": [
        {"container": "box", "network": "web"},
        {"container": "box", "network": "back"},
        {"container": "docker:db", "network": "back"},
        {"container": "x;id", "network": "back"},
    ],
    "/mappings": _PORTS,
    "/mappings?container=box": _PORTS,
}
"""The answers, by the target of a GET request."""
COMPLETED = [
    ("gangway unp", "gangway unpublish "),
    ("gangway network rm w", "gangway network rm web "),
    ("gangway unpublish box -p 0.0.0.0:8", "gangway unpublish box -p 0.0.0.0:8000:80/tcp "),
    ("gangway publish docker:", "gangway publish docker:db "),
    ("gangway ls --filter ro", "gangway ls --filter road="),
    ("gangway attach --network=w", "gangway attach --network=web "),
    ("gangway config check some", "gangway config check something.toml "),
]
"""Command lines in a folder that has a file `something.toml`, and what they are when Tab was pressed."""


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(ANSWERS[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def answering(path: Path, delay_s: float = 0) -> Iterator[dict[str, str]]:
    """Answer requests at a unix socket, after some time; the environment in which commands find it."""

    class Handler(_Handler):
        def do_GET(self) -> None:
            time.sleep(delay_s)
            super().do_GET()

    with ThreadingUnixStreamServer(str(path), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            commands = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            yield {"PATH": commands, "GANGWAY_SOCKET": str(path), "LANG": "C.UTF-8"}
        finally:
            server.shutdown()
            thread.join()
