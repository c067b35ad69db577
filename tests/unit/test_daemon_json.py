"""dockerd's settings as text: what is edited, and that everything else stays as it is."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gangway.docker.daemon_json import DROP_IN, SWITCHES, enabled, restored, to_change, values
from gangway.errors import InvalidRequest

OFF = {"iptables": False, "ip6tables": False, "userland-proxy": False}
FULL = """\
{
    "log-driver" : "journald",
    "iptables" : true,
    "hosts" : [ "unix:///a" , "tcp://b" ]
}
"""
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from((*SWITCHES, "ip", "live-restore", "log-opts", "userland-proxy-path")) | st.text(max_size=5)
OBJECTS = st.dictionaries(KEYS, JSON, max_size=6)
LAYOUTS: Any = st.sampled_from(
    (
        {"indent": None},
        {"indent": 1},
        {"indent": 4},
        {"indent": "\t"},
        {"separators": (",", ":")},
        {"separators": (" , ", " : ")},
    )
)
ABOUT = st.sampled_from(("", " ", "\n", "\r\n\t"))
TEXTS = st.builds(lambda what, how, space: space + json.dumps(what, **how) + space, OBJECTS, LAYOUTS, ABOUT) | ABOUT
FLAGS = st.dictionaries(st.sampled_from(SWITCHES), st.sampled_from(("true", "false")))


@given(text=TEXTS, flags=FLAGS)
def test_enabling_changes_the_switches_only(text: str, flags: dict[str, str]) -> None:
    before, after = values(text), values(enabled(text, flags))
    changed = to_change(before, flags)
    assert after == {**before, **dict.fromkeys(changed, False)}
    assert list(after)[: len(before)] == list(before)
    assert to_change(after, flags) == ()
    assert enabled(enabled(text, flags), flags) == enabled(text, flags)


@given(text=TEXTS)
def test_restoring_gives_the_very_text_back(text: str) -> None:
    found = restored(enabled(text, {}), text)
    assert found.text == text
    assert found.keys == to_change(values(text), {})
    assert found.changed_since == ()


@given(text=TEXTS, more=st.dictionaries(st.text(min_size=6, max_size=9), JSON, min_size=1, max_size=3))
def test_restoring_keeps_what_was_added_since(text: str, more: dict[str, Any]) -> None:
    now = json.dumps({**values(enabled(text, {})), **more})
    found = restored(now, text)
    assert found.text is not None
    assert values(found.text) == {**values(text), **more}


@given(text=TEXTS, other=st.sampled_from(("true", '"no"', None)))
def test_restoring_leaves_keys_that_were_changed_since(text: str, other: str | None) -> None:
    now = values(enabled(text, {}))
    del now["iptables"]
    if other is not None:
        now["iptables"] = json.loads(other)
    found = restored(json.dumps(now), text)
    before = values(text)
    assert "iptables" not in found.keys
    assert values(found.text or "").get("iptables") == now.get("iptables")
    assert ("iptables" in found.changed_since) == (
        "iptables" in to_change(before, {}) and ("iptables" in before or other is not None)
    )


def test_a_file_that_did_not_exist_is_deleted_unless_something_was_added() -> None:
    made = enabled("", {})
    assert made == '{\n  "iptables": false,\n  "ip6tables": false,\n  "userland-proxy": false\n}\n'
    assert restored(made, None).text is None
    kept = restored(made.replace("{", '{"debug": true,'), None).text
    assert kept is not None
    assert values(kept) == {"debug": True}


def test_new_keys_look_like_the_others() -> None:
    assert enabled(FULL, {}) == FULL.replace("true", "false").replace(
        " ]\n", ' ],\n    "ip6tables" : false,\n    "userland-proxy" : false\n'
    )
    assert enabled('{"debug":true}', {}) == (
        '{"debug":true, "iptables":false, "ip6tables":false, "userland-proxy":false}'
    )


@pytest.mark.parametrize("where", ["file", "flag"])
def test_the_drop_in_may_stay_the_proxy(where: str) -> None:
    proxy = {"userland-proxy-path": f"/opt/{DROP_IN}"}
    settings, flags = (proxy, {}) if where == "file" else ({}, proxy)
    assert to_change(settings, flags) == ("iptables", "ip6tables")
    assert to_change({"userland-proxy-path": "/usr/bin/docker-proxy"}, {}) == SWITCHES


def test_a_flag_that_is_off_already_gets_no_key() -> None:
    assert to_change({}, {"iptables": "false", "ip6tables": "true"}) == ("ip6tables", "userland-proxy")
    assert to_change({"iptables": True}, {"iptables": "false"}) == SWITCHES


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{\n  "debug": true,\n}', "line 3, column 1: "),
        ('{\n  // off\n  "debug": true\n}', "line 2, column 3: "),
        ('{"debug": true} {}', "line 1, column 17: Extra data"),
        ('{"mtu": NaN}', "NaN is not JSON"),
        ('{"mtu": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "line 1, column 1: the settings have to be an object"),
        ("null", "line 1, column 1: "),
        ('{"ip": "a", "ip": "b"}', 'the key "ip" is there twice'),
        ('{"a": "\n"}', "line 1, column 8: "),
    ],
)
def test_an_invalid_file_is_reported_with_its_place(text: str, why: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        values(text)
    assert why in str(error.value)


def test_a_byte_order_mark_stays() -> None:
    assert enabled('\ufeff{"debug": true}', {}).startswith('\ufeff{"debug": true, "iptables"')
    assert values("\ufeff") == {}
    assert values(json.dumps(OFF)) == OFF
