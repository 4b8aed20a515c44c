"""How fast 100 MB cross a channel between two processes on this machine, against raw TCP, stock py-libp2p and gRPC.

    python benchmarks/channel.py [--megabytes 100] [--repeats 5] [--delay 0.010] [--only aes]

Each stack sends the same bytes over one stream of one connection on the loopback interface; the receiver times from
the first byte to the last. All stacks run in turn, `--repeats` times, and the best of each counts: interference only
ever slows. The ratios are what travels to other machines, not the megabytes. The last rows add `--delay` seconds each
way in a proxy.

The references bear what a channel must: raw TCP with AES-256-GCM seals in one process what another opens, in frames of
the same size, with OpenSSL's one call for each and nothing around it; SM4-GCM alone is a process that seals while
another opens, without a network. The CPU columns, each end's best, say what a byte costs where wall clocks say how
busy the machine was: two ends on two cores that other work shares are each slowed by more than half at times.
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
from typing import Any, NamedTuple

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


class Took(NamedTuple):
    """Seconds on the wall's clock, and of this process's CPU; of one transfer, both ends' CPU."""

    wall: float
    cpu: float
    sender_cpu: float = 0.0


Report = Callable[[Took], None]


class Stopwatch:
    """Times from when it was made, or from the first bytes that were added."""

    def __init__(self) -> None:
        self.got = 0
        self.start()

    def start(self) -> None:
        """Time from now on."""
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def add(self, count: int) -> int:
        """Count bytes, and return how many there were until now."""
        if not self.got:
            self.start()
        self.got += count
        return self.got

    def read(self) -> Took:
        """Return the time until now."""
        return Took(time.perf_counter() - self.began, time.process_time() - self.cpu_began)


# Raw TCP


async def raw_receive(job: Job, ready: Callable[[], None], report: Report, *, key: bytes | None) -> None:
    """Receive over trio's TCP, into one array; with a key, in AES-256-GCM records."""
    listener = (await trio.open_tcp_listeners(job.listen, host=HOST))[0]
    ready()
    stream = await listener.accept()
    socket = stream.socket
    out = memoryview(bytearray(job.size))
    record = memoryview(bytearray(PIECE + 16))
    aead = AESGCM(key) if key else None
    watch = Stopwatch()
    place = number = 0
    while place < job.size:
        length = min(PIECE, job.size - place)
        view = record[: length + 16] if aead else out[place : place + length]
        filled = 0
        while filled < len(view):
            count = await socket.recv_into(view[filled:])
            watch.add(count)
            filled += count
        if aead:
            aead.decrypt_into(number.to_bytes(12, "big"), view, None, out[place : place + length])
        place, number = place + length, number + 1
    report(watch.read())
    await stream.send_all(b"!")


async def raw_send(job: Job, *, key: bytes | None) -> Took:
    """Send over trio's TCP."""
    stream = await trio.open_tcp_stream(HOST, job.connect)
    data = memoryview(bytearray(job.size))
    record = memoryview(bytearray(PIECE + 16))
    aead = AESGCM(key) if key else None
    watch = Stopwatch()
    for number, place in enumerate(range(0, job.size, PIECE)):
        piece = data[place : place + PIECE]
        if aead:
            aead.encrypt_into(number.to_bytes(12, "big"), piece, None, record[: len(piece) + 16])
            await stream.send_all(record[: len(piece) + 16])
        else:
            await stream.send_all(piece)
    took = watch.read()
    await stream.receive_some(1)
    return took


# Ours


def ignore_refusal(who: str, why: str) -> None:
    """Take no note of who was refused."""
    del who, why


def our_transport(identity: Identity, suite: str) -> Any:
    """Return our transport with this suite."""
    from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport  # noqa: PLC0415 - not needed by the other stacks

    return Libp2pTransport(identity.seed(), ROSTER, ChannelTerms(suite, CHARTER))


async def our_receive(job: Job, ready: Callable[[], None], report: Report, *, suite: str) -> None:
    """Receive one lane into one array."""
    transport = our_transport(RECEIVER, suite)
    done = trio.Event()
    out = memoryview(bytearray(job.size))

    async def on_lane(kind: LaneKind, lane: IncomingLane) -> None:
        del kind
        await lane.read_into(out[:1])
        watch = Stopwatch()
        await lane.read_into(out[1:])
        report(watch.read())
        done.set()

    async with transport.run([f"/ip4/{HOST}/tcp/{job.listen}"], on_lane, ignore_refusal):
        ready()
        await done.wait()


async def our_send(job: Job, *, suite: str) -> Took:
    """Write one lane, as the payload of a message is written."""
    transport = our_transport(SENDER, suite)
    data = memoryview(bytearray(job.size))

    async def ignore(kind: LaneKind, lane: IncomingLane) -> None:
        del kind
        await lane.reset()

    async with transport.run([f"/ip4/{HOST}/tcp/0"], ignore, ignore_refusal):
        peer: PeerId = RECEIVER.peer_id
        await transport.connect(peer, [f"/ip4/{HOST}/tcp/{job.connect}"], Seconds(20.0))
        lane = await transport.open(peer, LaneKind.BULK)
        watch = Stopwatch()
        await lane.write(data)
        took = watch.read()
        await lane.close()
    return took


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


