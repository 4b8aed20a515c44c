"""Peers that lie: a machine in a wrapper that falsifies what goes in or comes out.

They know the messages, and no protocol's rules.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.machine import Compute, Effect, Input, Machine, Payload, Received, Send, SendBulk, Trained, Vector
from p2pfl.core.statements import (
    Acknowledged,
    Advert,
    Challenge,
    Content,
    Enrolment,
    Products,
    Proposal,
    Result,
    Statement,
    Vote,
    encode_body,
)
from p2pfl.core.wire import Chunk, Hello, Part, Ping, Told
from p2pfl.gossip.chunks import digest
from p2pfl.simulation.faults import Lie

Sign = Callable[[bytes], bytes]
FAR_AHEAD = 1000
"""Rounds by which `future` runs ahead."""
OLD_MESSAGES = 50
"""How many of its last messages `replay` draws from."""


class LyingMachine:
    """`machine`, but that it lies as `lie` says once its time has come.

    Args:
        against: whom it lies to.
        sign: makes its signatures; None where its protocol has none.
        clock: tells the virtual time, in which the lie's beginning is given.
        draw: for what the lie leaves open.
    """

    def __init__(
        self,
        machine: Machine,
        lie: Lie,
        against: frozenset[PeerId],
        sign: Sign | None,
        clock: Callable[[], float],
        draw: random.Random,
    ) -> None:
        self._machine, self._lie, self.against, self.sign, self._clock, self.draw = (
            machine,
            lie,
            against,
            sign,
            clock,
            draw,
        )
        self._tell = LIES[lie.how]
        self.stage = lie.stage
        self.sent: deque[Effect] = deque(maxlen=OLD_MESSAGES)
        self.silent = False
        self.members: tuple[int, ...] = ()
        """Of the last session that it heard of."""
        self.right: dict[bytes, Payload] = {}
        """Of the digests of sums that it falsified, the right ones."""
        self.truth: list[Effect] = []
        """What the machine answered to the last input, before any lie."""

    def handle(self, input: Input, now: Seconds) -> list[Effect]:
        """Take one input; see `p2pfl.core.machine.Machine`."""
        lying = self._clock() >= self._lie.at
        if lying and self._lie.how == "poison" and isinstance(input, Trained):
            input = replace(input, vector=_nan(input.vector))
        effects = self._machine.handle(input, now)
        self._note_members([input, *effects])
        inner = self._machine.truth if isinstance(self._machine, LyingMachine) else effects
        self.truth = [self._put_right(effect) for effect in inner] if self.right else inner
        return self._tell(self, effects) if lying else effects

    def _put_right(self, effect: Effect) -> Effect:
        if not isinstance(effect, SendBulk):
            return effect
        return replace(effect, payload=self.right.get(digest(effect.payload), effect.payload))

    def _note_members(self, happened: Sequence[Input | Effect]) -> None:
        for each in happened:
            message = each.message if isinstance(each, Received | Send) else None
            if isinstance(message, Told) and isinstance(message.statement.content, Enrolment):
                self.members = message.statement.content.members

    @property
    def contribution(self) -> Vector | None:
        """What its machine averages in its round; see `p2pfl.simulation.invariants.Standing`."""
        vector: Vector | None = getattr(self._machine, "contribution", None)
        return vector

    @property
    def changed_from(self) -> Vector | None:
        """The base that its contribution is the change from; see `p2pfl.simulation.invariants.Standing`."""
        base: Vector | None = getattr(self._machine, "changed_from", None)
        return base

    def is_against(self, peer: PeerId) -> bool:
        """Return whether `peer` is lied to."""
        return not self.against or peer in self.against


def _nan(vector: np.ndarray[Any, np.dtype[np.float32]]) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.full_like(vector, np.nan)


def _each_message(effects: Sequence[Effect], change: Callable[[Send | SendBulk], list[Effect]]) -> list[Effect]:
    return [new for effect in effects for new in (change(effect) if isinstance(effect, Send | SendBulk) else [effect])]


def _replay(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    liar.sent.extend(effect for effect in effects if isinstance(effect, Send | SendBulk))
    again = [liar.draw.choice(liar.sent)] if liar.sent and liar.draw.random() < 0.3 else []
    return [*effects, *again]


def _send_nan(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    del liar
    return [
        replace(effect, payload=_spoiled(effect.payload)) if isinstance(effect, SendBulk) else effect
        for effect in effects
    ]


def _spoiled(payload: Payload) -> Payload:
    """Return nothing but NaN; of masked words, in which there is none, the complement."""
    return ~np.asarray(payload, np.uint8) if payload.dtype == np.uint8 else np.full_like(payload, np.nan)


def _poison(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    del liar
    return effects


def _resigned(liar: LyingMachine, told: Told, content: Content) -> Told:
    """Return `told` with another content, signed by the liar where it has the means."""
    body = encode_body(content)
    signature = liar.sign(body) if liar.sign is not None else told.statement.signature
    return replace(told, statement=Statement(told.statement.signer, body, signature, content))


def _run_ahead(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(effect: Send | SendBulk) -> list[Effect]:
        message = effect.message
        later = Round(message.round + FAR_AHEAD)
        if isinstance(message, Told):
            message = _resigned(liar, message, replace(message.statement.content, round=later))
        return [replace(effect, message=replace(message, round=later))]

    return _each_message(effects, change)


def _flip_bits(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(effect: Send | SendBulk) -> list[Effect]:
        if isinstance(effect, SendBulk):
            flipped = bytearray(effect.payload.tobytes())
            flipped[liar.draw.randrange(len(flipped))] ^= 1 << liar.draw.randrange(8)
            return [replace(effect, payload=np.frombuffer(flipped, np.float32))]
        if isinstance(effect.message, Told):
            statement = effect.message.statement
            wrong = bytes([statement.signature[0] ^ 1]) + statement.signature[1:] if statement.signature else b"?"
            return [replace(effect, message=replace(effect.message, statement=replace(statement, signature=wrong)))]
        return [effect]

    return _each_message(effects, change)


def _split_view(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(effect: Send | SendBulk) -> list[Effect]:
        if isinstance(effect, Send):
            return [] if liar.is_against(effect.peer) and not isinstance(effect.message, Hello | Ping) else [effect]
        others = tuple(peer for peer in effect.peers if not liar.is_against(peer))
        return [replace(effect, peers=others)] if others else []

    return _each_message(effects, change)


def _fall_silent(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(effect: Send | SendBulk) -> list[Effect]:
        if isinstance(effect.message, Hello | Ping):
            return [effect]
        if liar.silent or not liar.stage:
            return []
        if isinstance(effect.message, Told) and type(effect.message.statement.content).__name__ == liar.stage:
            liar.silent = True  # so only the first of those to be told hears it
        return [effect]

    return _each_message(effects, change)


def _equivocate(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(effect: Send | SendBulk) -> list[Effect]:
        message = effect.message
        if isinstance(effect, SendBulk) or not isinstance(message, Told) or not liar.is_against(effect.peer):
            return [effect]
        content = message.statement.content
        if not isinstance(content, Vote) or len(content.survivors) < 2:
            return [effect]
        fewer = replace(content, survivors=content.survivors[1:])
        return [Send(effect.peer, _resigned(liar, message, fewer))]

    return _each_message(effects, change)


def _each_own(liar: LyingMachine, effects: list[Effect], change: Callable[[Send, Content], Content]) -> list[Effect]:
    """Return the effects with another content, signed again, in what is told to those that are lied to."""

    def told(effect: Send | SendBulk) -> list[Effect]:
        message = effect.message
        if not isinstance(effect, Send) or not isinstance(message, Told) or not liar.is_against(effect.peer):
            return [effect]
        statement, content = message.statement, message.statement.content
        if liar.sign is None or liar.sign(statement.body) != statement.signature:
            return [effect]  # somebody else's, passed on
        other = change(effect, content)
        return [effect] if other is content else [Send(effect.peer, _resigned(liar, message, other))]

    return _each_message(effects, told)


def _name_fewer(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(effect: Send, content: Content) -> Content:
        del effect
        return replace(content, uploaders=content.uploaders[1:]) if isinstance(content, Acknowledged) else content

    return _each_own(liar, effects, change)


def _name_more(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(effect: Send, content: Content) -> Content:
        del effect
        return replace(content, uploaders=liar.members) if isinstance(content, Acknowledged) else content

    return _each_own(liar, effects, change)


def _forge(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(effect: Send | SendBulk) -> list[Effect]:
        message = effect.message
        if not isinstance(effect, Send) or not isinstance(message, Told):
            return [effect]
        statement, content = message.statement, message.statement.content
        if not isinstance(content, Advert):
            return [effect]
        keys = bytes(reversed(content.keys))
        forged = _resigned(liar, message, replace(content, keys=keys))
        other = replace(forged.statement, signer=statement.signer ^ 1)
        return [effect, Send(effect.peer, replace(forged, statement=other))]

    return _each_message(effects, change)


def _send_stale(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    sent = [effect for effect in effects if isinstance(effect, Send | SendBulk)]
    liar.sent.extend(sent[: OLD_MESSAGES - len(liar.sent)])
    old = [each for each in liar.sent if isinstance(each, Send | SendBulk) and sent]
    old = [each for each in old if each.message.round < sent[-1].message.round]
    return [*effects, liar.draw.choice(old)] if old and liar.draw.random() < 0.5 else effects


def _two_sets(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def fewer(places: tuple[int, ...]) -> tuple[int, ...]:
        return places[:-1] if len(places) > 1 else places

    def change(effect: Send, content: Content) -> Content:
        del effect
        match content:
            case Acknowledged():
                return replace(content, uploaders=fewer(content.uploaders))
            case Proposal() | Vote():
                return replace(content, survivors=fewer(content.survivors))
        return content

    return _each_own(liar, effects, change)


def _withhold(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    del liar

    def change(effect: Send | SendBulk) -> list[Effect]:
        message = effect.message
        told = isinstance(message, Told) and isinstance(message.statement.content, Result)
        sent = isinstance(message, Chunk) and message.part is Part.RESULT
        return [] if told or sent else [effect]

    return _each_message(effects, change)


def _change_sums(liar: LyingMachine, effects: list[Effect], change: Callable[[Payload], Payload]) -> list[Effect]:
    """Return the effects with other sums of chunks, which the machine then takes for its own, signs and sends."""

    def wrong(work: Callable[[], object]) -> object:
        made = work()
        if not isinstance(made, tuple):
            return made
        payload = change(made[0])
        liar.right[digest(payload)] = made[0]
        return payload, digest(payload)

    return [
        replace(effect, work=partial(wrong, effect.work))
        if isinstance(effect, Compute) and "reduce" in effect.key.split("/")
        else effect
        for effect in effects
    ]


def _falsify(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(payload: Payload) -> Payload:
        wrong = payload.copy()
        if payload.dtype == np.uint8:
            wrong[-1:] += 1  # wraps; a word's highest byte: far from the sum, and nothing forbids it
        return wrong

    return _change_sums(liar, effects, change)


def _falsify_and_hush(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    def change(effect: Send | SendBulk) -> list[Effect]:
        told = effect.message.statement.content if isinstance(effect.message, Told) else None
        return [] if isinstance(told, Challenge | Products) else [effect]

    return _each_message(_falsify(liar, effects), change)


def _wreck(liar: LyingMachine, effects: list[Effect]) -> list[Effect]:
    return _change_sums(liar, effects, _spoiled)


LIES: dict[str, Callable[[LyingMachine, list[Effect]], list[Effect]]] = {
    "replay": _replay,
    "nan": _send_nan,
    "poison": _poison,
    "future": _run_ahead,
    "flip": _flip_bits,
    "split": _split_view,
    "mute": _fall_silent,
    "equivocate": _equivocate,
    "fewer": _name_fewer,
    "more": _name_more,
    "forge": _forge,
    "stale": _send_stale,
    "two sets": _two_sets,
    "withhold": _withhold,
    "falsify": _falsify,
    "hush": _falsify_and_hush,
    "wreck": _wreck,
}
"""replay: sends old messages again. nan: payloads of NaN. poison: trains to NaN. future: claims to be 1000 rounds
ahead. flip: a wrong bit in each payload and signature. split: tells some peers nothing but signs of life. mute: falls
silent. equivocate: signs other survivors for some peers. fewer, more: acknowledges less than it holds, or all members.
forge: sends an advert in another's name, too. stale: sends messages of earlier rounds again. two sets: acknowledges,
proposes and votes otherwise for some peers. withhold: says nothing of its result. falsify: makes a wrong sum under
masks, and signs it. hush: likewise, and says nothing where sums are checked. wreck: makes one of nonsense."""
