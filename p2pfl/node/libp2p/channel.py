"""Our security transport for libp2p: Noise XX under the charter's suite, between members of one charter.

    the handshake's three messages, each with its length in 2 bytes (big endian); then records (`records`)
    payload of messages 2 and 3: charter hash (32 bytes) | NoiseHandshakePayload (libp2p specs, noise)
    first record of each direction: one byte, the sender's verdict

Who dials judges who answers before it says who it is. Where that is not the peer it dialled, its message 3 carries its
verdict in place of a hello, under a static key that nobody can know it by, and is its last. Otherwise both ends finish
the handshake even where one objects, and read the other's verdict: so both can say why. Nothing else is sent before.
Decides who may hold a connection and nothing about streams; `gate` does the same for libp2p's own transports.
"""

import contextlib
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import IntEnum

import trio
from libp2p.abc import IRawConnection, ISecureTransport
from libp2p.crypto.keys import KeyPair, KeyType, PublicKey
from libp2p.custom_types import TProtocol
from libp2p.io.exceptions import IOException
from libp2p.network.connection.exceptions import RawConnError
from libp2p.peer.id import ID
from libp2p.security.exceptions import HandshakeFailure
from libp2p.security.noise.messages import NoiseHandshakePayload

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import BadSignature, InvalidConfig, Malformed, NotAMember, RemoteError, TooLarge, WrongCharter
from p2pfl.core.ids import PeerId
from p2pfl.crypto.noise import KEY_BYTES, Handshake
from p2pfl.crypto.suite import Suite
from p2pfl.node.libp2p.records import Channel, Inbox, RekeyPolicy
from p2pfl.node.libp2p.tcp import SocketConnection
from p2pfl.node.transport import RefusalHandler

PROTOCOLS = {name: TProtocol(f"/p2pfl/noise-{name}/1.0.0") for name in ("aes", "sm4", "gm")}
"""What each suite's transport is called in multistream-select. A peer offers one."""

HANDSHAKE_DEADLINE = 10.0
"""Seconds a connection may take to prove who is there; libp2p's own default."""

MAX_MESSAGE = 1024
"""Bytes of a handshake message; ours have some 300, and 100 more with SM2."""

VERDICT_GRACE = 1.0
"""Seconds that an end which refuses the other waits for it to take the verdict; a guess."""

CHARTER_BYTES = 32

# libp2p specs, noise, "The libp2p Handshake Payload".
_SIGNED_PREFIX = b"noise-libp2p-static-key:"
_LENGTH_BYTES = 2


class Verdict(IntEnum):
    """What one end says of the other at the end of a handshake."""

    WELCOME = 0
    WRONG_CHARTER = 1
    NOT_A_MEMBER = 2
    NOT_EXPECTED = 3
    OWN_IDENTITY = 4


@dataclass(frozen=True)
class _Hello:
    """Who is at the other end, as its handshake proved, and under which charter."""

    charter: bytes
    public_key: PublicKey
    peer: PeerId


