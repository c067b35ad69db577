"""Which published port a container's port answers for."""

from hypothesis import given

from gangway.facts import HostFacts
from gangway.firewall.nft.answers import Answers
from gangway.model import PortMapping, Protocol
from tests.unit.samples import APART, FACTS, mapping, planned, whole

ANY = planned(mapping("0.0.0.0", "8000", "80"))
OTHER = planned(mapping("0.0.0.0", "8001", "80"))
AT = planned(mapping("192.0.2.5", "8443", "443"))


def test_elements_of_each_kind() -> None:
    six = planned(mapping("::", "8000", "80"))
    assert Answers([ANY, AT, six]).elements() == {
        "answers4": ["172.30.0.2 . 80 : 8000"],
        "answers_at4": ["172.30.0.2 . 443 : 192.0.2.5 . 8443"],
        "answers6": ["fd30::2 . 80 : 8000"],
    }
    assert Answers([ANY, OTHER]).elements() == {"ambiguous4": ["172.30.0.2 . 80"]}


def test_a_second_mapping_makes_the_port_ambiguous_while_it_stays() -> None:
    answers = Answers([ANY])
    alone, both = {"answers4": ["172.30.0.2 . 80 : 8000"]}, {"ambiguous4": ["172.30.0.2 . 80"]}
    assert answers.change((), [OTHER]) == (alone, both)
    assert answers.change([ANY], ()) == (both, {"answers4": ["172.30.0.2 . 80 : 8001"]})
    assert answers.change([OTHER], [ANY]) == ({"answers4": ["172.30.0.2 . 80 : 8001"]}, alone)
    assert answers.change([ANY], ()) == (alone, {})


def test_udp_and_ranges_that_keep_their_ports_have_no_elements() -> None:
    udp, kept = mapping("0.0.0.0", "53", protocol=Protocol.UDP), mapping("0.0.0.0", "9000-9010")
    assert Answers([planned(udp), planned(kept)]).elements() == {}
    moved = planned(mapping("0.0.0.0", "70-71", "50-51"))
    assert Answers([moved]).elements() == {"answers4": ["172.30.0.2 . 50 : 70", "172.30.0.2 . 51 : 71"]}


@given(APART, APART, FACTS)
def test_a_change_is_the_difference(old: list[PortMapping], new: list[PortMapping], facts: HostFacts) -> None:
    before, after = whole(facts, *old).mappings, whole(facts, *new).mappings
    answers = Answers(before)
    deletes, adds = answers.change(before, after)
    former, current = (
        {(name, element) for name, found in one.items() for element in found}
        for one in (Answers(before).elements(), Answers(after).elements())
    )
    assert {(name, element) for name, found in deletes.items() for element in found} == former - current
    assert {(name, element) for name, found in adds.items() for element in found} == current - former
    assert {name: sorted(found) for name, found in answers.elements().items()} == {
        name: sorted(found) for name, found in Answers(after).elements().items()
    }
