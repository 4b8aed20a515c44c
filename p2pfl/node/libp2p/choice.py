"""Agreeing with the other end on a security transport, and saying which suites differ where there is none in common.

multistream-select is not authenticated: what a peer claims here decides nothing, and names itself in messages only.
"""

import re

import trio
from libp2p.abc import IMultiselectCommunicator, IRawConnection, ISecureConn
from libp2p.custom_types import TProtocol, TSecurityOptions
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import (
    MultiselectClientError,
    MultiselectCommunicatorError,
    MultiselectError,
)
from libp2p.protocol_muxer.multiselect import PROTOCOL_NOT_FOUND_MSG
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.security_multistream import SecurityMultistream
from libp2p.utils import encode_uvarint

from p2pfl.node.libp2p.channel import HANDSHAKE_DEADLINE, PROTOCOLS, name_of
from p2pfl.node.transport import RefusalHandler

MAX_LINES = 16
"""Lines a stranger may say before it has chosen a transport; libp2p's own peers offer three at most."""

MAX_LINE = 1024
"""Bytes of one line; specifications give no bound, and names have some 30."""

MAX_NAME = 60
"""Characters of a stranger's line that reach a message."""

LIST_DEADLINE = 2.0
"""Seconds a peer that refused our transport may take to list its own, which only words a message; a guess."""

KNOWN = {protocol: name for name, protocol in PROTOCOLS.items()} | {NOISE: "standard Noise"}
"""How messages call the transports that a charter can choose."""


class SecurityChoice(SecurityMultistream):
    """Stock's negotiation, bounded in time and lines, with errors that name both ends' transports.

    Args:
        transports: by protocol, the preferred one first.
        on_refused: told of each stranger that proposed none of them, and of each peer that speaks none of them.
    """

    def __init__(self, transports: TSecurityOptions, on_refused: RefusalHandler) -> None:
        super().__init__(transports)
        self._on_refused = on_refused

    async def secure_inbound(self, conn: IRawConnection) -> ISecureConn:
        """Agree on a transport with who dialled us, and secure the connection.

        Raises:
            HandshakeFailure: there is none in common, or the handshake failed.
        """
        heard = _Lines(conn)
        try:
            protocol, _ = await self.multiselect.negotiate(heard, HANDSHAKE_DEADLINE)
        except (MultiselectError, MultiselectClientError) as error:
            if heard.proposals:
                reason = f"proposed {', '.join(heard.proposals)}, but this peer speaks {self._ours()}"
                self._on_refused(name_of(conn), reason)
                raise HandshakeFailure(f"{name_of(conn)} {reason}") from error
            raise HandshakeFailure(f"{name_of(conn)}: hung up before a handshake") from error
        return _noted(await self.transports[protocol].secure_inbound(conn), protocol)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> ISecureConn:
        """Agree on a transport with `peer_id`, and secure the connection.

        Where there is none in common, asks what the other end speaks, in order to say so. No other transport than ours
        is ever proposed, whatever it answers.

        Raises:
            HandshakeFailure: there is none in common, or the handshake failed.
        """
        talk = _Lines(conn)
        try:
            protocol = await self.multiselect_client.select_one_of(tuple(self.transports), talk, HANDSHAKE_DEADLINE)
        except MultiselectClientError as error:
            if not talk.is_refused:
                raise HandshakeFailure(f"{peer_id}: hung up before a handshake, or speaks no libp2p") from error
            ours = " or ".join(KNOWN.get(protocol, protocol) for protocol in self.transports)
            reason = f"{await _offer(talk)}, our charter says {ours}: is it under another charter?"
            self._on_refused(str(peer_id), reason)
            raise HandshakeFailure(f"{peer_id} {reason}") from None
        return _noted(await self.transports[protocol].secure_outbound(conn, peer_id), protocol)

    def _ours(self) -> str:
        return " or ".join(self.transports)


async def _offer(talk: "_Lines") -> str:
    """Ask the other end what it speaks (`ls` of multistream-select), and put it into words."""
    listed = ""
    with trio.move_on_after(LIST_DEADLINE):
        try:
            await talk.write("ls")
            listed = await talk.read()
        except MultiselectCommunicatorError:
            pass
    # Implementations separate the names by newlines, lengths, or both.
    names = re.split(r"[^!-~]+", listed)
    found = [name for protocol, name in KNOWN.items() if protocol in names]
    return f"offers {' and '.join(found)}" if found else "speaks another security protocol"


class _Lines(IMultiselectCommunicator):
    """The lines of multistream-select: a varint of length, text, newline. Remembers what it heard, and tires of it.

    In place of libp2p's own, which takes any length on a stranger's word.
    """

    def __init__(self, conn: IRawConnection) -> None:
        self._conn = conn
        self._heard: list[str] = []

    @property
    def proposals(self) -> list[str]:
        """What came after the greeting, cut and made printable."""
        return [ascii(line[:MAX_NAME])[1:-1] for line in self._heard[1:] if line != "ls"]

    @property
    def is_refused(self) -> bool:
        """Whether the last line said that a protocol is not spoken."""
        return self._heard[-1:] == [PROTOCOL_NOT_FOUND_MSG]

    async def write(self, msg_str: str) -> None:
        line = msg_str.encode() + b"\n"
        try:
            await self._conn.write(encode_uvarint(len(line)) + line)
        except (IOException, RawConnError) as error:
            raise MultiselectCommunicatorError("the connection broke") from error

    async def read(self) -> str:
        if len(self._heard) >= MAX_LINES:
            raise MultiselectCommunicatorError("too many lines")
        line = await self._bytes(await self._length())
        if line[-1:] != b"\n":
            raise MultiselectCommunicatorError("a line without an end")
        try:
            self._heard.append(line[:-1].decode())
        except UnicodeDecodeError as error:
            raise MultiselectCommunicatorError("a line that is no text") from error
        return self._heard[-1]

    async def _length(self) -> int:
        low = (await self._bytes(1))[0]
        if low < 0x80:
            return low
        size = (low & 0x7F) | (await self._bytes(1))[0] << 7
        if size > MAX_LINE:
            raise MultiselectCommunicatorError(f"a line of over {MAX_LINE} bytes")
        return size

    async def _bytes(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = await self._conn.read(size - len(data))
            except (IOException, RawConnError) as error:
                raise MultiselectCommunicatorError("the connection broke") from error
            if not piece:
                raise MultiselectCommunicatorError("the connection ended")
            data += piece
        return data


def _noted(secured: ISecureConn, protocol: TProtocol) -> ISecureConn:
    secured.negotiated_security_protocol = str(protocol)  # libp2p's muxer upgrade looks for it
    return secured
