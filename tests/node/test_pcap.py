"""pcap files, read again by a parser that shares nothing with the writer, and by tshark where it is installed."""

import shutil
import struct
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.node.capture import Capture, Connection, Ending, Endpoint, Piece, Side
from p2pfl.node.pcap import pcap_bytes

FIN, SYN, RST, ACK = 1, 2, 4, 16
OPENED = 1_700_000_000.25


def connection_of(number: int, sizes: list[int], ending: Ending = Ending.CLOSED) -> Connection:
    draw = np.random.default_rng(number)
    pieces = [
        Piece(OPENED + number + 0.001 * i, list(Side)[draw.integers(2)], draw.bytes(size))
        for i, size in enumerate(sizes)
    ]
    ended = None if ending is Ending.OPEN else OPENED + number + 1
    return Connection(
        Endpoint("127.0.0.1", 50_000 + number), Endpoint("10.0.0.9", 4001), OPENED + number, pieces, ended, ending
    )


@dataclass
class Flow:
    """One direction, as received."""

    flags: list[int] = field(default_factory=list)
    first: int = 0
    data: bytearray = field(default_factory=bytearray)
    end: int = 0


def ones_complement(data: bytes) -> int:
    total = 0
    for start in range(0, len(data), 2):
        total += int.from_bytes(data[start : start + 2].ljust(2, b"\0"), "big")
        total = (total & 0xFFFF) + (total >> 16)
    return total


def parse(file: bytes) -> tuple[dict[tuple[str, int, str, int], Flow], list[float]]:
    """Read a pcap file of Ethernet, IPv4 and TCP; every length, checksum, sequence and acknowledgement must fit."""
    magic, major, minor, zone, precision, snap, network = struct.unpack_from("<IHHiIII", file)
    assert (magic, major, minor, zone, precision, network) == (0xA1B2C3D4, 2, 4, 0, 0, 1)
    flows: dict[tuple[str, int, str, int], Flow] = {}
    times, position = [], 24
    while position < len(file):
        seconds, micros, kept, size = struct.unpack_from("<IIII", file, position)
        assert kept == size <= snap
        assert micros < 1_000_000
        times.append(seconds + micros / 1e6)
        frame = file[position + 16 : position + 16 + kept]
        position += 16 + kept
        assert frame[12:14] == b"\x08\x00"
        ip = frame[14:]
        assert ip[0] == 0x45
        assert int.from_bytes(ip[2:4], "big") == len(ip) <= 1500
        assert ip[9] == 6
        assert ones_complement(ip[:20]) == 0xFFFF
        tcp = ip[20:]
        assert ones_complement(ip[12:20] + struct.pack(">HH", 6, len(tcp)) + tcp) == 0xFFFF
        source, target, sequence, acknowledged, offset, flags = struct.unpack_from(">HHIIBB", tcp)
        data = tcp[offset >> 4 << 2 :]
        key = (".".join(map(str, ip[12:16])), source, ".".join(map(str, ip[16:20])), target)
        flow = flows.setdefault(key, Flow())
        flow.flags.append(flags)
        if flags & SYN:
            flow.first = flow.end = sequence
        assert sequence == flow.end, "a gap or an overlap"
        flow.data += data
        flow.end = (sequence + len(data) + bool(flags & (SYN | FIN))) % 2**32
        if flags & ACK:
            assert acknowledged == flows[(key[2], key[3], key[0], key[1])].end
    assert position == len(file)
    return flows, times


def test_streams_come_out_as_they_went_in() -> None:
    connections = [connection_of(0, [1, 5, 1460, 1461, 100_000, 0, 7]), connection_of(1, [3000] * 5)]
    flows, times = parse(pcap_bytes(Capture(connections=connections)))
    assert len(flows) == 4
    for connection in connections:
        there = (*connection.dialer, *connection.listener)
        back = (*connection.listener, *connection.dialer)
        assert bytes(flows[there].data) == connection.stream(Side.DIALER)
        assert bytes(flows[back].data) == connection.stream(Side.LISTENER)
        assert flows[there].flags[0] == SYN
        assert flows[back].flags[0] == SYN | ACK
        assert FIN | ACK in flows[there].flags
        assert FIN | ACK in flows[back].flags
    assert times == sorted(times)
    assert times[0] == pytest.approx(OPENED, abs=1e-6)
    assert times[-1] == pytest.approx(OPENED + 2, abs=1e-6)


def test_a_connection_that_broke_ends_with_a_reset_and_one_that_stands_does_not_end() -> None:
    capture = Capture(connections=[connection_of(0, [10], Ending.RESET), connection_of(1, [10], Ending.OPEN)])
    flows, _ = parse(pcap_bytes(capture))
    resets = {key: [bool(flag & RST) for flag in flow.flags] for key, flow in flows.items()}
    assert sum(map(sum, resets.values())) == 1
    assert resets[("10.0.0.9", 4001, "127.0.0.1", 50_000)][-1]
    assert not any(flag & FIN for flow in flows.values() for flag in flow.flags)


def test_a_clock_set_back_does_not_turn_a_connection_around() -> None:
    pieces = [Piece(OPENED + 5, Side.DIALER, b"a" * 2000), Piece(OPENED - 5, Side.DIALER, b"b" * 2000)]
    connection = Connection(Endpoint("127.0.0.1", 5), Endpoint("127.0.0.1", 6), OPENED, pieces, OPENED, Ending.CLOSED)
    flows, _ = parse(pcap_bytes(Capture(connections=[connection])))
    assert bytes(flows[("127.0.0.1", 5, "127.0.0.1", 6)].data) == connection.stream(Side.DIALER)


def test_only_ipv4_is_written() -> None:
    connection = Connection(Endpoint("::1", 5), Endpoint("::1", 6), OPENED)
    with pytest.raises(InvalidConfig, match=r"\[::1\]:5: only connections over IPv4"):
        pcap_bytes(Capture(connections=[connection]))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("tshark") is None, reason="tshark is not installed")
def test_tshark_follows_the_streams_and_finds_nothing_wrong(tmp_path: Path) -> None:
    connections = [connection_of(0, [1, 5, 1460, 100_000, 400_000, 7]), connection_of(1, [3000] * 5)]
    file = tmp_path / "capture.pcap"
    file.write_bytes(pcap_bytes(Capture(connections=connections)))

    def tshark(*arguments: str) -> str:
        # An isolated home: a user's own preferences change what tshark says.
        done = subprocess.run(
            [shutil.which("tshark") or "", "-r", str(file), *arguments],
            check=True,
            capture_output=True,
            text=True,
            env={"HOME": str(tmp_path), "PATH": ""},
        )
        return done.stdout

    for number, connection in enumerate(connections):
        lines = tshark("-q", "-z", f"follow,tcp,raw,{number}").splitlines()
        hexes = [line for line in lines if line.strip() and set(line.strip()) <= set("0123456789abcdef")]
        # The second end's lines are indented.
        sent = {
            first: bytes.fromhex("".join(line.strip() for line in hexes if line.startswith("\t") != first))
            for first in (True, False)
        }
        assert {sent[True], sent[False]} == {connection.stream(side) for side in Side}
    checks = ["-o", "tcp.check_checksum:TRUE", "-o", "ip.check_checksum:TRUE"]
    assert tshark(*checks, "-Y", "tcp.checksum.status != 1 or ip.checksum.status != 1") == ""
    assert tshark(*checks, "-Y", "tcp.analysis.flags or _ws.malformed") == ""
