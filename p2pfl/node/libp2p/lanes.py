"""Lanes over a muxer's streams: one-way, exact, and with our errors only.

Owns what a lane promises (`p2pfl.node.transport`). Knows of a muxer only `Muxer`, so that one can be exchanged.
"""

import contextlib
from typing import Any, Protocol

import trio
from libp2p.network.stream.net_stream import NetStream

from p2pfl.core.errors import StreamReset
from p2pfl.core.ids import PeerId

CLOSE_DEADLINE = 5.0
"""Seconds a clean close waits for the reader to reach the end; a guess."""

RESET_DEADLINE = 1.0
"""Seconds spent on telling the other end of a reset; a guess."""


class Muxer(Protocol):
    """What a lane needs of the connection its stream belongs to."""

    async def send(self, stream: Any, data: memoryview) -> None:
        """Send all of `data`, each frame whole whatever is cancelled; raise where the stream is broken."""

    async def receive_into(self, stream: Any, view: memoryview) -> int:
        """Put at least one byte into `view`; 0 at a clean end; raise where the stream is broken.

        Cancelling loses no byte: where some are in `view` already, the stream breaks.
        """

    async def abandon(self, stream: Any) -> None:
        """Reset the stream, and wake whoever reads it here."""


class _Lane:
    """What both ends share: the stream, who is beyond it, and whether it still stands."""

    def __init__(self, peer: PeerId, stream: NetStream) -> None:
        self._peer = peer
        self._stream = stream
        self._raw = stream.muxed_stream
        self._muxer: Muxer = stream.muxed_conn
        self._over = False
        self._ended = False

    @property
    def peer(self) -> PeerId:
        """Who is at the other end, as the security handshake proved."""
        return self._peer

    async def reset(self) -> None:
        """Abandon the lane at once. Never raises; finished even when cancelled."""
        if self._over:
            return
        self._over = True
        # What goes wrong here says that the connection is gone, and the lane with it.
        with trio.CancelScope(shield=True), trio.move_on_after(RESET_DEADLINE), contextlib.suppress(Exception):
            await self._muxer.abandon(self._raw)
            await self._stream.reset()

    async def _send_end(self) -> None:
        # What goes wrong here the other end learns from the end of the connection.
        with trio.CancelScope(shield=True), trio.move_on_after(RESET_DEADLINE), contextlib.suppress(Exception):
            await self._stream.close()

    def _broken(self) -> StreamReset:
        return StreamReset(f"{self._peer}: the stream broke; connect to the peer again")


class StreamOutgoingLane(_Lane):
    """See `p2pfl.node.transport.OutgoingLane`."""

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send all of `data`, without copying it first. Cancelling resets the lane, never the connection.

        Raises:
            StreamReset: the lane is broken; nothing is known of what was sent before.
        """
        if self._over:
            raise self._broken()
        try:
            await self._muxer.send(self._raw, memoryview(data).cast("B"))
        except Exception as error:
            await self.reset()
            raise self._broken() from error
        except BaseException:  # cancelled: part of `data` may be out
            await self.reset()
            raise

    async def close(self) -> None:
        """End the lane, and wait until the reader has read to the end, `CLOSE_DEADLINE` seconds at most.

        Without the wait libp2p's own muxer at the other end would drop what its reader had not asked for yet. Ours
        would not, but with the wait the end says that everything arrived. Never raises.
        """
        if self._over:
            return
        self._over = True
        await self._send_end()
        with trio.move_on_after(CLOSE_DEADLINE):
            with contextlib.suppress(Exception):  # reset, or the stream forgotten after both ends closed: as over
                await self._muxer.receive_into(self._raw, memoryview(bytearray(1)))


class StreamIncomingLane(_Lane):
    """See `p2pfl.node.transport.IncomingLane`.

    A clean end says that the peer closed its lane, nothing about whether it had said all it meant to: a peer can
    end between any two frames. A reset by the peer and a lost connection are both `StreamReset`. The framing above
    carries lengths and hashes, and acknowledges.
    """

    async def read_into(self, view: memoryview) -> bool:
        """Fill `view` whole, with one copy per byte. Cancelling after its first byte breaks the lane.

        Returns:
            True when filled; False when the lane ended cleanly before its first byte.

        Raises:
            StreamReset: the lane broke, or ended in the middle.
        """
        if self._ended:
            return False
        if self._over:
            raise self._broken()
        filled = 0
        try:
            while filled < len(view):
                size = await self._muxer.receive_into(self._raw, view[filled:])
                if size == 0:
                    break
                filled += size
        except Exception as error:
            await self.reset()
            raise self._broken() from error
        except BaseException:
            if filled:
                await self.reset()
            raise
        return filled == len(view) or await self._end(filled)

    async def _end(self, filled: int) -> bool:
        """Answer the peer's end with ours, which is what its `close` waits for.

        Raises:
            StreamReset: it ended in the middle.
        """
        if filled:
            await self.reset()
            raise self._broken()
        self._over = self._ended = True
        await self._send_end()
        return False


class StreamTalk(StreamIncomingLane, StreamOutgoingLane):
    """See `p2pfl.node.transport.Talk`: both directions of one stream. After the other end's end nothing is written."""
