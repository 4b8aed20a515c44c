"""What a neighbor may cost this peer's network loop and memory; who exceeds it waits, and is not disconnected.

Waiting is not reading: the muxer's windows fill, and whoever sends more than its share is slowed down at its own end.
Owns the arithmetic and the waiting. Knows no message: what costs how much is said by whoever reads.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from p2pfl.core.wire import Message, payload_length
from p2pfl.gossip.traffic import LEAST_RATE

RATE, BURST = 1000.0, 2000.0
"""Cost that a neighbor may cause in a second, on and on, and at once. A message costs 1, which is 0.05 ms of the loop:
so 5 % of it. A measurement of honest needs: members of a group without training, as fast as they can, send each other
10 messages in a round, at 30 rounds a second."""
HEADER_BYTES = 512
"""Bytes of a header that cost 1 to decode; a measurement: a proof of 27 KB takes 3 ms."""
SKIPPED_BYTES = 20 * 1024
"""Bytes of a refused payload that cost 1 to receive, at 400 MB/s."""
FRAME_COST, OPEN_COST = 1 / 32, 1.0
"""Of a frame of the muxer, and of one that opens a stream; measured."""
CONNECTION_RATE, CONNECTION_BURST = 500.0, 500.0
"""What the frames of one connection may cost: 16,000 in a second, or 4 GB in frames of 256 KiB. Less at once than
setting up a few connections costs, so that nobody dials for another burst."""
SLICE = 16.0
"""Cost after which others get their turn in the loop: a lane with bytes to read does not wait by itself."""
REST = 0.05
"""Seconds' worth of budget to save up before reading on: waking up for each message would cost as much as the message.
A guess."""

SEND_SECONDS = 60.0
"""Seconds, beside the time its bytes take at the least rate, in which a frame must leave; as long as a record may take
to enter the socket (`p2pfl.node.libp2p.records.SEND_DEADLINE`)."""
RECEIVE_SECONDS = 20.0
"""The same for an accepted payload to come; a guess: the charter's default of silence."""

MOST_RECEIVING = 1 << 30
"""Bytes of accepted payloads that may be under way from all neighbors at once; a guess: a laptop has 8 GiB."""
LEAST_PAYLOADS = 4
"""Payloads that may be under way at once however large they are, so that three that drip keep nobody waiting."""


def send_seconds(message: Message) -> float:
    """Return how long a frame may take to leave."""
    return SEND_SECONDS + payload_length(message) / LEAST_RATE


def receive_seconds(message: Message) -> float:
    """Return how long the payload of a message may take to come."""
    return RECEIVE_SECONDS + payload_length(message) / LEAST_RATE


class Allowance:
    """A bucket of tokens: what a neighbor, or a connection, may cost the loop.

    Args:
        rate: cost in a second, on and on.
        burst: cost at once.
    """

    def __init__(self, rate: float = RATE, burst: float = BURST) -> None:
        self._rate, self._burst = rate, burst
        self._left, self._at, self._slice = burst, 0.0, 0.0

    def note(self, cost: float) -> bool:
        """Take note of a cost; return whether it is time to `rest`."""
        self._slice += cost
        return self._slice >= SLICE

    async def rest(self) -> None:
        """Let others have their turn; wait where the cost has been too much."""
        now = trio.current_time()
        self._left = min(self._burst, self._left + (now - self._at) * self._rate) - self._slice
        self._at, self._slice = now, 0.0
        if self._left > 0:
            await trio.lowlevel.checkpoint()
        else:
            await trio.sleep(REST - self._left / self._rate)

    async def spend(self, cost: float) -> None:
        """Take note of a cost, and rest when it is time to."""
        if self.note(cost):
            await self.rest()


class ReceiveCredit:
    """Bounds the memory of payloads that are accepted and have not come whole, over all neighbors."""

    def __init__(self) -> None:
        self.used = 0
        self._turn = trio.Lock()
        self._freed = trio.Event()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Hold credit for `size` bytes, waiting for it; who comes first is served first."""
        async with self._turn:
            while self.used + size > max(MOST_RECEIVING, LEAST_PAYLOADS * size):
                await self._freed.wait()
            self.used += size
        try:
            yield
        finally:
            self.used -= size
            self._freed.set()
            self._freed = trio.Event()
