"""Whether a container still exists."""

from gangway.errors import Conflict
from gangway.host import netns
from gangway.state.database import Place


def is_dead(place: Place, has_link: bool) -> bool:
    """True if a container's namespace and link no longer exist, if another namespace is at its place now, or if the
    process that it belongs to has ended.

    A link shows that the namespace lives.  Without one, the namespace at the container's path may be a later one with
    the same inode number.  A path that names a process says nothing once that process has ended.
    """
    if place.owner and netns.has_process_ended(place.owner):
        return True
    found = netns.current_inode(place.namespace)
    if found == place.inode:
        return not has_link and _is_another(place)
    return not has_link or (found is not None and not netns.is_of_process(place.namespace))


def _is_another(place: Place) -> bool:
    """True if the namespace at a place is not the container's, though it has the same inode number."""
    try:
        return bool(place.cookie) and netns.cookie_at(place.namespace) != place.cookie
    except Conflict:
        return True
