"""The policy of iptables' FORWARD, where it has to be DROP.

What this file knows: what it was before, and when it is ours to put back.  What it must not know: why it has to be.

It is everybody's: ufw sets it, dockerd does.  It goes back to what it was if nobody has added a rule to FORWARD since
we set it; who did counts on the policy as it is, and it stays.
"""

from collections.abc import Collection

from gangway.firewall.iptables.tool import Iptables
from gangway.host import probe
from gangway.state.database import Database

_CLOSED = "DROP"


class ForwardPolicies:
    """FORWARD's, of each family's tool."""

    def __init__(self, tools: dict[int, Iptables], store: Database) -> None:
        self._tools = tools
        self._database = store

    def are_as(self, closed: Collection[int]) -> bool:
        """Whether all are DROP that should be."""
        return all(self._tools[family].policy() == _CLOSED for family in closed)

    def close(self, closed: Collection[int], ours: Collection[str]) -> None:
        """DROP for these families, and as it was for the others; `ours` are the rules in FORWARD that are."""
        for family, tool in self._tools.items():
            if family in closed:
                if self._before(family) is None:
                    foreign = self.foreign(family, ours)
                    self._database.remember(_key(family), "\n".join((probe.boot_id(), tool.policy(), *foreign)))
                if tool.policy() != _CLOSED:
                    tool.set_policy(_CLOSED)
            else:
                self._open(family, tool, ours)

    def foreign(self, family: int, ours: Collection[str]) -> list[str]:
        """Others' rules in FORWARD."""
        lines = self._tools[family].listing(["filter"]).splitlines()
        return [line for line in lines if line.startswith("-A FORWARD ") and line not in ours]

    def _open(self, family: int, tool: Iptables, ours: Collection[str]) -> None:
        before = self._before(family)
        if before is not None:
            policy, *foreign = before
            if foreign == self.foreign(family, ours):
                tool.set_policy(policy)
        self._database.forget(_key(family))

    def _before(self, family: int) -> list[str] | None:
        """The policy, and others' rules, when we set it; None if we did not, or before the machine was started."""
        boot, *before = (self._database.recall(_key(family)) or "").split("\n")
        return before if boot == probe.boot_id() else None


def _key(family: int) -> str:
    return f"policy {family}"