class ChannelTransport(ISecureTransport):
    """Secures a raw connection between two members of one charter, or says to both why not.

    Args:
        suite: the charter's.
        key_pair: the peer's Ed25519 identity.
        charter: the charter's hash.
        roster: the peers that may connect, looked up anew at each handshake.
        on_refused: told of each handshake that failed for the other end's fault.
        rekey: when to replace the keys of a connection.
        entropy: returns so many random bytes.

    Raises:
        InvalidConfig: the charter's hash has another length.
    """

    def __init__(
        self,
        suite: Suite,
        key_pair: KeyPair,
        charter: bytes,
        roster: Collection[PeerId],
        on_refused: RefusalHandler,
        *,
        rekey: RekeyPolicy = RekeyPolicy(),  # noqa: B008 - a frozen value
        entropy: Callable[[int], bytes] = os.urandom,
    ) -> None:
        if len(charter) != CHARTER_BYTES:
            raise InvalidConfig(f"a charter's hash has {CHARTER_BYTES} bytes, not {len(charter)}")
        self._suite = suite
        self._key_pair = key_pair
        self._local = ID.from_pubkey(key_pair.public_key)
        self._charter = charter
        self._roster = roster
        self._on_refused = on_refused
        self._rekey = rekey
        self._entropy = entropy
        self._prologue = canonical([PROTOCOLS[suite.name], suite.name])

    @property
    def protocol(self) -> TProtocol:
        """What this transport is called in multistream-select."""
        return PROTOCOLS[self._suite.name]

    async def secure_inbound(self, conn: IRawConnection) -> Channel:
        """Answer a handshake.

        Raises:
            HandshakeFailure: either end objects, or the handshake failed.
        """
        return await self._secure(conn, None)

    async def secure_outbound(self, conn: IRawConnection, peer_id: ID) -> Channel:
        """Begin a handshake with `peer_id`.

        Raises:
            HandshakeFailure: either end objects, or the handshake failed.
        """
        return await self._secure(conn, PeerId(str(peer_id)))

    async def _secure(self, conn: IRawConnection, expected: PeerId | None) -> Channel:
        """Run the handshake in its time, close what fails, and tell libp2p of it in its own words."""
        secured = False
        try:
            with trio.fail_after(HANDSHAKE_DEADLINE):
                channel = await self._shake_hands(conn, expected)
            secured = True
        except trio.TooSlowError as error:
            raise HandshakeFailure(f"{name_of(conn, expected)}: no handshake in {HANDSHAKE_DEADLINE:.3g} s") from error
        except RemoteError as error:
            self._on_refused(error.peer or name_of(conn, expected), error.reason)
            raise HandshakeFailure(str(error)) from error
        except (IOException, RawConnError) as error:
            raise HandshakeFailure(f"{name_of(conn, expected)}: hung up during the handshake: {error}") from error
        finally:
            if not secured:
                await _close(conn)
        stream = getattr(conn, "stream", None)
        if isinstance(stream, SocketConnection):
            stream.admit(PeerId(str(channel.get_remote_peer())))
        return channel

    async def _shake_hands(self, conn: IRawConnection, expected: PeerId | None) -> Channel:
        inbox = Inbox(conn)
        # Fresh each time: the identity's signature over it has no end, and must not outlive the handshake.
        static = self._entropy(KEY_BYTES)
        ours = self._make_hello(static)
        handshake = Handshake(
            self._suite,
            is_initiator=expected is not None,
            static=static,
            ephemeral=self._entropy(KEY_BYTES),
            prologue=self._prologue,
        )
        if expected is not None:
            await conn.write(_framed(handshake.write()))
            hello = _verify_hello(handshake.read(await _message(inbox)), handshake.remote_static)
            verdict, objection = self._judge_identity(hello.peer, expected)
            if objection is not None:
                await _say_and_leave(conn, _framed(handshake.write(bytes([verdict]))))
                raise objection
            await conn.write(_framed(handshake.write(ours)))
        else:
            handshake.read(await _message(inbox))
            await conn.write(_framed(handshake.write(ours)))
            payload = handshake.read(await _message(inbox))
            if len(payload) == 1:
                raise _objection_of(None, payload[0])
            hello = _verify_hello(payload, handshake.remote_static)
        channel = Channel(
            conn,
            inbox,
            handshake.finish(),
            self._rekey,
            local_peer=self._local,
            local_private_key=self._key_pair.private_key,
            remote_peer=ID.from_pubkey(hello.public_key),
            remote_permanent_pubkey=hello.public_key,
            is_initiator=expected is not None,
        )
        await self._exchange_verdicts(channel, hello)
        channel.establish()
        return channel

    async def _exchange_verdicts(self, channel: Channel, hello: _Hello) -> None:
        """Say what we think of the other end and hear what it thinks of us.

        Reads even where we object: a socket that is closed with bytes unread takes our verdict with it.

        Raises:
            RemoteError: one of the two objects.
        """
        verdict, objection = self._judge(hello)
        if objection is not None:
            # Whoever is refused may hang up or say nothing: it is refused, and named, all the same.
            with trio.move_on_after(VERDICT_GRACE), contextlib.suppress(IOException, RawConnError):
                await channel.write(bytes([verdict]))
                await channel.read(1)
            raise objection
        await channel.write(bytes([verdict]))
        answer = await channel.read(1)
        if answer[0] != Verdict.WELCOME:
            raise _objection_of(hello.peer, answer[0])

    def _judge(self, hello: _Hello) -> tuple[Verdict, RemoteError | None]:
        if hello.charter != self._charter and hello.peer != str(self._local):
            # Before the roster: under another charter it is no wonder that the rosters differ.
            reason = f"is under charter {_short(hello.charter)}, ours is {_short(self._charter)}"
            return Verdict.WRONG_CHARTER, WrongCharter(reason, hello.peer)
        return self._judge_identity(hello.peer)

    def _judge_identity(self, peer: PeerId, expected: PeerId | None = None) -> tuple[Verdict, RemoteError | None]:
        if expected is not None and peer != expected:
            return Verdict.NOT_EXPECTED, NotAMember(f"answers where {expected} was expected", peer)
        if peer == str(self._local):
            return Verdict.OWN_IDENTITY, NotAMember("has our own identity: is the same key in use twice?", peer)
        if peer not in self._roster:
            return Verdict.NOT_A_MEMBER, NotAMember("is not on the roster", peer)
        return Verdict.WELCOME, None

    def _make_hello(self, static: bytes) -> bytes:
        signature = self._key_pair.private_key.sign(_SIGNED_PREFIX + self._suite.agreement.public_key(static))
        return self._charter + NoiseHandshakePayload(self._key_pair.public_key, signature).serialize()


