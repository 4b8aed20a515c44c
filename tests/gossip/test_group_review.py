"""What a review of the groups' rounds found: each of these once went wrong."""

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.machine import Compute, Persist, Received, SendBulk, Started
from p2pfl.core.statements import (
    MAX_GROUP,
    Acknowledged,
    Advert,
    Content,
    Enrolment,
    Ready,
    Statement,
    Vote,
    decode_statement,
    encode_body,
)
from p2pfl.core.wire import MAX_MESSAGE_BYTES, Chunk, Message, Part, Proof, Want, encode_header
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.patience import Patience
from p2pfl.gossip.release import Terms, session_id, verified_release
from p2pfl.gossip.session import NO_SESSION, Outcome, Session
from tests.group_pump import FastKeyring, GroupPump, Node

EVERYBODY = frozenset(range(1, 5))


def signed(signer: int, content: Content) -> Statement:
    body = encode_body(content)
    return decode_statement(signer, body, FastKeyring(signer).sign(body))


def session_of_five() -> Session:
    """Return the session of member 0 in a group of five that bears one colluder."""
    pump = GroupPump(5)
    terms: Terms = pump.nodes[0].machine._plan.terms(Round(0))
    assert terms.group == (0, 1, 2, 3, 4)
    return Session(terms, FastKeyring(0), Patience(0.25, 1.0), 0.0)


def enrolment(terms: Terms, attempt: int, adverts: dict[int, Statement]) -> Enrolment:
    members = tuple(sorted(adverts))
    return Enrolment(terms.round, attempt, members, tuple(adverts[who].digest() for who in members))


def begin(session: Session) -> bytes:
    """Let all five begin a session, as member 0 sees it; return the session's 32 bytes."""
    terms, round = session.terms, session.terms.round
    session.trained(np.ones(terms.parameters, np.float32), 0.0)
    session.advance(0.0, EVERYBODY)
    adverts = {who: signed(who, Advert(round, 0, 0.0)) for who in terms.group}
    for who in EVERYBODY:
        session.told(adverts[who], 0.0)
    plan = enrolment(terms, 0, adverts)
    leader = min(terms.group, key=session._order)
    session.told(signed(leader or 1, plan), 0.0)
    identity = session_id(terms, plan)
    for who in EVERYBODY:
        session.told(signed(who, Ready(round, identity)), 0.0)
    return identity


def certify_another(session: Session, now: float) -> bytes:
    """Tell member 0 of a session of the other four that they certified."""
    terms, round = session.terms, session.terms.round
    adverts = {who: signed(who, Advert(round, 1, 0.0)) for who in EVERYBODY}
    plan = enrolment(terms, 1, adverts)
    identity = session_id(terms, plan)
    for statement in (signed(1, plan), *(signed(who, Vote(round, identity, plan.members)) for who in EVERYBODY)):
        session.told(statement, now)
    return identity


def wait_for_a_certificate(session: Session) -> float:
    """Let time pass until member 0 has given up its own session's certificate, just not concluded; return the time."""
    now = 0.0
    while "certify" not in session._at:
        at = session.wakes_at
        assert at is not None
        now = at
        session.advance(now, EVERYBODY)
    return session._at["certify"]


@pytest.mark.parametrize("late", ["uploading", "cut"])
def test_what_a_slow_disk_or_core_lets_through_late_goes_into_no_other_session(late: str) -> None:
    session = session_of_five()
    begin(session)
    assert [each for each in session.advance(0.0, EVERYBODY) if isinstance(each, Persist)]
    result: object = None
    if late == "cut":
        (compute,) = session.persisted("uploading")
        assert isinstance(compute, Compute)
        result = compute.work()
    now = wait_for_a_certificate(session)
    other = certify_another(session, now)
    session.advance(now, EVERYBODY)
    assert session.id == other
    assert session.enrolled == (1, 2, 3, 4)
    effects = session.computed("cut/1", result) if late == "cut" else session.persisted("uploading")
    assert not effects
    assert session.spent


@pytest.mark.parametrize("members", [64, 65, 100, 127, 128, 129, 1000])
def test_no_group_is_larger_than_a_statement_can_name(members: int) -> None:
    plan = GroupPump(5).nodes[0].machine._plan
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__}
    fields |= {"roster": tuple(map(str, range(members))), "names": tuple(map(str, range(members))), "group_size": 32}
    wide = GroupPlan(**fields)
    for round in (Round(0), Round(wide.rounds), Round(wide.rounds + 1)):
        sizes = [len(group) for group in wide.groups(round)]
        assert sum(sizes) == members
        assert max(sizes) <= MAX_GROUP
    assert (len(wide.groups(Round(wide.rounds))) == 1) == (members <= MAX_GROUP)


def run_until_done(pump: GroupPump) -> None:
    pump.run()
    last = [node.adopted[max(node.adopted)] for node in pump.nodes.values()]
    assert all(np.array_equal(each, last[0]) for each in last)


def test_a_vote_of_one_who_is_no_member_of_a_session_spoils_no_proof() -> None:
    pump = GroupPump(5, rounds=2)
    pump.slow = {4}
    pump.start()

    def meddle() -> bool:
        session = pump.nodes[0].machine._session
        if session is not None and session.survivors is not None and session.id != NO_SESSION:
            session.told(signed(4, Vote(Round(0), session.id, session.survivors)), pump.now)
        return bool(pump.nodes[0].rounds)

    pump.run(until=meddle)
    machine = pump.nodes[0].machine
    past = machine._past[Round(0)]
    assert 4 in past._statements.signed(Vote, past.id)
    plan = machine._plan
    released = verified_release(plan.all_terms(Round(0)), FastKeyring(1), past.proof())
    assert released.session == past.id


