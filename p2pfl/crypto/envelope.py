"""Messages that only one member of a session can open, whoever carries them.

The key of a direction is derived from the pair's wrap keys with the session's id as salt, and the session's id is
authenticated with the message: neither another session, nor another pair, nor the way back opens it. The nonce is
derived from the message too, so sealing a message twice gives the same bytes, and sealing two messages where one is
meant costs no more than showing that there were two.
"""

from p2pfl.core.canonical import canonical
from p2pfl.core.errors import BadTag, Malformed
from p2pfl.core.ids import PeerId
from p2pfl.crypto.agreement import wrap_secret
from p2pfl.crypto.suite import NONCE_BYTES, TAG_BYTES, Suite

OVERHEAD_BYTES = NONCE_BYTES + TAG_BYTES


def seal(suite: Suite, shared: bytes, sid: bytes, sender: PeerId, recipient: PeerId, message: bytes) -> bytes:
    """Return nonce, ciphertext and tag: OVERHEAD_BYTES more than the message.

    Args:
        suite: the charter's.
        shared: the pair's 32-byte Diffie-Hellman secret of this attempt's wrap keys.
        sid: the session's id, 32 bytes.
        sender: who seals.
        recipient: who opens.
        message: what it is about.

    Raises:
        LocalError: the session's id has another length.
    """
    purpose = canonical(["p2pfl/wrap-nonce/1", suite.name, sender, recipient, suite.hash(message)])
    key = wrap_secret(suite, shared, sid, sender, recipient)
    nonce = suite.hkdf(shared, salt=sid, info=purpose, length=NONCE_BYTES)
    sealed = bytearray(len(message) + TAG_BYTES)
    suite.aead(key).seal_into(nonce, message, sid, memoryview(sealed))
    return nonce + bytes(sealed)


def unseal(suite: Suite, shared: bytes, sid: bytes, sender: PeerId, recipient: PeerId, sealed: bytes) -> bytes:
    """Return the message inside what `seal` returned for the same session and direction.

    Args:
        suite: the charter's.
        shared: the pair's secret, as for `seal`.
        sid: the session's id.
        sender: who sealed.
        recipient: who opens: this peer.
        sealed: what came.

    Raises:
        BadTag: it was not sealed so; names the sender.
        LocalError: the session's id has another length.
        Malformed: it is too short.
    """
    if len(sealed) < OVERHEAD_BYTES:
        raise Malformed("a sealed message too short to be one", sender)
    message = bytearray(len(sealed) - OVERHEAD_BYTES)
    key = wrap_secret(suite, shared, sid, sender, recipient)
    try:
        suite.aead(key).open_into(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], sid, memoryview(message))
    except BadTag:
        raise BadTag("a sealed message that does not open for this session and pair", sender) from None
    return bytes(message)
