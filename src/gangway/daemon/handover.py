"""`gangway docker check|enable|disable|cleanup`: Docker's ports handed over to gangway, and back.

dockerd goes on choosing and showing ports if its settings switch its rules and its proxy off; it has to be restarted
for that.  Its rules that are left then are removed by another command, because dockerd needs them until it restarts.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from gangway.daemon.config import Config
from gangway.daemon.docker_rules import DockerRules
from gangway.daemon.messages import CheckAnswer, DockerChange, DockerReport
from gangway.docker.activation import would_start_dockerd
from gangway.docker.daemon_json import NOTED, PROXY, SWITCHES, needed, to_change
from gangway.docker.running import Engine, Process, find_process, in_use, read_engine
from gangway.docker.settings_file import DEFAULT, SettingsFile
from gangway.errors import Conflict, HostRefused, InvalidRequest
from gangway.firewall.iptables.render import DOCKERS_PREFIX

_SYSTEMD = Path("/run/systemd/system")  # sd_booted(3)
_IP6TABLES_SINCE = 27  # the release from which on `ip6tables` is on if nothing is said
_MEANINGS = {
    "userland-proxy-path": "the program that dockerd starts for each port unless userland-proxy is false",
    "ip-forward": "gangway's own setting decides",
    "ip": "the host address of ports that are published without one",
    "live-restore": "whether containers go on while dockerd restarts",
    "firewall-backend": "without effect while iptables and ip6tables are false",
}
_SWARM = "Swarm is active, and its ingress needs dockerd's own rules"
_USER_CHAIN = (
    "{0}: your rules in DOCKER-USER stay, but dockerd does not create that chain any more: after a reboot, let "
    "{0} -N DOCKER-USER and {0} -I FORWARD -j DOCKER-USER come first"
)
_OWN_LINES = ["add to gangway.toml, and restart gangway's daemon (or start it with --docker):"]
_OWN_LINES += ["  [docker]", "  enabled = true"]
_CLEANUP = "remove dockerd's rules: gangway docker cleanup"
_LOCALNET_CHECK = "dockerd's bridges: route_localnet"
_LOCALNET = (
    "dockerd without a proxy switches it on, which lets in what containers send to the host's loopback addresses"
)
_LOCALNET_LEFT = (
    "left on by a dockerd without a proxy: it lets in what containers send to the host's loopback addresses"
)
_SAME_RULES = f"gangway's own rules look like dockerd's (chain-prefix {DOCKERS_PREFIX})"


class _Dockerd(NamedTuple):
    """The dockerd that runs, as far as it can be seen, and its settings file."""

    engine: Engine | None
    unreadable: str  # why its API cannot be read; empty if it can
    process: Process | None
    file: SettingsFile

    @property
    def flags(self) -> Mapping[str, str]:
        return self.process.flags if self.process else {}

    @property
    def is_swarm(self) -> bool:
        return self.engine is not None and self.engine.is_swarm

    def switched_on(self, settings: Mapping[str, object]) -> dict[str, bool | None]:
        """Return the switches that were on when it started; those that may have been have the value None."""
        if self.process is None:
            return {}
        release = self.engine.version.partition(".")[0] if self.engine else ""
        defaults = {"ip6tables": not release.isdigit() or int(release) >= _IP6TABLES_SINCE}
        changed_s = self.file.changed_s()
        found = {
            key: in_use(key, defaults.get(key, True), self.process, settings, changed_s, self.engine)
            for key in needed(settings, self.flags)
        }
        return {key: is_on for key, is_on in found.items() if is_on is not False}

    def may_lack_proxy(self, settings: Mapping[str, object]) -> bool:
        """True if it has started without any proxy, or will be; also if that cannot be told."""
        if self.process is None:
            return self.will_lack_proxy(settings)
        return not in_use(PROXY, True, self.process, settings, self.file.changed_s(), None)

    def will_lack_proxy(self, settings: Mapping[str, object]) -> bool:
        """True if it starts without any proxy the next time, with the flags that it has now."""
        return settings.get(PROXY) is False or self.flags.get(PROXY) == "false"

    def restart(self) -> str:
        """Return how it is restarted, and what that does to containers."""
        if self.process is None:
            return "start dockerd" + ": systemctl start docker" * _SYSTEMD.exists()
        command = f": systemctl restart {self.process.unit}" if self.process.unit else f" (pid {self.process.pid})"
        if self.engine is not None and self.engine.is_live_restoring:
            return f"restart dockerd{command}; containers go on running (live-restore)"
        return f"restart dockerd{command}; all containers end, and those with a restart policy are started again"


class Handover:
    """dockerd's settings and rules.  `check` changes nothing; the rest is for one thread.

    `is_serving` tells whether this daemon serves Docker's ports.  `config_file` is the path of dockerd's settings;
    empty: that of the dockerd that runs, or the usual one.
    """

    def __init__(self, config: Callable[[], Config], rules: DockerRules, is_serving: Callable[[], bool]) -> None:
        self._config, self._rules, self._is_serving = config, rules, is_serving

    def check(self, config_file: str = "") -> DockerReport:
        """Say what is as gangway needs it, and what to do about the rest."""
        dockerd = self._dockerd(config_file)
        settings: Mapping[str, object] = {}
        missing: Sequence[str] = ()
        is_readable = True
        try:
            settings = dockerd.file.settings()
        except (Conflict, HostRefused) as error:
            checks = [CheckAnswer("daemon.json", False, str(error))]
            is_readable = False
        else:
            missing = to_change(settings, dockerd.flags)
            checks = [CheckAnswer("daemon.json", True, str(dockerd.file))]
            checks += _setting_checks(settings, missing, dockerd.flags)
        note = "" if self._is_serving() else "this daemon does not serve them ([docker] enabled)"
        checks.append(CheckAnswer("gangway: Docker's ports", self._is_serving(), note))
        switched_on = dockerd.switched_on(settings)
        checks += _process_checks(dockerd, settings, switched_on)
        localnet = self._rules.localnet_settings()
        is_left = bool(localnet) and is_readable and not dockerd.may_lack_proxy(settings)
        if localnet:
            has_rules = self._is_serving() and self._config().firewall != "none"
            note = _LOCALNET_LEFT if is_left else _LOCALNET + "; gangway's rules drop it" * has_rules
            checks.append(CheckAnswer(_LOCALNET_CHECK, not is_left, f"{', '.join(localnet)}: {note}"))
        rules = [CheckAnswer("dockerd's rules", True, f"{_SAME_RULES}: not told apart")]
        if self._config().chain_prefix != DOCKERS_PREFIX:
            rules = list(self._rules.checks())
        advice = [f"set in {dockerd.file.path}, or let gangway docker enable do it:"] if missing else []
        advice += [f'  "{key}": false' + "," * (key != missing[-1]) for key in missing]
        advice += [*self._own_lines(), *([dockerd.restart()] if switched_on else [])]
        advice += [_switch_off(localnet)] * is_left
        if not all(check.holds for check in rules):
            advice.append("then " * bool(switched_on) + _CLEANUP)
        return DockerReport([*checks, *rules], advice)

    def enable(self, config_file: str = "") -> DockerChange:
        """Switch dockerd's rules and proxy off in its settings.  Conflict, HostRefused: nothing was changed."""
        dockerd = self._dockerd(config_file)
        if dockerd.is_swarm:
            raise Conflict(f"{_SWARM}: nothing was changed (docker swarm leave ends it)")
        keys = dockerd.file.enable(dockerd.flags)
        done = f"{dockerd.file.path} leaves the ports to gangway already: nothing was changed"
        if keys:
            done = f"{dockerd.file.path}: {', '.join(keys)} set to false (backup: {dockerd.file.backup})"
        settings = dockerd.file.settings()
        advice = [*_flag_conflicts(dockerd.flags, settings), *self._own_lines()]
        if dockerd.process is None or dockerd.switched_on(settings):
            advice += [dockerd.restart(), f"then {_CLEANUP}"]
        advice += [_USER_CHAIN.format(command) for command in self._rules.user_chains()]
        return DockerChange([done], advice)

    def disable(self, config_file: str = "") -> DockerChange:
        """Restore dockerd's settings.  Conflict, HostRefused: nothing was changed."""
        dockerd = self._dockerd(config_file)
        found = dockerd.file.disable()
        done = [f"{dockerd.file.path}: {', '.join(found.keys) or 'nothing'} restored"]
        done += [f"{dockerd.file.path}: {key} was changed since, and is left as it is" for key in found.changed_since]
        own = [
            "set in gangway.toml, table [docker]: enabled = false; and restart gangway's daemon"
        ] * self._is_serving()
        localnet = [] if dockerd.will_lack_proxy(dockerd.file.settings()) else self._rules.localnet_settings()
        return DockerChange(done, [*own, dockerd.restart(), *([f"then {_switch_off(localnet)}"] if localnet else [])])

    def clean_up(self, forward_accept: bool) -> DockerChange:
        """Remove dockerd's rules.  Conflict: it needs them; nothing was removed.  HostRefused: which were not."""
        if self._config().chain_prefix == DOCKERS_PREFIX:
            raise Conflict(f"{_SAME_RULES}: nothing was removed")
        dockerd = self._dockerd("")
        if dockerd.is_swarm:
            raise Conflict(f"{_SWARM}: nothing was removed")
        if dockerd.process is not None and dockerd.engine is None:
            raise Conflict(f"{dockerd.process} may need its rules: {dockerd.unreadable}")
        switched_on = dockerd.switched_on(dockerd.file.settings())
        rules = {key: is_on for key, is_on in switched_on.items() if key in ("iptables", "ip6tables")}
        if rules and dockerd.process is not None:
            raise Conflict(
                f"{dockerd.process} may need its rules: {_started_with(rules)}; nothing was removed "
                "(gangway docker check says what to do first)"
            )
        return self._rules.remove(forward_accept)

    def _dockerd(self, config_file: str) -> _Dockerd:
        if config_file and (not config_file.startswith("/") or "\0" in config_file):
            raise InvalidRequest(f"config_file must be an absolute path, not {config_file!r}")
        engine, unreadable, path = None, "", self._config().docker.socket
        try:
            if would_start_dockerd(path):
                raise HostRefused(f"Docker's API {path}: cannot be read (dockerd is stopped)")
            engine = read_engine(path)
        except HostRefused as error:
            unreadable = str(error)
        process = find_process(engine.pid if engine else 0)
        file = Path(config_file) if config_file else process and process.config_file
        return _Dockerd(engine, unreadable, process, SettingsFile(file or DEFAULT))

    def _own_lines(self) -> list[str]:
        """Return what is left to do for gangway to serve Docker's ports."""
        if self._is_serving():
            return []
        return ["restart gangway's daemon: [docker] enabled is new"] if self._config().docker.enabled else _OWN_LINES


