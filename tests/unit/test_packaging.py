"""What the Debian package adds: the example of the settings file, and the versions that it carries."""

import re
import tomllib
from pathlib import Path

from gangway.daemon.config import Config, by_name, load
from scripts.build_deb import RELEASES

_TOP = Path(__file__).parents[2]
_PACKAGING = _TOP / "packaging"
_EXAMPLE = _PACKAGING / "gangway.toml"


def test_the_example_has_every_setting_with_its_default(tmp_path: Path) -> None:
    """Uncommented, all of it is loaded.  The default of `workers` depends on the machine."""
    file = tmp_path / "gangway.toml"
    file.write_text(re.sub(r"^#(?=[a-z_-]+ = )", "", _EXAMPLE.read_text(), flags=re.MULTILINE))
    found = load(file, {}, {})
    assert set(found.sources) == set(by_name(Config()))
    assert by_name(found.config) | {"relay.workers": 0} == by_name(Config()) | {"relay.workers": 0}


def test_the_example_as_it_is_changes_nothing_and_explains_every_setting() -> None:
    text = _EXAMPLE.read_text()
    assert load(_EXAMPLE, {}, {}) == (Config(), [], {})
    for paragraph in (one for one in re.sub(r"^\[.*\]\n", "", text, flags=re.MULTILINE).split("\n\n") if " = " in one):
        assert paragraph.startswith("# "), paragraph


def test_each_dependency_is_carried_or_debians_own() -> None:
    project = tomllib.loads((_TOP / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[<>=]", one)[0] for one in project["dependencies"]}
    for suite, release in RELEASES.items():
        lines = (_PACKAGING / f"{suite}.txt").read_text().splitlines()
        carried = {line.partition("==")[0] for line in lines if not line.startswith("#")}
        assert needed <= carried | {name.removeprefix("python3-") for name in release.packages}
        assert not carried & {name.removeprefix("python3-") for name in release.packages}