def _verify_hello(payload: bytes, static: bytes) -> _Hello:
    """Check that the static key was signed by the identity in the payload.

    Raises:
        Malformed: it is no payload of ours.
        BadSignature: it was not.
    """
    try:
        parsed = NoiseHandshakePayload.deserialize(payload[CHARTER_BYTES:])
        key = parsed.id_pubkey
        is_ours = key.get_type() == KeyType.Ed25519
        peer = PeerId(str(ID.from_pubkey(key)))
    except Exception as error:  # whatever the parsers raise
        raise Malformed("a handshake that carries no identity") from error
    if not is_ours:
        raise Malformed("an identity that is no Ed25519 key")
    # The peer that it claims to be is not to blame for it.
    unsigned = f"a handshake key that its identity did not sign; it claims to be {peer}"
    try:
        is_signed = key.verify(_SIGNED_PREFIX + static, parsed.id_sig)
    except Exception as error:  # a signature of another length
        raise BadSignature(unsigned) from error
    if not is_signed:
        raise BadSignature(unsigned)
    return _Hello(payload[:CHARTER_BYTES], key, peer)


def _objection_of(peer: PeerId | None, code: int) -> RemoteError:
    """Put the other end's verdict into our words; without `peer` it did not say who it is."""
    match code:
        case Verdict.WRONG_CHARTER:
            return WrongCharter("holds our charter to be another than its own", peer)
        case Verdict.NOT_A_MEMBER:
            return NotAMember("has us not on its roster", peer)
        case Verdict.NOT_EXPECTED:
            return NotAMember("expected another peer at our address", peer)
        case Verdict.OWN_IDENTITY:
            return NotAMember("says that we have its identity: is the same key in use twice?", peer)
    return Malformed(f"verdict {code}", peer)


def _framed(message: bytes) -> bytes:
    return len(message).to_bytes(_LENGTH_BYTES, "big") + message


async def _message(inbox: Inbox) -> bytes:
    """Return the next handshake message.

    Raises:
        TooLarge: it is over its bound; nothing of it was read.
    """
    size = int.from_bytes(await inbox.peek(_LENGTH_BYTES), "big")
    if size > MAX_MESSAGE:
        raise TooLarge(f"a handshake message of {size} bytes; {MAX_MESSAGE} are the most")
    message = bytes((await inbox.peek(_LENGTH_BYTES + size))[_LENGTH_BYTES:])
    inbox.drop(_LENGTH_BYTES + size)
    return message


def _short(charter: bytes) -> str:
    return f"{charter.hex()[:8]}…"


def name_of(conn: IRawConnection, expected: PeerId | None = None) -> str:
    """Name the other end before it has proved who it is."""
    address = conn.get_remote_address()
    return str(expected or (f"{address[0]}:{address[1]}" if address else "a stranger"))


async def _say_and_leave(conn: IRawConnection, last: bytes) -> None:
    # Whoever does not hear it, or has gone: it is refused all the same.
    with trio.move_on_after(VERDICT_GRACE), contextlib.suppress(IOException, RawConnError):
        await conn.write(last)


async def _close(conn: IRawConnection) -> None:
    # What goes wrong here says that it is closed already.
    with trio.CancelScope(shield=True), trio.move_on_after(1), contextlib.suppress(Exception):
        await conn.close()
