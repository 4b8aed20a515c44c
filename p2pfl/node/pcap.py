"""A capture as a pcap file, for Wireshark and its like.

The proxy sees bytes, not packets: Ethernet, IPv4 and TCP headers are made up around them, with a handshake before and
an end after, so that each connection can be followed. Contents, order, times, addresses and ports are those seen;
how the bytes were cut into packets, and the acknowledgements, are not. The file's format is that of libpcap
(draft-ietf-opsawg-pcap), with times in microseconds.
"""

import ipaddress
import struct
from collections.abc import Iterable, Iterator
from enum import IntFlag

from p2pfl.core.errors import InvalidConfig
from p2pfl.node.capture import Capture, Connection, Ending, Endpoint, Side

MAGIC, VERSION, SNAP_BYTES, ETHERNET = 0xA1B2C3D4, (2, 4), 262_144, 1
SEGMENT_BYTES = 1460
"""An Ethernet frame's 1500 bytes without the headers of IPv4 and TCP."""
WINDOW, WINDOW_SHIFT = 0xFFFF, 14
"""The largest window there is (RFC 7323, section 2.3): the bytes in flight are not known, so none is ever full."""
_MODULUS = 1 << 32
_HARDWARE = {Side.DIALER: bytes.fromhex("020000000001"), Side.LISTENER: bytes.fromhex("020000000002")}
"""Locally administered addresses; no real ones are known."""
_FIRST = {Side.DIALER: 0x10000000, Side.LISTENER: 0x20000000}
"""Initial sequence numbers; any do."""


class Flag(IntFlag):
    """TCP's control bits."""

    FIN = 1
    SYN = 2
    RST = 4
    PSH = 8
    ACK = 16


def pcap_bytes(capture: Capture) -> bytes:
    """Write a capture as a file.

    Raises:
        InvalidConfig: a connection is not over IPv4.
    """
    packets = [packet for connection in capture.connections for packet in _packets(connection)]
    # Within a connection times never fall, and sorting keeps the order of equals.
    packets.sort(key=lambda packet: packet[0])
    header = struct.pack("<IHHiIII", MAGIC, *VERSION, 0, 0, SNAP_BYTES, ETHERNET)
    return header + b"".join(_record(at, frame) for at, frame in packets)


def _record(at: int, frame: bytes) -> bytes:
    seconds, microseconds = divmod(at, 1_000_000)
    return struct.pack("<IIII", seconds, microseconds, len(frame), len(frame)) + frame


def _packets(connection: Connection) -> Iterator[tuple[int, bytes]]:
    """Give a connection's packets as (microseconds since 1970, Ethernet frame)."""
    flow = _Flow(connection)
    at = _microseconds(connection.opened_at)
    for side, flags in (
        (Side.DIALER, Flag.SYN),
        (Side.LISTENER, Flag.SYN | Flag.ACK),
        (Side.DIALER, Flag.ACK),
    ):
        yield at, flow.packet(side, flags)
    for piece in connection.pieces:
        # A clock that was set back must not turn the connection around.
        at = max(at, _microseconds(piece.at))
        for start in range(0, len(piece.data), SEGMENT_BYTES):
            data = piece.data[start : start + SEGMENT_BYTES]
            last = start + SEGMENT_BYTES >= len(piece.data)
            yield at, flow.packet(piece.sender, Flag.ACK | (Flag.PSH if last else Flag(0)), data)
        yield at, flow.packet(piece.sender.other, Flag.ACK)
    if connection.ended_at is not None:
        at = max(at, _microseconds(connection.ended_at))
        for side, flags in _ends(connection.ending):
            yield at, flow.packet(side, flags)


def _ends(ending: Ending) -> Iterable[tuple[Side, Flag]]:
    if ending is not Ending.CLOSED:
        return [(Side.LISTENER, Flag.RST | Flag.ACK)]
    end = Flag.FIN | Flag.ACK
    return [(Side.DIALER, end), (Side.LISTENER, end), (Side.DIALER, Flag.ACK)]


class _Flow:
    """The sequence numbers of a connection, and its packets."""

    def __init__(self, connection: Connection) -> None:
        self._ends = {Side.DIALER: connection.dialer, Side.LISTENER: connection.listener}
        self._hosts = {side: _ipv4(end) for side, end in self._ends.items()}
        self._next = dict(_FIRST)
        self._count = 0

    def packet(self, sender: Side, flags: Flag, data: bytes = b"") -> bytes:
        """Return the next packet from `sender` as an Ethernet frame."""
        receiver = sender.other
        segment = self._segment(sender, flags, data)
        self._next[sender] += len(data) + bool(flags & (Flag.SYN | Flag.FIN))
        self._count += 1
        hosts = self._hosts[sender] + self._hosts[receiver]
        length = 20 + len(segment)
        # Version and header length, service, length, number, "do not fragment", 64 hops, TCP, checksum.
        ip = struct.pack(">BBHHHBBH", 0x45, 0, length, self._count & 0xFFFF, 0x4000, 64, 6, 0) + hosts
        ip = ip[:10] + struct.pack(">H", checksum(ip)) + ip[12:]
        return _HARDWARE[receiver] + _HARDWARE[sender] + b"\x08\x00" + ip + segment

    def _segment(self, sender: Side, flags: Flag, data: bytes) -> bytes:
        receiver = sender.other
        # Maximum segment size, padding, window scale.
        options = struct.pack(">BBHBBBB", 2, 4, SEGMENT_BYTES, 1, 3, 3, WINDOW_SHIFT) if flags & Flag.SYN else b""
        ports = (self._ends[sender].port, self._ends[receiver].port)
        acknowledged = self._next[receiver] % _MODULUS if flags & Flag.ACK else 0
        offset = (20 + len(options)) // 4 << 4
        head = struct.pack(">HHIIBBH", *ports, self._next[sender] % _MODULUS, acknowledged, offset, flags, WINDOW)
        pseudo = struct.pack(
            ">4s4sBBH", self._hosts[sender], self._hosts[receiver], 0, 6, 20 + len(options) + len(data)
        )
        total = checksum(b"".join((pseudo, head, b"\0\0\0\0", options, data)))
        return b"".join((head, struct.pack(">HH", total, 0), options, data))


def checksum(data: bytes) -> int:
    """Return the Internet checksum (RFC 1071): the complement of the ones' complement sum of 16-bit words."""
    if len(data) % 2:
        data += b"\0"
    # 2^16 is 1 modulo 2^16 - 1, so the whole as one number is congruent to the sum of its words.
    number = int.from_bytes(data, "big")
    return 0xFFFF ^ ((number - 1) % 0xFFFF + 1 if number else 0)


def _ipv4(endpoint: Endpoint) -> bytes:
    try:
        return ipaddress.IPv4Address(endpoint.host).packed
    except ValueError as error:
        raise InvalidConfig(f"{endpoint}: only connections over IPv4 can be written as pcap") from error


def _microseconds(seconds: float) -> int:
    return round(seconds * 1_000_000)
