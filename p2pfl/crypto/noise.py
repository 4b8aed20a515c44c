"""The Noise handshake XX with our cipher suites: bytes in, bytes out (The Noise Protocol Framework, revision 34).

Owns the order of the three messages and, after them, the key and nonce of each direction. The one file that knows the
package `noise`, which lends its symmetric state; every primitive under it is the suite's. Knows no identities, no
charter and no record format, and does no I/O.

The ciphers of Noise take keys of 32 bytes. SM4 takes the first 16 of them; rekeying still yields 32. Noise's HKDF with
two outputs is RFC 5869 with an empty info, so it is the suite's. With SM2 in place of X25519 a public key has
`Agreement.public_bytes` and a shared secret 32 bytes, where Noise's own groups have one length (DHLEN) for both.
"""

from typing import Any, NamedTuple

from noise.backends.noise_backend import NoiseBackend
from noise.functions.keypair import KeyPair
from noise.noise_protocol import NoiseProtocol

from p2pfl.core.errors import LocalError, Malformed, OutOfTurn, RemoteError
from p2pfl.crypto.suite import TAG_BYTES, Buffer, Suite

NAMES = {
    "aes": "Noise_XX_25519_AESGCM_SHA256",
    "sm4": "Noise_XX_25519_SM4GCM_SM3",
    "gm": "Noise_XX_SM2_SM4GCM_SM3",
}
"""The Noise protocol name of each suite; the first is in the specification, the others follow its grammar."""

KEY_BYTES = 32
"""Length of a key in Noise, whatever the cipher takes of it."""

MAX_NONCE = 2**64 - 1
"""Reserved for rekeying (section 4.2); no record ever has it."""

_MESSAGES = 3
_BLOCK_BYTES = 16


