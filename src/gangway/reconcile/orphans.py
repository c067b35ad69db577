"""What a daemon has left whose database is lost: its links and rules, which no later daemon knows to be wanted."""

from collections.abc import Callable

from gangway.facts import Firewall
from gangway.firewall.base import Driver
from gangway.host.links import Links
from gangway.log import Log
from gangway.reconcile.observe import Observer


def find(observer: Observer, log: Log) -> list[str]:
    """Return the links of such daemons; their names are logged."""
    links = observer.orphaned_links()
    if links:
        log.warning(
            f"{', '.join(links)} were made by a daemon with another database, which may be lost: left as they are; "
            "gangway cleanup deletes them, their rules and their ports"
        )
    return links


def delete(observer: Observer, links: Links, driver_for: Callable[[Firewall], Driver], log: Log) -> list[str]:
    """Delete these links, and all rules of gangway's; return the links' names.  HostRefused: one could not be."""
    found = observer.orphaned_links()
    for firewall in (Firewall.NFTABLES, Firewall.IPTABLES):
        if observer.tools.unusable(firewall) is None:
            driver = driver_for(firewall)
            driver.claim(found)
            driver.remove()
    for name in found:
        links.delete(name)
    log.warning(f"deleted the links of a daemon whose database is lost: {', '.join(found) or 'none'}")
    return found
