"""Examples of the help are carried out: a network, a container, its ports, and all of it removed again."""

import os

import pytest

from gangway.cli.manual import EXAMPLES
from lab.gangwayd import GANGWAY, Gangway
from lab.netns import Namespace

pytestmark = pytest.mark.any_kernel

# Each command, and which of its examples; they follow from each other.
_RUN = (
    ("network create", 0),
    ("attach", 0),
    ("publish", 0),
    ("network ls", 0),
    ("network ls", 1),
    ("network inspect", 1),
    ("ls", 0),
    ("ls", 1),
    ("explain", 0),
    ("ls", 2),
    ("publish", 1),
    ("network create", 1),
    ("attach", 2),
    ("detach", 1),
    ("unpublish", 1),
    ("network rm", 1),
    ("network rm", 2),
)


def test_examples_can_be_carried_out_one_after_the_other() -> None:
    environment = {"PATH": f"{GANGWAY.parent}:{os.environ['PATH']}", "LANG": "C.UTF-8"}
    printed = {}
    with Namespace("host") as host, Namespace("box") as box, Gangway(host) as gangway:
        for name, number in _RUN:
            line = EXAMPLES[name][number][0].replace("box", box.name)
            printed[name, number] = host.run("sh", "-ec", line, env=environment).stdout
        left = gangway.json("network", "ls")
    assert printed["network ls", 1] == "web\n"
    assert printed["ls", 1].splitlines() == [
        f"{at}\t{ports}\t{box.name}" for at in ("0.0.0.0", "::") for ports in ("5060-5070", "8000")
    ]
    assert printed["publish", 1].startswith("0.0.0.0:8443 -> ")
    assert left == []
