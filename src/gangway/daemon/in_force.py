"""Which settings are in force, and where each comes from."""

from collections.abc import Iterator

import msgspec

from gangway.daemon.config import RELAY_STARTS, Loaded, by_name, later
from gangway.daemon.messages import SettingAnswer


def in_force(started: Loaded, now: Loaded, is_relay_former: bool) -> Iterator[SettingAnswer]:
    """Yield the settings of a daemon that has `started` with some, and has read others since.

    `is_relay_former`: the relay is still the one from before they were read.
    """
    waiting = later(started.config, now.config)
    former = by_name(started.config)
    for name, value in by_name(now.config).items():
        when = waiting.get(name, "")
        source = now.sources.get(name, "default")
        if when and (when != RELAY_STARTS or is_relay_former):
            note = f"{msgspec.json.encode(value).decode()} ({source}) {when}"
            yield SettingAnswer(name, former[name], started.sources.get(name, "default"), note)
        else:
            yield SettingAnswer(name, value, source)
