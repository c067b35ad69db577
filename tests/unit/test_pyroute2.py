"""pyroute2 without the 8 MB that its package imports, each time in a fresh interpreter."""

import subprocess
import sys

import pytest

PARTS = "from gangway.host import conntrack, dump, events, links, netns, sockets\n"


def run(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", PARTS + script], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_host_modules_do_not_run_the_package_init() -> None:
    run("import sys; assert not {'pyroute2.ndb', 'pyroute2.nftables', 'pyroute2.ipset'} & sys.modules.keys()")


def test_the_parts_work_without_the_package_init() -> None:
    run(
        "import sys\n"
        "host = links.Links()\n"
        "assert host.all()['lo'].kind == ''\n"
        "host.addresses(), host.routed_subnets(), host.close()\n"
        "sockets.bound_ports('tcp')\n"
        "conntrack.delete('tcp', 4, [conntrack.Destination({'192.0.2.1'}, range(1, 2))])\n"
        "assert 'pyroute2.ndb' not in sys.modules"
    )


@pytest.mark.parametrize(
    "script",
    [
        "import pyroute2; assert pyroute2.IPRoute is type(links.Links()._route); assert pyroute2.NDB",
        "from pyroute2 import NDB, IPRoute; assert IPRoute is type(links.Links()._route)",
        "import pyroute2; assert pyroute2.netns.__name__ == 'pyroute2.netns'; assert pyroute2.__version__",
        "import pyroute2.ndb.main; assert pyroute2.ndb.main.NDB is pyroute2.NDB",
    ],
)
def test_another_user_of_the_library_finds_the_whole_package(script: str) -> None:
    run(script)


def test_an_unknown_name_is_an_attribute_error() -> None:
    run(
        "import pyroute2\n"
        "for name in ('NoSuchName', '__wrapped__'):\n"
        "    try:\n"
        "        getattr(pyroute2, name)\n"
        "    except AttributeError:\n"
        "        continue\n"
        "    raise AssertionError(name)"
    )
