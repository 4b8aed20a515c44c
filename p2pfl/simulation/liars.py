"""Peers that lie: a machine in a wrapper that falsifies what goes in or comes out.

They know the messages, and no protocol's rules.
"""

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.machine import Effect, Input, Machine, Payload, Send, SendBulk, Trained
from p2pfl.core.statements import Content, Statement, Vote, encode_body
from p2pfl.core.wire import Hello, Ping, Told
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
        self.truth: list[Effect] = []
        """What the machine answered to the last input, before any lie."""

    def handle(self, input: Input, now: Seconds) -> list[Effect]:
        """Take one input; see `p2pfl.core.machine.Machine`."""
        lying = self._clock() >= self._lie.at
        if lying and self._lie.how == "poison" and isinstance(input, Trained):
            input = replace(input, vector=_nan(input.vector))
        effects = self._machine.handle(input, now)
        self.truth = self._machine.truth if isinstance(self._machine, LyingMachine) else effects
        return self._tell(self, effects) if lying else effects

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


LIES: dict[str, Callable[[LyingMachine, list[Effect]], list[Effect]]] = {
    "replay": _replay,
    "nan": _send_nan,
    "poison": _poison,
    "future": _run_ahead,
    "flip": _flip_bits,
    "split": _split_view,
    "mute": _fall_silent,
    "equivocate": _equivocate,
}
"""replay: sends old messages again. nan: payloads of NaN. poison: trains to NaN. future: claims to be 1000 rounds
ahead. flip: a wrong bit in each payload and signature. split: tells some peers nothing but signs of life. mute: falls
silent. equivocate: signs other survivors for some peers."""
