"""The policy of iptables' FORWARD chain, where it has to be DROP.

The policy belongs to no program: ufw sets it, and so does dockerd.  It is restored if no program has added a rule to
FORWARD since gangway set it; one that has relies on the policy as it is.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial

from gangway.firewall.iptables.tool import Iptables
from gangway.host.saved_settings import SavedSettings, Setting

_CLOSED = "DROP"
_STAYS = f"left at {_CLOSED}: other programs have added rules to it: {{}}"


class ForwardPolicies:
    """The policies of both families; `own_rules` returns gangway's rules in FORWARD."""

    def __init__(
        self, tools: Mapping[int, Iptables], saved: SavedSettings, own_rules: Callable[[], Collection[str]]
    ) -> None:
        self._tools = tools
        self._saved = saved
        self._own_rules = own_rules
        for family, tool in tools.items():
            dependents = partial(self.foreign_rules, family)
            saved.register(
                Setting(_name(tool), tool.policy, tool.set_policy, dependents=dependents, reason_to_stay=_STAYS)
            )

    def are_closed(self, families: Collection[int]) -> bool:
        """True if the policy is DROP for these families."""
        return all(self._tools[family].policy() == _CLOSED for family in families)

    def close(self, families: Collection[int]) -> None:
        """Set DROP for these families, and restore the policy of the others."""
        for family, tool in self._tools.items():
            if family in families:
                self._saved.set(_name(tool), _CLOSED)
            else:
                self._saved.restore(_name(tool))

    def foreign_rules(self, family: int) -> list[str]:
        """Return other programs' rules in FORWARD."""
        lines = self._tools[family].listing(["filter"]).splitlines()
        own = self._own_rules()
        return [line for line in lines if line.startswith("-A FORWARD ") and line not in own]


def _name(tool: Iptables) -> str:
    return f"{tool.command} policy of FORWARD"
