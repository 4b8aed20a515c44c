"""Address records and hints: who is believed about where a member is."""

from dataclasses import replace

import pytest

from p2pfl.core.errors import BadSignature, NotAMember, WrongCharter
from p2pfl.core.ids import Seconds
from p2pfl.core.wire import MAX_ADDRESSES, Whereabouts, decode_header, encode_header
from p2pfl.node.discovery import LEAST_INTERVAL, MOST_HINTS, MOST_TOLD, Directory, sign_whereabouts
from tests.pump import identities

CHARTER = bytes(range(32))
ME, ANT, BEE, STRANGER = identities(4)
OLD, NEW, NEWER = "/ip4/192.0.2.1/tcp/4001", "/ip4/192.0.2.2/tcp/4001", "/dns4/bee.example/tcp/4001"
NOW, LATER = Seconds(0.0), Seconds(LEAST_INTERVAL)


@pytest.fixture
def directory() -> Directory:
    return Directory(ME.peer_id, CHARTER, {ANT.peer_id: (OLD,), BEE.peer_id: (OLD,)})


def record(sequence: int = 1, *addresses: str) -> Whereabouts:
    return sign_whereabouts(BEE, CHARTER, sequence, addresses or (NEW,))


def test_the_newest_record_comes_before_the_charter_and_that_before_the_lan(directory: Directory) -> None:
    assert directory.addresses(BEE.peer_id) == (OLD,)
    assert directory.hint(BEE.peer_id, "/ip4/10.0.0.1/tcp/1")
    assert directory.learn(record(), ANT.peer_id, NOW) == record()
    assert directory.addresses(BEE.peer_id) == (NEW, OLD, "/ip4/10.0.0.1/tcp/1")
    assert directory.addresses(ANT.peer_id) == (OLD,)
    assert directory.learn(record(2, NEWER, OLD), BEE.peer_id, LATER) is not None
    assert directory.addresses(BEE.peer_id) == (NEWER, OLD, "/ip4/10.0.0.1/tcp/1")


def test_an_older_record_or_the_same_again_is_no_news(directory: Directory) -> None:
    directory.learn(record(5), BEE.peer_id, NOW)
    for again in (record(5), record(5, NEWER), record(4, NEWER)):
        assert directory.learn(again, ANT.peer_id, Seconds(100.0)) is None
    assert directory.addresses(BEE.peer_id) == (NEW, OLD)


@pytest.mark.parametrize(
    "forged",
    [
        replace(record(), addresses=(NEWER,)),
        replace(record(), sequence=2),
        replace(record(), member=ANT.peer_id),
        replace(sign_whereabouts(ANT, CHARTER, 1, (NEW,)), member=BEE.peer_id),
        replace(sign_whereabouts(BEE, bytes(32), 1, (NEW,)), charter=CHARTER),
        replace(record(), signature=bytes(64)),
    ],
    ids=["address", "sequence", "member", "signer", "charter", "signature"],
)
def test_a_record_that_its_member_did_not_sign_costs_who_sent_it(directory: Directory, forged: Whereabouts) -> None:
    with pytest.raises(BadSignature) as raised:
        directory.learn(forged, ANT.peer_id, NOW)
    assert raised.value.peer == ANT.peer_id
    assert directory.addresses(BEE.peer_id) == (OLD,)


def test_another_charter_and_a_stranger_cost_who_sent_them(directory: Directory) -> None:
    with pytest.raises(WrongCharter):
        directory.learn(sign_whereabouts(BEE, bytes(32), 1, (NEW,)), BEE.peer_id, NOW)
    with pytest.raises(NotAMember):
        directory.learn(sign_whereabouts(STRANGER, CHARTER, 1, (NEW,)), BEE.peer_id, NOW)


def test_a_member_that_moves_all_the_time_is_heard_now_and_then(directory: Directory) -> None:
    news = [directory.learn(record(n), BEE.peer_id, Seconds(n / 10)) for n in range(100)]
    assert len([each for each in news if each is not None]) == 2


def test_its_own_record_of_a_former_life_is_outbid() -> None:
    directory = Directory(
        ME.peer_id, CHARTER, {BEE.peer_id: (OLD,)}, lambda number: sign_whereabouts(ME, CHARTER, number, (NEW,)), 7
    )
    assert [each.sequence for each in directory.records()] == [7]
    assert directory.learn(sign_whereabouts(ME, CHARTER, 7, (OLD,)), BEE.peer_id, NOW) is None
    answer = directory.learn(sign_whereabouts(ME, CHARTER, 9, (OLD,)), BEE.peer_id, NOW)
    assert answer == sign_whereabouts(ME, CHARTER, 10, (NEW,))
    assert directory.records() == [answer]


def test_a_peer_that_did_not_move_leaves_its_old_record_alone(directory: Directory) -> None:
    assert directory.learn(sign_whereabouts(ME, CHARTER, 9, (OLD,)), BEE.peer_id, NOW) is None
    assert directory.records() == []


def test_what_is_kept_and_told_is_bounded() -> None:
    many = identities(MOST_TOLD + 40)
    directory = Directory(many[0].peer_id, CHARTER, {each.peer_id: (OLD,) for each in many[1:]})
    for number, each in enumerate(many[1:]):
        directory.learn(sign_whereabouts(each, CHARTER, number, (NEW,)), each.peer_id, NOW)
    told = directory.records()
    assert [each.sequence for each in told] == list(range(len(many) - 2, len(many) - 2 - MOST_TOLD, -1))
    for number in range(100):
        directory.hint(many[1].peer_id, f"/ip4/10.0.0.{number}/tcp/1")
    assert len(directory.addresses(many[1].peer_id)) == 2 + MOST_HINTS
    assert not directory.hint(STRANGER.peer_id if STRANGER not in many else "12D3", NEW)  # type: ignore[arg-type]


def test_a_record_fits_the_wire_however_many_addresses_there_are() -> None:
    made = sign_whereabouts(BEE, CHARTER, 3, [f"/ip4/192.0.2.{n}/tcp/4001" for n in range(20)])
    assert len(made.addresses) == MAX_ADDRESSES
    assert decode_header(encode_header(made)[2:]) == made
