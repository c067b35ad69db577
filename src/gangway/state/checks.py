"""What keeps ports of an attached container from being published."""

from collections.abc import Sequence
from dataclasses import replace
from ipaddress import ip_address

from gangway.errors import Conflict, Unsupported
from gangway.host import netns
from gangway.model import Network, PortRequest
from gangway.plan import MappingPlan
from gangway.state.database import Place

_LOOPBACK = {4: ip_address("127.0.0.1"), 6: ip_address("::1")}


def check_same_process(container: str, place: Place) -> None:
    """Conflict: the path of a container's namespace names another one now."""
    if netns.is_of_process(place.namespace) and netns.current_inode(place.namespace) not in (None, place.inode):
        raise Conflict(
            f"container {container} lives, but its process has ended, and {place.namespace} is another namespace now: "
            f"gangway detach {container}, and attach it by another name"
        )


def check_reachable(planned: Sequence[MappingPlan]) -> None:
    """Unsupported: no road leads to a mapping from anywhere."""
    for one in planned:
        if not (one.is_nat or one.is_redirected or one.is_relayed):
            raise Unsupported(
                f"{one.mapping} would be unreachable: this kernel has no {one.mapping.protocol} sockets for the relay, "
                "and no rule serves it"
            )


def check_internal(request: PortRequest, network: Network) -> None:
    """Conflict: ports of the network's containers cannot be published at a requested address."""
    if network.internal and not all(address.is_loopback for address in request.host_addresses):
        family = min(address.version for address in request.host_addresses)
        at_loopback = replace(request, host_addresses=(_LOOPBACK[family],))
        raise Conflict(
            f"network {network.name} is internal: its containers' ports can be published on a loopback address only, "
            f"as in -p {at_loopback}"
        )
