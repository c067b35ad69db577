"""What the Debian package adds: the example of the settings file, and the versions that it carries."""

import re
import tomllib
from pathlib import Path

import msgspec

from gangway.daemon.config import Config
from gangway.relay.settings import Settings, checked
from scripts.build_deb import RELEASES

_TOP = Path(__file__).parents[2]
_PACKAGING = _TOP / "packaging"


def test_the_example_has_every_setting_with_its_default() -> None:
    text = re.sub(r"^#(?=[a-z_-]+ = )", "", (_PACKAGING / "gangway.toml").read_text(), flags=re.MULTILINE)
    given = tomllib.loads(text)
    relay = given.pop("relay")
    assert msgspec.convert(given, Config) == Config()
    assert set(given) | {"relay"} == {field.encode_name for field in msgspec.structs.fields(Config)}
    assert set(given["docker"]) == {"enabled", "socket"}
    assert checked(relay, "relay")._replace(workers=0) == Settings(workers=0)
    assert set(relay) == set(Settings._fields)


def test_each_dependency_is_carried_or_debians_own() -> None:
    project = tomllib.loads((_TOP / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", one)[0] for one in project["dependencies"]}
    for suite, release in RELEASES.items():
        lines = (_PACKAGING / f"{suite}.txt").read_text().splitlines()
        carried = {line.partition("==")[0] for line in lines if not line.startswith("#")}
        assert needed <= carried | {name.removeprefix("python3-") for name in release.packages}
        assert not carried & {name.removeprefix("python3-") for name in release.packages}
