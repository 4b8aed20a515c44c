"""What can go wrong, sorted by whose fault it is.

Every message is one line that says what is wrong, where, and what to do. No secret ever enters one.
"""

from p2pfl.core.ids import PeerId


class P2pflError(Exception):
    """The root of every error this package raises on purpose; `exit_code` is what the command line ends with."""

    exit_code = 1


class LocalError(P2pflError):
    """Our caller broke the contract."""

    exit_code = 2


class InvalidConfig(LocalError):
    """A setting, a file or a command that cannot be used as it is."""


class OutOfTurn(LocalError):
    """A machine was given an input that its state does not allow: a fault in the driver."""


class RemoteError(P2pflError):
    """A peer broke the protocol. It costs that peer its link, never us our process.

    Attributes:
        peer: who broke it, or None where the bytes do not say yet.
        reason: what it did, in one line.
    """

    def __init__(self, reason: str, peer: PeerId | None = None) -> None:
        super().__init__(reason if peer is None else f"{peer}: {reason}")
        self.peer = peer
        self.reason = reason


class Malformed(RemoteError):
    """Bytes that are not a message of this protocol."""


class TooLarge(RemoteError):
    """A message over its bound."""


class BadSignature(RemoteError):
    """A signature that does not verify."""


class BadTag(RemoteError):
    """A sealed message that does not open: changed on the way, or sealed under another key."""


class WrongCharter(RemoteError):
    """A message sent under another charter."""


class WrongVersion(RemoteError):
    """A peer that speaks no version of the messages that we do."""


class NotAMember(RemoteError):
    """A connection from a peer that the charter does not list."""


class RoundFailed(P2pflError):
    """A round, or the run, that could not be completed, and nobody broke a rule."""


class TransportError(P2pflError):
    """The world: cables, processes, ports."""


class Unreachable(TransportError):
    """No address of a peer answered as that peer."""


class StreamReset(TransportError):
    """A stream ended anywhere but between two frames."""


class StoreFailed(P2pflError):
    """A file of a running peer that cannot be written any more, such as on a full disk."""


class AddressInUse(TransportError):
    """Another process listens on our address."""