def _setting_checks(
    settings: Mapping[str, object], missing: Sequence[str], flags: Mapping[str, str]
) -> Iterator[CheckAnswer]:
    """Yield what daemon.json says."""
    for key in SWITCHES:
        said = json.dumps(settings[key]) if key in settings else "not set"
        if key in flags:
            said += f" (a flag of dockerd's: {flags[key]})"
        elif key not in needed(settings, flags):
            said += " (not needed: gangway's program is the proxy)"
        yield CheckAnswer(f"daemon.json: {key}", key not in missing, said)
    for key in NOTED:
        if key in settings:
            yield CheckAnswer(f"daemon.json: {key}", True, f"{json.dumps(settings[key])}: {_MEANINGS[key]}")


def _process_checks(
    dockerd: _Dockerd, settings: Mapping[str, object], switched_on: Mapping[str, bool | None]
) -> Iterator[CheckAnswer]:
    """Yield what is to be said of the dockerd that runs."""
    place = f"pid {dockerd.process.pid}" if dockerd.process else "no process found"
    if dockerd.engine is None:
        advice = f" (it runs, {place}: set socket in table [docker] of gangway.toml)" if dockerd.process else ""
        yield CheckAnswer("dockerd", False, dockerd.unreadable + advice)
    else:
        yield CheckAnswer("dockerd", True, f"{dockerd.engine.version}, {place}")
    if dockerd.process is not None:
        yield CheckAnswer("dockerd: started with these settings", not switched_on, _started_with(switched_on))
    for text in _flag_conflicts(dockerd.flags, settings):
        yield CheckAnswer("dockerd: flags", False, text)
    if dockerd.is_swarm:
        yield CheckAnswer("dockerd: no Swarm", False, _SWARM)


def _switch_off(settings: Iterable[str]) -> str:
    return f"sysctl -w {' '.join(f'{name}=0' for name in settings)} (dockerd with a proxy does not)"


def _started_with(switched_on: Mapping[str, bool | None]) -> str:
    certain = " and ".join(key for key, is_on in switched_on.items() if is_on)
    texts = [f"it was started with {certain} on"] if certain else []
    return "; ".join([*texts, *["daemon.json was changed after it had started"] * (None in switched_on.values())])


def _flag_conflicts(flags: Mapping[str, str], settings: Mapping[str, object]) -> Iterator[str]:
    """Yield the flags that are in the way."""
    for key in needed(settings, flags):
        if key in flags and (key in settings or flags[key] != "false"):
            yield f"remove --{key} from dockerd's command line: dockerd refuses to start if daemon.json has it, too"
