"""How fast 100 MB cross a channel between two processes on this machine, against raw TCP, stock py-libp2p and gRPC.

    python benchmarks/channel.py [--megabytes 100] [--repeats 3] [--delay 0.010]

Each stack sends the same bytes over one stream of one connection on the loopback interface; the receiver times from
the first byte to the last. All stacks run in turn, `--repeats` times, and the best of each counts: interference only
ever slows. The ratios are what travels to other machines, not the megabytes. The last rows add `--delay` seconds each
way in a proxy.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import trio
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.oid import NameOID

from p2pfl.core.ids import PeerId, Seconds
from p2pfl.crypto.identity import Identity
from p2pfl.node.capture import Endpoint
from p2pfl.node.launcher import free_ports
from p2pfl.node.proxy import Link, Route, proxies_in_process
from p2pfl.node.transport import IncomingLane, LaneKind

PIECE = 256 * 1024
SENDER, RECEIVER = Identity(bytes([1]) * 32), Identity(bytes([2]) * 32)
ROSTER = tuple(sorted((SENDER.peer_id, RECEIVER.peer_id)))
CHARTER = bytes(range(32))
HOST = "127.0.0.1"
GRPC_MESSAGE = 1 << 20


@dataclass(frozen=True)
class Job:
    """One measurement: how many bytes, where the receiver listens, and where the sender connects."""

    size: int
    listen: int
    connect: int


class Stopwatch:
    """Times from the first piece to the last."""

    def __init__(self, size: int) -> None:
        self.size, self.got = size, 0
        self.began = 0.0

    def add(self, count: int) -> bool:
        """Count bytes; True when all are in."""
        if not self.got:
            self.began = time.perf_counter()
        self.got += count
        return self.got >= self.size


# Raw TCP


async def raw_receive(
    job: Job, ready: Callable[[], None], report: Callable[[float], None], *, key: bytes | None
) -> None:
    """Receive over trio's TCP, into one array; with a key, in AES-256-GCM records."""
    listener = (await trio.open_tcp_listeners(job.listen, host=HOST))[0]
    ready()
    stream = await listener.accept()
    socket = stream.socket
    out = memoryview(bytearray(job.size))
    record = memoryview(bytearray(PIECE + 16))
    aead = AESGCM(key) if key else None
    watch = Stopwatch(job.size)
    place = number = 0
    while place < job.size:
        length = min(PIECE, job.size - place)
        view = record[: length + 16] if aead else out[place : place + length]
        filled = 0
        while filled < len(view):
            count = await socket.recv_into(view[filled:])
            if place == filled == 0:
                watch.add(0)
                watch.began = time.perf_counter()
            filled += count
        if aead:
            aead.decrypt_into(number.to_bytes(12, "big"), view, None, out[place : place + length])
        place, number = place + length, number + 1
    report(time.perf_counter() - watch.began)
    await stream.send_all(b"!")


async def raw_send(job: Job, *, key: bytes | None) -> None:
    """Send over trio's TCP."""
    stream = await trio.open_tcp_stream(HOST, job.connect)
    data = memoryview(bytearray(job.size))
    record = memoryview(bytearray(PIECE + 16))
    aead = AESGCM(key) if key else None
    for number, place in enumerate(range(0, job.size, PIECE)):
        piece = data[place : place + PIECE]
        if aead:
            aead.encrypt_into(number.to_bytes(12, "big"), piece, None, record[: len(piece) + 16])
            await stream.send_all(record[: len(piece) + 16])
        else:
            await stream.send_all(piece)
    await stream.receive_some(1)


# Ours


def ignore_refusal(who: str, why: str) -> None:
    """Take no note of who was refused."""
    del who, why


def our_transport(identity: Identity, suite: str) -> Any:
    """Return our transport with this suite."""
    from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport  # noqa: PLC0415 - not needed by the other stacks

    return Libp2pTransport(identity.seed(), ROSTER, ChannelTerms(suite, CHARTER))


