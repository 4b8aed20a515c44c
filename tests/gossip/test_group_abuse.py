"""What a member may send, right or wrong, at any moment: it costs at most its link, and the others go on."""

import random

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.machine import AcceptBulk, BulkOffered, BulkReceived, Disconnect, Received, RefuseBulk
from p2pfl.core.statements import (
    KINDS,
    Acknowledged,
    Advert,
    Challenge,
    Content,
    Enrolment,
    Products,
    Proposal,
    Ready,
    Result,
    Roots,
    SecondProducts,
    Statement,
    Vote,
    decode_statement,
    encode_body,
)
from p2pfl.core.wire import Bye, Chunk, Have, Hello, Message, Part, Ping, Proof, Told, Update, Want
from p2pfl.gossip.group_machine import BURST
from tests.group_pump import FastKeyring, GroupPump

MEMBERS = 6


class Mischief:
    """Draws messages of all kinds, from what it has seen and from nowhere."""

    def __init__(self, pump: GroupPump, seed: int) -> None:
        self.pump, self.draw = pump, random.Random(seed)
        self.sessions = [bytes(32)]
        self.digests = [bytes(32)]

    def watch(self, sender: int, receiver: int, message: Message) -> bool:
        if isinstance(message, Told):
            content = message.statement.content
            self.sessions.append(getattr(content, "session", bytes(32)))
            self.digests.append(message.statement.digest())
        return False

    def places(self) -> tuple[int, ...]:
        return tuple(sorted(self.draw.sample(range(MEMBERS + 2), self.draw.randint(0, MEMBERS))))

    def content(self, round: Round) -> Content:
        draw, session = self.draw, self.draw.choice(self.sessions)
        digests = tuple(draw.choice(self.digests) for _ in range(draw.randint(0, MEMBERS)))
        attempt = draw.randint(0, 2)
        return draw.choice([
            Advert(round, attempt, draw.choice([0.0, 1.0, 1e6])),
            Enrolment(round, attempt, self.places(), digests),
            Ready(round, session),
            Roots(round, session, digests),
            Acknowledged(round, session, self.places()),
            Proposal(round, session, self.places(), self.places()),
            Vote(round, session, self.places()),
            Result(round, session, draw.randint(0, 7), draw.choice(self.digests)),
            Challenge(round, session, digests, draw.choice(self.digests), draw.getrandbits(8)),
            Products(round, session, digests, tuple(each[:5] for each in digests)),
            SecondProducts(round, session, digests, ()),
        ])  # fmt: skip

    def statement(self, signer: int, round: Round) -> Statement:
        body = encode_body(self.content(round))
        named = signer if self.draw.random() < 0.8 else self.draw.randint(0, MEMBERS + 2)
        return decode_statement(named, body, FastKeyring(signer).sign(body))

    def message(self, sender: int) -> Message:
        draw, charter = self.draw, self.pump.charter.hash()
        round = Round(max(0, self.pump.nodes[0].machine.round + draw.randint(-3, 4)))
        session, chunk = draw.choice(self.sessions), draw.randint(0, 7)
        masks = tuple(draw.getrandbits(8) for _ in KINDS)
        length = draw.choice([4, 8, 12, 16, 40, 4000])
        return draw.choice([
            Hello(charter, round),
            Ping(charter, round),
            Bye(charter, round),
            Update(charter, round, 40, 0.0, True),
            Told(charter, round, self.statement(sender, round)),
            Told(charter, round, self.statement(sender, round)),
            Have(charter, round, draw.randint(0, 2), session, masks),
            Want(charter, round, session, draw.choice(list(Part)), chunk),
            Chunk(charter, round, session, draw.choice(list(Part)), chunk, length),
            Proof(charter, round, tuple(self.statement(sender, round) for _ in range(draw.randint(0, 4)))),
        ])  # fmt: skip


@pytest.mark.parametrize("seed", range(16))
def test_whatever_a_member_sends_is_handled_and_the_others_finish(seed: int) -> None:
    pump = GroupPump(MEMBERS, rounds=3)
    mischief = Mischief(pump, seed)
    pump.drop = mischief.watch
    liar = 5
    pump.start()

    def inject() -> bool:
        for _ in range(mischief.draw.random() < 0.2):
            receiver, message = mischief.draw.randrange(MEMBERS - 1), mischief.message(liar)
            if not pump.nodes[receiver].alive or pump.nodes[receiver].finished:
                continue
            peer = pump.roster[liar]
            if not isinstance(message, Chunk | Update):
                pump.feed(receiver, Received(peer, message))
                continue
            answers = pump.feed(receiver, BulkOffered(peer, message))
            verdicts = [each for each in answers if isinstance(each, AcceptBulk | RefuseBulk | Disconnect)]
            assert len(verdicts) == 1
            if isinstance(verdicts[0], AcceptBulk):
                noise = np.array(
                    [mischief.draw.choice([0.0, 1.0, np.nan, np.inf, -1.0])] * (message.length // 4), "<f4"
                )
                pump.feed(receiver, BulkReceived(peer, message, bytearray(noise.tobytes())))
        return all(pump.nodes[place].finished for place in range(MEMBERS - 1))

    pump.run(until=inject, limit=5000)
    for place in range(MEMBERS - 1):
        assert pump.nodes[place].error is None
        assert pump.nodes[place].machine.held < 1500
        assert all(np.isfinite(vector).all() for vector in pump.nodes[place].adopted.values())


def test_a_flood_of_statements_costs_the_flooder_its_words_and_nobody_memory() -> None:
    pump = GroupPump(4, rounds=2)
    mischief = Mischief(pump, 1)
    pump.start()
    pump.run(until=lambda: pump.nodes[0].machine.round == 1)
    checked = 0
    verify = FastKeyring.verify

    class Counting(FastKeyring):
        def verify(self, signer: int, body: bytes, signature: bytes) -> None:
            nonlocal checked
            checked += 1
            verify(self, signer, body, signature)

    pump.nodes[0].machine._keyring = Counting(0)
    session = pump.nodes[0].machine._session
    assert session is not None
    session._keyring = Counting(0)
    charter = pump.charter.hash()
    before = pump.nodes[0].machine.held
    for number in range(20_000):
        body = encode_body(Ready(Round(1), number.to_bytes(32, "big")))
        statement = decode_statement(3, body, FastKeyring(3).sign(body))
        pump.feed(0, Received(pump.roster[3], Told(charter, Round(1), statement)))
    assert checked <= BURST + 1
    assert pump.nodes[0].machine.held - before < 30
    pump.run()
    assert not mischief.sessions[1:]
    assert all(node.error is None for node in pump.nodes.values())
