"""Who may hold a connection: the roster, asked the moment a handshake has proved a peer's identity.

Wraps any security transport. Knows no streams, and decides nothing from what a peer merely claims.
"""

import os
from collections.abc import Collection

from libp2p.abc import IRawConnection, ISecureConn, ISecureTransport
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.transport.exceptions import MuxerUpgradeFailure

from p2pfl.core.errors import RemoteError
from p2pfl.core.ids import PeerId
from p2pfl.node.libp2p.tcp import SocketConnection
from p2pfl.node.transport import RefusalHandler


class RosterGate(ISecureTransport):
    """A security transport that closes what it secured unless the roster lists who is there."""

    def __init__(
        self, inner: ISecureTransport, own: PeerId, roster: Collection[PeerId], on_refused: RefusalHandler
    ) -> None:
        self._inner = inner
        self._own = own
        self._roster = roster
        self._on_refused = on_refused

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Answer a handshake.

        Raises:
            HandshakeFailure: the peer is refused, or the handshake failed.
        """
        return await self._admit(conn, await self._inner.secure_inbound(conn))

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Begin a handshake with `peer_id`.

        Raises:
            HandshakeFailure: the peer is refused or another one, or the handshake failed.
        """
        return await self._admit(conn, await self._inner.secure_outbound(conn, peer_id))

    async def _admit(self, conn: IRawConnection, secured: ISecureConn) -> ISecureConn:
        peer = PeerId(str(secured.get_remote_peer()))
        reason = self._objection(peer)
        if reason is not None:
            self._on_refused(peer, reason)
            await secured.close()
            raise HandshakeFailure(f"{peer} {reason}")
        socket = conn.stream
        if isinstance(socket, SocketConnection):
            socket.admit(peer)
        return secured

    def _objection(self, peer: PeerId) -> str | None:
        if peer == self._own:
            return "has our own identity: is the same key in use twice?"
        if peer not in self._roster:
            return "is not on the roster"
        return None


def explain(error: BaseException) -> str:
    """Say in a few words what lies at the bottom of one of libp2p's chains of exceptions."""
    if isinstance(error, BaseExceptionGroup):
        return explain(error.exceptions[0])
    if isinstance(error, MuxerUpgradeFailure):
        return "it hung up after the handshake: are we on its roster?"
    if error.__cause__ is not None:
        return explain(error.__cause__)
    if isinstance(error, OSError) and error.errno and error.errno > 0:
        return os.strerror(error.errno)  # the rest names the address in yet another way
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def objection_in(error: BaseException) -> RemoteError | None:
    """Return what one end of a handshake had against the other, where that lies in a chain of libp2p's exceptions."""
    if isinstance(error, RemoteError):
        return error
    inner = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__
    return None if inner is None else objection_in(inner)
