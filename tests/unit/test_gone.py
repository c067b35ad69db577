"""A request that is refused, and what a container that is gone has to do with it."""

import pytest

from gangway.errors import Conflict, HostRefused, PortInUse
from gangway.state.retry import again_without_the_gone


class Host:
    """One that refuses as long as there is a container that is gone."""

    def __init__(self, gone: int, refusal: Exception) -> None:
        self.gone = gone
        self.refusal: Exception | None = refusal
        self.asked = 0

    def withdraw_what_is_gone(self) -> bool:
        found, self.gone = self.gone, 0
        if found:
            self.refusal = None
        return bool(found)

    @again_without_the_gone
    def publish(self, what: str) -> str:
        self.asked += 1
        if self.refusal is not None:
            raise self.refusal
        return what


@pytest.mark.parametrize("refusal", [Conflict("taken"), PortInUse("taken")])
def test_it_is_tried_again_without_what_is_gone(refusal: Exception) -> None:
    host = Host(1, refusal)
    assert (host.publish("80"), host.asked) == ("80", 2)


@pytest.mark.parametrize(("gone", "refusal"), [(0, Conflict("taken")), (1, HostRefused("broken"))])
def test_else_it_is_refused_at_once(gone: int, refusal: Exception) -> None:
    host = Host(gone, refusal)
    with pytest.raises(type(refusal)):
        host.publish("80")
    assert host.asked == 1