async def our_receive(job: Job, ready: Callable[[], None], report: Callable[[float], None], *, suite: str) -> None:
    """Receive one lane into one array."""
    transport = our_transport(RECEIVER, suite)
    done = trio.Event()

    async def on_lane(kind: LaneKind, lane: IncomingLane) -> None:
        del kind
        out = memoryview(bytearray(job.size))
        await lane.read_into(out[:1])
        began = time.perf_counter()
        await lane.read_into(out[1:])
        report(time.perf_counter() - began)
        done.set()

    async with transport.run([f"/ip4/{HOST}/tcp/{job.listen}"], on_lane, ignore_refusal):
        ready()
        await done.wait()


async def our_send(job: Job, *, suite: str) -> None:
    """Write one lane in pieces."""
    transport = our_transport(SENDER, suite)

    async def ignore(kind: LaneKind, lane: IncomingLane) -> None:
        del kind
        await lane.reset()

    async with transport.run([f"/ip4/{HOST}/tcp/0"], ignore, ignore_refusal):
        peer: PeerId = RECEIVER.peer_id
        await transport.connect(peer, [f"/ip4/{HOST}/tcp/{job.connect}"], Seconds(20.0))
        lane = await transport.open(peer, LaneKind.BULK)
        data = memoryview(bytearray(job.size))
        for place in range(0, job.size, PIECE):
            await lane.write(data[place : place + PIECE])
        await lane.close()


# Stock py-libp2p


def stock_host(identity: Identity) -> Any:
    """Return a host as py-libp2p makes it, with Noise and yamux only."""
    from libp2p import create_yamux_muxer_option, new_host  # noqa: PLC0415
    from libp2p.crypto.ed25519 import create_new_key_pair  # noqa: PLC0415
    from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair  # noqa: PLC0415
    from libp2p.security.noise.transport import PROTOCOL_ID, Transport  # noqa: PLC0415

    keys = create_new_key_pair(identity.seed())
    noise = Transport(keys, noise_privkey=create_noise_key_pair().private_key)
    return new_host(key_pair=keys, sec_opt={PROTOCOL_ID: noise}, muxer_opt=create_yamux_muxer_option())


async def stock_receive(job: Job, ready: Callable[[], None], report: Callable[[float], None]) -> None:
    """Receive one stream."""
    from multiaddr import Multiaddr  # noqa: PLC0415

    host = stock_host(RECEIVER)
    done = trio.Event()

    async def on_stream(stream: Any) -> None:
        watch = Stopwatch(job.size)
        while True:
            data = await stream.read(PIECE)
            if watch.add(len(data)):
                break
        report(time.perf_counter() - watch.began)
        await stream.write(b"!")
        done.set()

    host.set_stream_handler("/benchmark/1", on_stream)
    async with host.run(listen_addrs=[Multiaddr(f"/ip4/{HOST}/tcp/{job.listen}")]):
        ready()
        await done.wait()
        with trio.move_on_after(5):
            await host.close()


async def stock_send(job: Job) -> None:
    """Write one stream."""
    from libp2p.peer.id import ID  # noqa: PLC0415
    from libp2p.peer.peerinfo import PeerInfo  # noqa: PLC0415
    from multiaddr import Multiaddr  # noqa: PLC0415

    host = stock_host(SENDER)
    async with host.run(listen_addrs=[Multiaddr(f"/ip4/{HOST}/tcp/0")]):
        peer = ID.from_base58(RECEIVER.peer_id)
        await host.connect(PeerInfo(peer, [Multiaddr(f"/ip4/{HOST}/tcp/{job.connect}")]))
        stream = await host.new_stream(peer, ["/benchmark/1"])
        data = bytes(job.size)
        for place in range(0, job.size, PIECE):
            await stream.write(data[place : place + PIECE])
        await stream.read(1)
        with trio.move_on_after(5):
            await host.close()


# gRPC


