"""What an observer between peers records: connections, and the bytes of each direction with their times.

Values only. `p2pfl.node.proxy` fills a capture, `p2pfl.node.pcap` writes one for other tools.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from p2pfl.core.errors import InvalidConfig

MAX_BYTES = 256 << 20
"""What a capture may hold in memory where nothing else is said; a guess."""


class Endpoint(NamedTuple):
    """One end of a TCP connection, or where it is listened for."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Side(StrEnum):
    """Which end of a connection."""

    DIALER = "dialer"
    LISTENER = "listener"

    @property
    def other(self) -> "Side":
        """The end across."""
        return Side.LISTENER if self is Side.DIALER else Side.DIALER


class Ending(StrEnum):
    """How a connection ended, as far as the observer saw it."""

    OPEN = "open"
    CLOSED = "closed"
    RESET = "reset"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that came together.

    Attributes:
        at: seconds since 1970, when they left the sender.
        sender: which end sent them.
    """

    at: float
    sender: Side
    data: bytes


@dataclass
class Connection:
    """One TCP connection: as the observer sees it, from the dialer to the address that it dialled."""

    dialer: Endpoint
    listener: Endpoint
    opened_at: float
    pieces: list[Piece] = field(default_factory=list)
    ended_at: float | None = None
    ending: Ending = Ending.OPEN

    def stream(self, sender: Side) -> bytes:
        """Return everything that one end sent, across the borders of pieces."""
        return b"".join(piece.data for piece in self.pieces if piece.sender is sender)

    def size(self, sender: Side) -> int:
        """Return how many bytes one end sent."""
        return sum(len(piece.data) for piece in self.pieces if piece.sender is sender)

    def end(self, at: float, ending: Ending) -> None:
        """Note how it ended; the first word counts."""
        if self.ending is Ending.OPEN:
            self.ended_at, self.ending = at, ending


@dataclass
class Capture:
    """All connections that an observer saw; at most `max_bytes` of what they carried."""

    max_bytes: int = MAX_BYTES
    connections: list[Connection] = field(default_factory=list)
    size: int = 0

    def open(self, dialer: Endpoint, listener: Endpoint, at: float) -> Connection:
        """Begin the record of a connection."""
        connection = Connection(dialer, listener, at)
        self.connections.append(connection)
        return connection

    def add(self, connection: Connection, at: float, sender: Side, data: bytes) -> None:
        """Record bytes of one direction.

        Raises:
            InvalidConfig: the capture is full; a capture with holes would prove nothing.
        """
        if self.size + len(data) > self.max_bytes:
            raise InvalidConfig(
                f"the capture has reached its limit of {self.max_bytes} bytes; raise it, or record fewer rounds"
            )
        self.size += len(data)
        connection.pieces.append(Piece(at, sender, data))
