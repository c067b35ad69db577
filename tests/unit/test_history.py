"""The events that the daemon keeps, and those who follow them."""

from hypothesis import given
from hypothesis import strategies as st

from gangway.daemon.history import History, as_server_sent
from gangway.log import Event, event


def happened(number: int) -> Event:
    return event("counted", f"number {number}", {"number": number})


def numbers(events: list[Event]) -> list[object]:
    """Return the numbers of events; of one that says how many were missed, that number and a minus."""
    return [-int(one.fields["missed"]) if one.name == "missed" else one.fields["number"] for one in events]


def test_a_new_reader_gets_what_is_kept() -> None:
    history = History(3)
    assert history.after(None) == ([], 0)
    for number in range(5):
        history.add(happened(number))
    events, position = history.after(None)
    assert (numbers(events), position) == ([2, 3, 4], 5)
    assert history.after(position) == ([], 5)


def test_a_slow_reader_learns_how_many_events_it_has_missed() -> None:
    history = History(3)
    history.add(happened(0))
    _, position = history.after(None)
    for number in range(1, 8):
        history.add(happened(number))
    events, position = history.after(position)
    assert (numbers(events), position) == ([-4, 5, 6, 7], 8)
    assert events[0].text == "4 events were missed: they came faster than they were read"


def test_a_reader_that_waited_before_the_first_event_misses_none_silently() -> None:
    history = History(2)
    _, position = history.after(None)
    for number in range(4):
        history.add(happened(number))
    assert numbers(history.after(position)[0]) == [-2, 2, 3]


@given(steps=st.lists(st.integers(0, 300), max_size=12), size=st.integers(1, 250))
def test_every_event_is_read_once_or_counted_as_missed(steps: list[int], size: int) -> None:
    """Whenever a reader looks: what it got and what it missed are all events, in order."""
    history, position, seen, count = History(size), 0, list[object](), 0
    for added in [*steps, *[0] * 13]:  # 13 pages hold all that are kept
        for _ in range(added):
            history.add(happened(count))
            count += 1
        events, position = history.after(position)
        seen += numbers(events)
    reached = 0
    for one in seen:
        assert isinstance(one, int)
        if one < 0:
            reached -= one
        else:
            assert one == reached
            reached += 1
    assert reached == position == count


def test_whoever_waits_is_woken_once() -> None:
    history, woken = History(), list[str]()
    history.wake_after(0, lambda: woken.append("first"))
    forgotten = lambda: woken.append("forgotten")  # noqa: E731
    history.wake_after(0, forgotten)
    history.forget(forgotten)
    assert woken == []
    history.add(happened(0))
    history.add(happened(1))
    assert woken == ["first"]
    history.wake_after(1, lambda: woken.append("at once"))
    assert woken == ["first", "at once"]


def test_an_event_is_one_message_of_a_stream() -> None:
    sent = as_server_sent(event("refused", "line\nline", {"error": "data: {}\n\n"})).decode()
    assert sent.startswith('data: {"time": ')
    assert sent.endswith("}\n\n")
    assert sent.count("\n") == 2