def certificate() -> tuple[bytes, bytes]:
    """Return a key and a certificate for this machine, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder(
            name, name, key.public_key(), x509.random_serial_number(), now, now + datetime.timedelta(1)
        )
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    plain = serialization.NoEncryption()
    return key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain), signed.public_bytes(pem)


def grpc_receive(
    job: Job, ready: Callable[[], None], report: Callable[[float], None], *, tls: tuple[bytes, bytes]
) -> None:
    """Receive a client stream of 1 MiB messages over TLS."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415
    from threading import Event  # noqa: PLC0415

    import grpc  # noqa: PLC0415

    done = Event()

    def sink(messages: Iterator[bytes], context: Any) -> bytes:
        del context
        watch = Stopwatch(job.size)
        for message in messages:
            watch.add(len(message))
        report(time.perf_counter() - watch.began)
        done.set()
        return b"!"

    handler = grpc.stream_unary_rpc_method_handler(sink)
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("benchmark", {"sink": handler}),))
    server.add_secure_port(f"{HOST}:{job.listen}", grpc.ssl_server_credentials([tls]))
    server.start()
    ready()
    done.wait()
    server.stop(1).wait()


def grpc_send(job: Job, *, tls: tuple[bytes, bytes]) -> None:
    """Send a client stream."""
    import grpc  # noqa: PLC0415

    options = [("grpc.ssl_target_name_override", "localhost")]
    credentials = grpc.ssl_channel_credentials(tls[1])
    message = bytes(GRPC_MESSAGE)
    with grpc.secure_channel(f"{HOST}:{job.connect}", credentials, options) as channel:
        call = channel.stream_unary("/benchmark/sink")
        call(message for _ in range(-(-job.size // GRPC_MESSAGE)))


# Running


def receiver_process(receive: Callable[..., Any], job: Job, pipe: Connection) -> None:
    """Run a receiver, tell when it listens, and what it measured."""

    def ready() -> None:
        pipe.send("ready")

    if hasattr(receive, "func") and receive.func in (grpc_receive,):
        receive(job, ready, pipe.send)
    else:
        trio.run(partial(receive, job, ready, pipe.send))


def sender_process(send: Callable[..., Any], job: Job) -> None:
    """Run a sender."""
    if hasattr(send, "func") and send.func in (grpc_send,):
        send(job)
    else:
        trio.run(partial(send, job))


def measure(receive: Callable[..., Any], send: Callable[..., Any], size: int, delay: float) -> float:
    """Return the seconds that one transfer took."""
    listen, through = free_ports(2)
    route = Route(Endpoint(HOST, through), Endpoint(HOST, listen))
    link = Link(latency=Seconds(delay))
    with proxies_in_process([route], link) if delay else contextlib.nullcontext():
        return transfer(receive, send, Job(size, listen, through if delay else listen))


def transfer(receive: Callable[..., Any], send: Callable[..., Any], job: Job) -> float:
    """Run a receiver and a sender in processes of their own; return the seconds that the receiver measured."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    receiver = context.Process(target=receiver_process, args=(receive, job, theirs), daemon=True)
    receiver.start()
    if mine.recv() != "ready":
        raise SystemExit("the receiver did not start")
    sender = context.Process(target=sender_process, args=(send, job), daemon=True)
    sender.start()
    if not mine.poll(300):
        raise SystemExit("the transfer did not end within 300 s")
    seconds: float = mine.recv()
    for process in (sender, receiver):
        process.join(20)
        process.kill()
    return seconds


def main() -> None:
    """Measure all stacks, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--delay", type=float, default=0.010, help="seconds each way in the last rows")
    options = parser.parse_args()
    size = options.megabytes * 1_000_000
    tls = certificate()
    key = bytes(range(32))
    aes, sm4 = (partial(our_receive, suite=s) for s in ("aes", "sm4"))
    stacks: dict[str, tuple[Callable[..., Any], Callable[..., Any], float]] = {
        "raw TCP": (partial(raw_receive, key=None), partial(raw_send, key=None), 0.0),
        "raw TCP + AES-256-GCM": (partial(raw_receive, key=key), partial(raw_send, key=key), 0.0),
        "p2pfl aes": (aes, partial(our_send, suite="aes"), 0.0),
        "p2pfl sm4": (sm4, partial(our_send, suite="sm4"), 0.0),
        "stock noise + yamux": (stock_receive, stock_send, 0.0),
        "gRPC stream, TLS": (partial(grpc_receive, tls=tls), partial(grpc_send, tls=tls), 0.0),
        "raw TCP, delayed": (partial(raw_receive, key=None), partial(raw_send, key=None), options.delay),
        "p2pfl aes, delayed": (aes, partial(our_send, suite="aes"), options.delay),
    }
    best = dict.fromkeys(stacks, float("inf"))
    for _ in range(options.repeats):
        for name, (receive, send, delay) in stacks.items():
            best[name] = min(best[name], measure(receive, send, size, delay))
            sys.stderr.write(f"{name}: {size / best[name] / 1e6:.0f} MB/s\n")
    report(best, size, options)


def report(best: dict[str, float], size: int, options: argparse.Namespace) -> None:
    """Print the table and the line of JSON."""
    speed = {name: size / seconds / 1e6 for name, seconds in best.items()}
    stock = speed["stock noise + yamux"]
    print(f"{options.megabytes} MB, one stream, two processes, {os.cpu_count()} cores, best of {options.repeats}\n")
    print(f"{'stack':<26}{'MB/s':>8}{'x stock':>9}")
    for name, value in speed.items():
        print(f"{name:<26}{value:>8.0f}{value / stock:>9.2f}")
    cipher = sm4_cipher_speed()
    limit = min(speed["p2pfl aes"], cipher)
    ratios = {
        "aes_over_raw_aes_gcm": (speed["p2pfl aes"] / speed["raw TCP + AES-256-GCM"], 0.8),
        "aes_over_stock": (speed["p2pfl aes"] / stock, 5.0),
        "sm4_over_its_cipher": (speed["p2pfl sm4"] / limit, 0.8),
        "sm4_over_stock": (speed["p2pfl sm4"] / stock, 1.5),
        "delayed_over_undelayed_or_link": (
            speed["p2pfl aes, delayed"] / min(speed["p2pfl aes"], speed["raw TCP, delayed"]),
            0.6,
        ),
    }
    print(f"\nSM4-GCM alone: {cipher:.0f} MB/s with one process sealing while another opens")
    targets = {
        name: {"value": round(value, 3), "target": target, "met": value >= target}
        for name, (value, target) in ratios.items()
    }
    for name, target in targets.items():
        print(f"{name:<34}{target['value']:>8}   at least {target['target']}{'' if target['met'] else '   MISSED'}")
    figures = {name: round(value, 1) for name, value in speed.items()} | {"SM4-GCM alone": round(cipher, 1)}
    print(json.dumps({"benchmark": "channel", "figures": figures, "targets": targets}))


def sm4_cipher_speed() -> float:
    """Return how many MB/s SM4-GCM carries with a process sealing and another opening at the same time, and no network.

    That is what the cipher alone allows a channel here: the two ends share the machine's cores.
    """
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    mine, theirs = context.Pipe()
    workers = [
        context.Process(target=cipher_process, args=(opens, start, theirs), daemon=True) for opens in (True, False)
    ]
    for worker in workers:
        worker.start()
    speeds = [mine.recv() for _ in workers]
    for worker in workers:
        worker.join(20)
    return min(speeds)


def cipher_process(opens: bool, start: Any, pipe: Connection) -> None:
    """Seal or open pieces of the channel's size for a second, at the same time as the other; report MB/s."""
    from p2pfl.crypto.suite import suite  # noqa: PLC0415

    aead, nonce = suite("sm4").aead(bytes(16)), bytes(12)
    piece, record = bytearray(PIECE), bytearray(PIECE + 16)
    aead.seal_into(nonce, piece, b"", memoryview(record))
    start.wait()
    began, count = time.perf_counter(), 0
    while time.perf_counter() < began + 1.0:
        if opens:
            aead.open_into(nonce, record, b"", memoryview(piece))
        else:
            aead.seal_into(nonce, piece, b"", memoryview(record))
        count += 1
    pipe.send(PIECE * count / (time.perf_counter() - began) / 1e6)


if __name__ == "__main__":
    main()