class CipherState:
    """The key and the nonce of one direction (section 5.1); its `repr` shows neither key nor text.

    The nonce counts on through every rekeying, as in the specification, so that no nonce is used twice even over all
    the keys of a connection.
    """

    def __init__(self, suite: Suite, key: bytes) -> None:
        self._suite = suite
        self._nonce = 0
        self._set_key(key)

    def __repr__(self) -> str:
        return f"CipherState({self._suite.name}, nonce={self._nonce})"

    def _set_key(self, key: bytes) -> None:
        self._key = key
        self._aead = self._suite.aead(key[: self._suite.key_bytes])
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes that went through the cipher under the present key, in whole blocks, and with each record's own."""
        return self._used

    def seal_into(self, plaintext: Buffer, associated: bytes, out: memoryview) -> None:
        """Write the next record, `len(plaintext) + TAG_BYTES` bytes, into `out`, which may not overlap `plaintext`.

        Raises:
            OutOfTurn: the nonces are used up.
        """
        self._aead.seal_into(self._next_nonce(), plaintext, associated, out)
        self._count(len(out))

    def open_into(self, ciphertext: Buffer, associated: bytes, out: memoryview) -> None:
        """Write the plaintext of the next record into `out`, `len(ciphertext) - TAG_BYTES` bytes.

        Raises:
            BadTag: it is not the next record of the other end; the state is as it was.
            OutOfTurn: the nonces are used up.
        """
        self._aead.open_into(self._next_nonce(), ciphertext, associated, out)
        self._count(len(out) + TAG_BYTES)

    def rekey(self) -> None:
        """Replace the key by REKEY(k) of section 4.2: what was sent before stays secret if the new one is lost."""
        out = bytearray(KEY_BYTES + TAG_BYTES)
        self._aead.seal_into(_nonce(MAX_NONCE), bytes(KEY_BYTES), b"", memoryview(out))
        self._set_key(bytes(out[:KEY_BYTES]))

    def _next_nonce(self) -> bytes:
        if self._nonce >= MAX_NONCE:
            raise OutOfTurn("every nonce of this connection is used: connect anew")
        return _nonce(self._nonce)

    def _count(self, sealed: int) -> None:
        self._nonce += 1
        # The tag fills a block; one more is spent on masking it.
        self._used += -(-sealed // _BLOCK_BYTES) * _BLOCK_BYTES + _BLOCK_BYTES


class Session(NamedTuple):
    """What a handshake ends with."""

    sending: CipherState
    receiving: CipherState
    remote_static: bytes
    """The other end's static public key, proved to be its own."""


class Handshake:
    """One end of one handshake; `write` and `read` alternate as XX says, the initiator writing first.

        -> e;  <- e, ee, s, es;  -> s, se

    The payload of the first message is readable by anyone, that of the second by whoever began, and that of the third
    only by the responder. A handshake that failed stays failed. Its `repr` shows nothing secret.

    Args:
        suite: whose primitives to use.
        is_initiator: whether this end writes first.
        static: our 32-byte static private key.
        ephemeral: a 32-byte private key that was never used before and never will be again.
        prologue: what both ends must hold to be the same.
    """

    def __init__(self, suite: Suite, *, is_initiator: bool, static: bytes, ephemeral: bytes, prologue: bytes) -> None:
        self._suite = suite
        self._is_initiator = is_initiator
        self._next = 0
        protocol = NoiseProtocol(NAMES[suite.name].encode(), _Backend(suite, _key_pair(suite, ephemeral)))
        protocol.initiator = is_initiator
        protocol.prologue = prologue
        protocol.keypairs["s"] = _key_pair(suite, static)
        protocol.initialise_handshake_state()
        self._state = protocol.handshake_state
        self._split: tuple[Any, Any] | None = None

    def __repr__(self) -> str:
        return f"Handshake({NAMES[self._suite.name]}, is_initiator={self._is_initiator}, next={self._next})"

    @property
    def remote_static(self) -> bytes:
        """The other end's static public key; proved to be its own once a message that carries it was read.

        Raises:
            OutOfTurn: it has not come yet.
        """
        if not isinstance(self._state.rs, KeyPair):
            raise OutOfTurn("the other end's static key has not come yet")
        return bytes(self._state.rs.public_bytes)

    def write(self, payload: bytes = b"") -> bytes:
        """Return our next message.

        Raises:
            Malformed: a key of the other end is no point of the group, or one of small order.
            OutOfTurn: it is not our turn, or the handshake has failed.
        """
        number = self._take_turn(writing=True)
        message = bytearray()
        self._split = self._state.write_message(payload, message)
        self._next = number + 1
        return bytes(message)

    def read(self, message: bytes) -> bytes:
        """Take the other end's next message and return its payload, authenticated from the second message on.

        Raises:
            Malformed: it is none of this handshake, or the ends differ in prologue or suite.
            OutOfTurn: it is not theirs to write, or the handshake has failed.
        """
        number = self._take_turn(writing=False)
        if len(message) < self._shortest(number):
            raise Malformed(f"handshake message {number + 1} has {len(message)} bytes")
        payload = bytearray()
        try:
            self._split = self._state.read_message(message, payload)
        except RemoteError as error:
            raise Malformed(f"handshake message {number + 1} is not authentic") from error
        self._next = number + 1
        return bytes(payload)

    def finish(self) -> Session:
        """Return the two directions and the other end's static key.

        Raises:
            OutOfTurn: the handshake is not over.
        """
        if self._split is None:
            raise OutOfTurn("the handshake is not over")
        begun, answered = (CipherState(self._suite, bytes(state.k)) for state in self._split)
        sending, receiving = (begun, answered) if self._is_initiator else (answered, begun)
        return Session(sending, receiving, self.remote_static)

    def _take_turn(self, writing: bool) -> int:
        """Return the number of the message whose turn it is, and leave the handshake failed until it succeeds."""
        number = self._next
        ours = (number % 2 == 0) == self._is_initiator
        if not 0 <= number < _MESSAGES or ours != writing:
            raise OutOfTurn(f"{self!r}: not the turn to {'write' if writing else 'read'}")
        self._next = -1
        return number

    def _shortest(self, number: int) -> int:
        public = self._suite.agreement.public_bytes
        return (public, 2 * public + 2 * TAG_BYTES, public + 2 * TAG_BYTES)[number]


def _nonce(number: int) -> bytes:
    """Return the 96-bit nonce of AES-GCM in Noise (section 12.4), which the other ciphers of ours share."""
    return number.to_bytes(12, "big")


def _key_pair(suite: Suite, private: bytes) -> Any:
    public = suite.agreement.public_key(private)
    return _Keys(private, public, public)


class _Keys(KeyPair):  # type: ignore[misc]  # the package has no types
    """A key pair as the package wants it: here the keys are their encodings."""

    @classmethod
    def from_private_bytes(cls, _: bytes) -> Any:
        raise LocalError("made from its suite")

    @classmethod
    def from_public_bytes(cls, public_bytes: bytes) -> Any:
        return cls(None, bytes(public_bytes), bytes(public_bytes))


class _Group:
    """The suite's group, with the one ephemeral key of this handshake."""

    def __init__(self, suite: Suite, ephemeral: Any) -> None:
        self._agreement = suite.agreement
        self._ephemeral = ephemeral
        self.dhlen = suite.agreement.public_bytes

    def generate_keypair(self) -> Any:
        return self._ephemeral

    def dh(self, private: bytes, public: bytes) -> bytes:
        return self._agreement.shared_secret(private, public)


class _Hash:
    """The suite's hash. Both of ours have 32 bytes, and blocks of 64."""

    hashlen = 32
    blocklen = 64
    fn = None

    def __init__(self, suite: Suite) -> None:
        self.hash = suite.hash


class _HandshakeCipher:
    """The suite's cipher under the keys of the handshake, each for a message or two."""

    def __init__(self, suite: Suite) -> None:
        self._suite = suite

    def initialize(self, key: bytes) -> None:
        self._aead = self._suite.aead(bytes(key[: self._suite.key_bytes]))

    def encrypt(self, _: bytes, number: int, associated: bytes, plaintext: Buffer) -> bytes:
        out = bytearray(len(plaintext) + TAG_BYTES)
        self._aead.seal_into(_nonce(number), bytes(plaintext), associated, memoryview(out))
        return bytes(out)

    def decrypt(self, _: bytes, number: int, associated: bytes, ciphertext: Buffer) -> bytes:
        out = bytearray(len(ciphertext) - TAG_BYTES)
        self._aead.open_into(_nonce(number), ciphertext, associated, memoryview(out))
        return bytes(out)


class _Backend(NoiseBackend):  # type: ignore[misc]  # the package has no types
    """One suite, under whatever names its protocol name gives its parts."""

    def __init__(self, suite: Suite, ephemeral: Any) -> None:
        super().__init__()
        _, _, group, cipher, digest = NAMES[suite.name].split("_")
        self.diffie_hellmans = {group: lambda: _Group(suite, ephemeral)}
        self.keypairs = {group: _Keys}
        self.ciphers = {cipher: lambda: _HandshakeCipher(suite)}
        self.hashes = {digest: lambda: _Hash(suite)}
        self.hmac = _no_hmac
        self.hkdf = self._hkdf
        self._suite = suite

    def _hkdf(self, chaining_key: bytes, secret: bytes, outputs: int, **_: Any) -> tuple[bytes, ...]:
        whole = self._suite.hkdf(secret, chaining_key, b"", 32 * outputs)
        return tuple(whole[i : i + 32] for i in range(0, len(whole), 32))


def _no_hmac(*_: Any, **__: Any) -> bytes:
    raise LocalError("HKDF is the suite's; nothing else needs HMAC")