async def stock_receive(job: Job, ready: Callable[[], None], report: Report) -> None:
    """Receive one stream."""
    from multiaddr import Multiaddr  # noqa: PLC0415

    host = stock_host(RECEIVER)
    done = trio.Event()

    async def on_stream(stream: Any) -> None:
        watch = Stopwatch()
        while watch.add(len(await stream.read(PIECE))) < job.size:
            pass
        report(watch.read())
        await stream.write(b"!")
        done.set()

    host.set_stream_handler("/benchmark/1", on_stream)
    async with host.run(listen_addrs=[Multiaddr(f"/ip4/{HOST}/tcp/{job.listen}")]):
        ready()
        await done.wait()
        with trio.move_on_after(5):
            await host.close()


async def stock_send(job: Job) -> Took:
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
        watch = Stopwatch()
        for place in range(0, job.size, PIECE):
            await stream.write(data[place : place + PIECE])
        took = watch.read()
        await stream.read(1)
        with trio.move_on_after(5):
            await host.close()
    return took


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


def grpc_receive(job: Job, ready: Callable[[], None], report: Report, *, tls: tuple[bytes, bytes]) -> None:
    """Receive a client stream of 1 MiB messages over TLS."""
    from concurrent.futures import ThreadPoolExecutor  # noqa: PLC0415
    from threading import Event  # noqa: PLC0415

    import grpc  # noqa: PLC0415

    done = Event()

    def sink(messages: Iterator[bytes], context: Any) -> bytes:
        del context
        watch = Stopwatch()
        for message in messages:
            watch.add(len(message))
        report(watch.read())
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


def grpc_send(job: Job, *, tls: tuple[bytes, bytes]) -> Took:
    """Send a client stream."""
    import grpc  # noqa: PLC0415

    options = [("grpc.ssl_target_name_override", "localhost")]
    credentials = grpc.ssl_channel_credentials(tls[1])
    message = bytes(GRPC_MESSAGE)
    with grpc.secure_channel(f"{HOST}:{job.connect}", credentials, options) as channel:
        call = channel.stream_unary("/benchmark/sink")
        watch = Stopwatch()
        call(message for _ in range(-(-job.size // GRPC_MESSAGE)))
        return watch.read()


# Running


def receiver_process(receive: Callable[..., Any], job: Job, pipe: Connection) -> None:
    """Run a receiver, tell when it listens, and what it measured."""

    def ready() -> None:
        pipe.send("ready")

    if hasattr(receive, "func") and receive.func in (grpc_receive,):
        receive(job, ready, pipe.send)
    else:
        trio.run(partial(receive, job, ready, pipe.send))


def sender_process(send: Callable[..., Any], job: Job, pipe: Connection) -> None:
    """Run a sender, and tell what it took."""
    is_sync = hasattr(send, "func") and send.func in (grpc_send,)
    pipe.send(send(job) if is_sync else trio.run(partial(send, job)))


def measure(receive: Callable[..., Any], send: Callable[..., Any], size: int, delay: float) -> Took:
    """Return what one transfer took."""
    listen, through = free_ports(2)
    route = Route(Endpoint(HOST, through), Endpoint(HOST, listen))
    link = Link(latency=Seconds(delay))
    with proxies_in_process([route], link) if delay else contextlib.nullcontext():
        return transfer(receive, send, Job(size, listen, through if delay else listen))


def transfer(receive: Callable[..., Any], send: Callable[..., Any], job: Job) -> Took:
    """Run a receiver and a sender in processes of their own; return what the receiver measured, and the other's CPU."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    senders, sends = context.Pipe()
    receiver = context.Process(target=receiver_process, args=(receive, job, theirs), daemon=True)
    receiver.start()
    if mine.recv() != "ready":
        raise SystemExit("the receiver did not start")
    sender = context.Process(target=sender_process, args=(send, job, sends), daemon=True)
    sender.start()
    if not mine.poll(300):
        raise SystemExit("the transfer did not end within 300 s")
    took: Took = mine.recv()
    if not senders.poll(20):
        raise SystemExit("the sender did not end")
    sent: Took = senders.recv()
    for process in (sender, receiver):
        process.join(20)
        process.kill()
    return took._replace(sender_cpu=sent.cpu)


def main() -> None:
    """Measure all stacks, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--delay", type=float, default=0.010, help="seconds each way in the last rows")
    parser.add_argument("--only", default="", help="run the rows that have this in their name, without ratios")
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
    stacks = {name: stack for name, stack in stacks.items() if options.only in name}
    best = {name: Took(*[float("inf")] * 3) for name in stacks}
    cipher = 0.0
    for _ in range(options.repeats):
        for name, (receive, send, delay) in stacks.items():
            took = measure(receive, send, size, delay)
            best[name] = Took(*map(min, best[name], took))
            sys.stderr.write(f"{name}: {size / took.wall / 1e6:.0f} MB/s\n")
        cipher = cipher if options.only else max(cipher, sm4_cipher_speed())
    print(f"{options.megabytes} MB, one stream, two processes, {os.cpu_count()} cores, best of {options.repeats}\n")
    print(f"{'stack':<26}{'MB/s':>8}   ms of CPU to send, to receive")
    for name, took in best.items():
        wall, received, sent = took
        print(f"{name:<26}{size / wall / 1e6:>8.0f}{sent * 1e3:>20.0f}{received * 1e3:>12.0f}")
    if not options.only:
        report({name: size / took.wall / 1e6 for name, took in best.items()}, cipher)


def report(speed: dict[str, float], cipher: float) -> None:
    """Print the ratios and the line of JSON; speeds in MB/s, the last one that of SM4-GCM alone."""
    stock = speed["stock noise + yamux"]
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