def test_an_advert_for_an_attempt_that_never_was_is_no_sign_of_taking_part() -> None:
    """Else one that always comes too late is waited for in every round."""
    session = session_of_five()
    session.told(signed(1, Advert(session.terms.round, 2, 0.0)), 0.0)
    session.told(signed(2, Advert(session.terms.round, 0, 0.0)), 0.0)
    assert (session.took_part(1), session.took_part(2)) == (False, True)


@pytest.mark.parametrize("signature", [64, 128])
def test_the_proof_of_the_largest_group_fits_into_a_message(signature: int) -> None:
    session = session_of_five()
    members = tuple(range(64))
    session._work.members, session._work.session, session.survivors = members, bytes(32), members
    for who in members:
        for content in (
            Vote(Round(0), bytes(32), members),
            Acknowledged(Round(0), bytes(32), members),
        ):
            body = encode_body(content)
            session._statements.add(decode_statement(who, body, bytes(signature)))
    votes = [each for each in session.proof() if isinstance(each.content, Vote)]
    assert len(votes) == 48
    results = 64 * (100 + signature)
    plan = 64 * 36 + signature
    assert len(encode_header(Proof(bytes(32), Round(0), tuple(votes)))) + results + plan <= MAX_MESSAGE_BYTES


def test_losing_all_links_for_a_moment_while_settling_ends_nothing() -> None:
    pump = GroupPump(4, rounds=1)
    pump.start()
    pump.run(until=lambda: pump.nodes[0].machine.round == 1)
    for other in (1, 2, 3):
        pump.part(0, other)
    pump.run(until=lambda: pump.now > 3.0 or pump.nodes[0].finished)
    assert not pump.nodes[0].finished
    for other in (1, 2, 3):
        if not pump.nodes[other].finished:
            pump.join(0, other)
    run_until_done(pump)
    assert pump.nodes[0].rounds[-1].outcome in (Outcome.FULL, Outcome.LATE)


def cut_off_for_some_rounds(pump: GroupPump) -> Node:
    pump.start()
    pump.run(until=lambda: pump.nodes[0].machine.round >= 2)
    for other in range(1, 8):
        pump.part(0, other)
    pump.run(until=lambda: pump.nodes[1].machine.round >= 8)
    for other in range(1, 8):
        pump.join(0, other)
    return pump.nodes[0]


@pytest.mark.parametrize("lost", [Want, Proof, Chunk])
def test_catching_up_does_not_hang_on_one_message_or_one_peer(lost: type) -> None:
    pump = GroupPump(8, rounds=12)
    gone: list[Message] = []

    def drop(sender: int, receiver: int, message: Message) -> bool:
        average = getattr(message, "part", Part.AVERAGE) is Part.AVERAGE
        hit = isinstance(message, lost) and average and 0 in (sender, receiver) and len(gone) < 3
        if hit:
            gone.append(message)
        return hit

    pump.drop = drop
    node = cut_off_for_some_rounds(pump)
    pump.run(until=lambda: node.machine.round >= 8 and node.machine._session is not None)
    assert gone
    assert any("caught up" in getattr(event, "text", "") for event in node.events)
    run_until_done(pump)


def test_asking_again_and_again_for_an_average_costs_nobody_a_copy_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pump = GroupPump(4, rounds=3)
    pump.start()
    pump.run(until=lambda: pump.nodes[0].machine.round == 2)
    copies = 0
    released = Session.released

    def counted(session: Session) -> object:
        nonlocal copies
        copies += 1
        return released(session)

    monkeypatch.setattr(Session, "released", counted)
    for _ in range(200):
        want = Want(pump.charter.hash(), Round(0), NO_SESSION, Part.AVERAGE, 0)
        pump.feed(0, Received(pump.roster[3], want))
        past = pump.nodes[0].machine._past[Round(1)]
        pump.feed(0, Received(pump.roster[3], Want(pump.charter.hash(), Round(1), past.id, Part.AVERAGE, 0)))
    assert copies < 10
    assert not [each for each in pump.queue if isinstance(each, SendBulk)]


@pytest.mark.parametrize("members", [1, 4])
def test_without_training_the_first_round_begins_with_the_last_link(members: int) -> None:
    pump = GroupPump(members, rounds=0)
    pump.start()
    pump.run()
    assert pump.now == 0.0
    assert all([record.outcome for record in node.rounds] == [Outcome.FULL] for node in pump.nodes.values())


def test_losing_all_links_when_the_start_is_over_ends_nothing() -> None:
    pump = GroupPump(4, rounds=1)
    pump.nodes[3].alive = False  # so that the others wait for it, until the deadline
    for place in range(3):
        pump.feed(place, Started())
        for other in range(place):
            pump.join(place, other)
    starts = pump.charter.deadlines.start
    pump.run(until=lambda: pump.now > starts - 5.0)
    for other in (1, 2):
        pump.part(0, other)
    pump.run(until=lambda: pump.now > starts)
    assert not pump.nodes[0].finished
    for other in (1, 2):
        pump.join(0, other)
    pump.run(limit=1000.0)
    assert all(pump.nodes[place].rounds[-1].outcome == Outcome.FULL for place in range(3))
