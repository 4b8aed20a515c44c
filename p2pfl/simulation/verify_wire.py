"""`p2pfl verify-wire`: what someone on the wire between two peers sees, and that the updates are not in it.

Two peers run in processes of their own, with a recording proxy between them: the charter announces the proxies'
addresses, the peers listen elsewhere. What they sent is known exactly without a hand in them: in a settling round a
peer sends the model that it adopted in the round before, and `history.f32` holds that byte for byte. The capture is
searched for every window of it.

A search that never finds anything would pass too. So the same peers run once more over a transport without
encryption (`p2pfl.simulation.plaintext`), through the same proxies and the same search, which then must find every
window.
"""

import io
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import trio
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from p2pfl.core.charter import Charter
from p2pfl.core.errors import InvalidConfig, P2pflError, RoundFailed
from p2pfl.core.ids import PeerId
from p2pfl.crypto.identity import public_key
from p2pfl.node.capture import MAX_BYTES, Capture, Connection, Ending, Endpoint, Side
from p2pfl.node.federation import CONFIG_FILE, Home, render_config
from p2pfl.node.launcher import (
    PEERS_FOLDER,
    Launcher,
    LocalFederation,
    create_federation,
    describe,
    free_ports,
)
from p2pfl.node.live import size_text
from p2pfl.node.pcap import pcap_bytes
from p2pfl.node.proxy import Proxy, Route
from p2pfl.node.store import write_atomic
from p2pfl.node.transport import LaneKind
from p2pfl.simulation.evidence import (
    WINDOW,
    KnownText,
    Match,
    Record,
    bursts,
    clear_lines,
    commonest,
    entropy,
    median_interval,
    random_entropy,
    records,
    times,
)
from p2pfl.simulation.plaintext import run_plaintext_process
from p2pfl.simulation.results import PeerRun, Run, open_run

PEERS = 2
TEXT_WIDTH = 110
REAL_FOLDER, CONTROL_FOLDER = "encrypted", "control"


@dataclass(frozen=True)
class WireSettings:
    """What the run can be told.

    Attributes:
        task: a built-in task.
        terms: tables of the charter, over those chosen here, such as `{"security": {"suite": "sm4"}}`.
        max_bytes: what the capture of one run may hold.
        limit: seconds that one run may take.
    """

    task: str = "digits"
    rounds: int = 5
    seed: int = 0
    terms: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    max_bytes: int = MAX_BYTES
    limit: float = 300.0


@dataclass(frozen=True)
class TextMatch:
    """Whether a short text that the peers know occurs in the capture.

    Attributes:
        what: the text, in words.
        why: where it travels, if at all.
        where: who sent it and at which offset; None where it does not occur.
    """

    what: str
    why: str
    where: str | None


@dataclass(frozen=True)
class Sent:
    """What is seen of one peer's sending.

    Attributes:
        bytes: in TCP streams.
        counted: what the peer's own sockets say they sent.
        received: what the other peer's sockets say they received.
        lines: of multistream-select, in the clear.
        records: how many encrypted records, from their lengths in the clear; 0 where none could be read.
        large: the commonest size among the large records (or bursts, where there are no records), and how many.
        interval: the median time between these, in seconds.
        bursts: how many bursts of bytes.
        entropy: of the bytes behind the clear lines, in bits per byte.
        encrypted: how many bytes these are.
        updates: of the updates known to be sent, in this direction.
        models: of all models of this peer, in any direction.
    """

    peer: str
    bytes: int
    counted: int
    received: int
    lines: tuple[str, ...]
    records: int
    large: tuple[int, int]
    interval: float | None
    bursts: int
    entropy: float
    encrypted: int
    updates: Match
    models: Match


@dataclass(frozen=True)
class Observation:
    """What one run shows.

    Attributes:
        connections: addresses (from, to) of those that carried bytes.
        refused: how many others there were, before the dialled peer listened.
        rounds: (training, settling).
    """

    connections: tuple[tuple[Endpoint, Endpoint], ...]
    refused: int
    parameters: int
    rounds: tuple[int, int]
    sent: tuple[Sent, ...]
    texts: tuple[TextMatch, ...]


@dataclass(frozen=True)
class Report:
    """Both runs; rich prints it.

    Attributes:
        real: the peers as they are.
        control: the same without encryption.
        faults: why it has not passed, a line each.
    """

    real: Observation
    control: Observation
    faults: tuple[str, ...]
    pcap: Path | None = None

    @classmethod
    def of(cls, real: Observation, control: Observation, pcap: Path | None = None) -> "Report":
        """Judge what was observed."""
        return cls(real, control, tuple(_faults(real, control)), pcap)

    @property
    def passed(self) -> bool:
        """Whether the control was found whole, and nothing of the real run."""
        return not self.faults

    def __rich__(self) -> Group:
        """Give what rich prints: the search's result, what an observer sees, and the verdict."""
        verdict = Text("passed" if self.passed else "FAILED", "bold green" if self.passed else "bold red")
        return Group(
            Text(f"{WINDOW}-byte windows of what the peers know, looked for at every byte on the wire"),
            Text(),
            _search_table(self),
            Text(),
            Text("What an observer sees, without any key"),
            Text(),
            *(Text(f"- {line}", overflow="fold") for line in _seen(self.real)),
            Text(),
            Text.assemble("verify-wire: ", verdict),
            *(Text(f"- {fault}", overflow="fold") for fault in self.faults),
            *([Text(f"the capture of the encrypted run is in {self.pcap}")] if self.pcap is not None else []),
        )

    def lines(self) -> list[str]:
        """Return the same as plain lines."""
        console = Console(
            file=io.StringIO(), width=TEXT_WIDTH, color_system=None, force_terminal=False, legacy_windows=False
        )
        with console.capture() as capture:
            console.print(self)
        return [line.rstrip() for line in capture.get().splitlines()]


def verify_wire(folder: Path, pcap: Path | None = None, **settings: Any) -> Report:
    """Run two peers with an observer between them, then the control, and search both captures.

    Args:
        folder: where both runs are put; made, or empty.
        pcap: where to write the capture of the encrypted run.
        settings: see `WireSettings`.

    Raises:
        InvalidConfig: a setting cannot be used, the folder is not empty, or the capture is full.
        RoundFailed: a run did not come to its end, so that nothing is known of it.
    """
    chosen = WireSettings(**settings)
    if folder.exists() and any(folder.iterdir()):
        raise InvalidConfig(f"{folder}: is not empty; name another folder for this run")
    real, capture = _run(folder / REAL_FOLDER, chosen, Launcher)
    if pcap is not None:
        write_atomic(pcap, pcap_bytes(capture))
    control, _ = _run(folder / CONTROL_FOLDER, chosen, ControlLauncher)
    return Report.of(real, control, pcap)


# The runs


class ControlLauncher(Launcher):
    """The processes of a federation that talks in the clear; for the control only."""

    def __init__(self, federation: LocalFederation) -> None:
        super().__init__(federation)
        context: ForkServerContext = multiprocessing.get_context("forkserver")
        self.processes = {
            home.config.name: context.Process(
                target=run_plaintext_process, args=(str(home.path), tell), name=home.config.name
            )
            for home, tell in zip(federation.homes, self._tell, strict=True)
        }


def _run(path: Path, settings: WireSettings, launcher: type[Launcher]) -> tuple[Observation, Capture]:
    federation = _federation(path, settings)
    federation, routes = _behind_proxies(federation)
    capture = Capture(settings.max_bytes)
    started = launcher(federation)
    trio.run(_record, started, routes, capture, settings.limit)
    failures = started.failures()
    if failures:  # a peer may end before it writes a trace
        raise RoundFailed(f"{describe(failures, PEERS)}; traces are in {path / PEERS_FOLDER}")
    run = open_run(path)
    _verify_whole(run)
    listeners = {route.listen: home.config.name for route, home in zip(routes, federation.homes, strict=True)}
    return _observe(run, capture, listeners), capture


def _federation(path: Path, settings: WireSettings) -> LocalFederation:
    chosen: Mapping[str, Mapping[str, Any]] = {
        "training": {"rounds": settings.rounds, "local_steps": 2, "batch_size": 32},
        # Without masks, so that it is the channel alone that hides the models.
        "averaging": {"topology": "exponential", "masks": "off"},
        "deadlines": {"start": 60.0, "round": 20.0},
    }
    terms = {
        table: {**chosen.get(table, {}), **settings.terms.get(table, {})} for table in {**chosen, **settings.terms}
    }
    shared = {"partition": "dirichlet", "alpha": 0.5, "peers": PEERS, "seed": settings.seed}
    path.mkdir(parents=True)
    federation = create_federation(
        path, settings.task, terms, [{**shared, "index": index} for index in range(PEERS)], settings.seed
    )
    if any(home.config.history_every != 1 for home in federation.homes):
        raise InvalidConfig("the model is too large, or the rounds too many, to keep every model; run fewer rounds")
    return federation


def _behind_proxies(federation: LocalFederation) -> tuple[LocalFederation, list[Route]]:
    """Have each peer listen elsewhere than its charter announces; return the routes from there to it."""
    announced = [_endpoint(home) for home in federation.homes]
    ports = [end.port for end in announced]
    while set(ports) & {end.port for end in announced}:
        ports = free_ports(len(announced))
    routes = [Route(end, Endpoint("127.0.0.1", port)) for end, port in zip(announced, ports, strict=True)]
    homes = []
    for home, route in zip(federation.homes, routes, strict=True):
        config = home.config.model_copy(update={"listen": (f"/ip4/{route.target.host}/tcp/{route.target.port}",)})
        write_atomic(home.path / CONFIG_FILE, render_config(config).encode())
        homes.append(Home(home.path, config, home.file))
    return LocalFederation(federation.path, tuple(homes)), routes


def _endpoint(home: Home) -> Endpoint:
    _, _, host, _, port = home.config.announce[0].split("/")
    return Endpoint(host, int(port))


async def _record(launcher: Launcher, routes: Sequence[Route], capture: Capture, limit: float) -> None:
    """Run the peers to their end, with a proxy before each.

    Raises:
        InvalidConfig: the capture is full, or a proxy cannot listen.
        RoundFailed: they do not end within `limit` seconds.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:

        async def serve(route: Route, task_status: Any) -> None:
            nonlocal failure
            try:
                await Proxy(route, capture=capture).serve(task_status=task_status)
            except P2pflError as error:
                failure = error
                nursery.cancel_scope.cancel()

        try:
            for route in routes:
                await nursery.start(serve, route)
            launcher.start()
            with trio.fail_after(limit):
                for process in launcher.processes.values():
                    await trio.lowlevel.wait_readable(process.sentinel)
        except trio.Cancelled:
            raise
        except trio.TooSlowError:
            failure = RoundFailed(f"the peers have not ended within {limit:g} s")
        except BaseException as error:  # noqa: BLE001 - raised below, outside the nursery and its group
            failure = failure or error
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(launcher.stop)
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _verify_whole(run: Run) -> None:
    """Check that both peers did all rounds with each other, or what they sent would not be known."""
    for peer in run.peers:
        if peer.outcome.kind != "done":
            how = f"{peer.outcome.kind} {peer.outcome.reason}".rstrip()
            raise RoundFailed(f"{peer.name} did not end well: {how}; its trace is in {peer.home.run_path}")
        rounds = [event for _, event in peer.rounds_ended()]
        if any(event.absent for event in rounds):
            raise RoundFailed(f"{peer.name} missed an update of the other; run it again on a quieter machine")
        if len(peer.history) != len(rounds) + 1 or not any(event.settling for event in rounds):
            raise RoundFailed(f"{peer.name} has not kept every model, or sent none in a settling round")


# The search


def _observe(run: Run, capture: Capture, listeners: Mapping[Endpoint, str]) -> Observation:
    carried = [connection for connection in capture.connections if connection.pieces]
    first = [event for _, event in run.peers[0].rounds_ended()]
    settling = sum(event.settling for event in first)
    return Observation(
        connections=tuple((connection.dialer, connection.listener) for connection in carried),
        refused=sum(connection.ending is Ending.REFUSED for connection in capture.connections),
        parameters=run.charter.model.parameters,
        rounds=(len(first) - settling, settling),
        sent=tuple(_sent(peer, run, carried, listeners) for peer in run.peers),
        texts=tuple(_find_texts(run.charter, carried, listeners)),
    )


def _side(peer: str, connection: Connection, listeners: Mapping[Endpoint, str]) -> Side:
    """Return which end is this peer's: between two peers, whoever was not dialled has dialled."""
    return Side.LISTENER if listeners[connection.listener] == peer else Side.DIALER


def _sent(peer: PeerRun, run: Run, carried: Sequence[Connection], listeners: Mapping[Endpoint, str]) -> Sent:
    (other,) = (each for each in run.peers if each.name != peer.name)
    ways = [_Way.of(connection, _side(peer.name, connection, listeners)) for connection in carried]
    units = [unit for way in ways for unit in way.units()]
    large = commonest([size for size, _ in units])
    rest = b"".join(way.stream[way.clear :] for way in ways)
    models = [row.tobytes() for row in peer.history]
    settled = sum(not event.settling for _, event in peer.rounds_ended())
    return Sent(
        peer=peer.name,
        bytes=sum(len(way.stream) for way in ways),
        counted=peer.traffic()[1],
        received=other.traffic()[0],
        lines=tuple(dict.fromkeys(line for way in ways for line in way.lines)),
        records=sum(len(way.records) for way in ways),
        large=large,
        interval=median_interval([at for size, at in units if size == large[0]]),
        bursts=sum(len(bursts(way.connection.pieces, way.side)) for way in ways),
        entropy=entropy(rest),
        encrypted=len(rest),
        # The model after the last training round was sent in the first settling round, and the last one never.
        updates=KnownText(models[settled:-1]).search(way.stream for way in ways),
        models=KnownText(models).search(connection.stream(side) for connection in carried for side in Side),
    )


@dataclass(frozen=True)
class _Way:
    """One direction of a connection, taken apart."""

    connection: Connection
    side: Side
    stream: bytes
    lines: tuple[str, ...]
    clear: int
    records: tuple[Record, ...]

    @classmethod
    def of(cls, connection: Connection, side: Side) -> "_Way":
        stream = connection.stream(side)
        text = clear_lines(stream)
        # Without a security protocol agreed on there are no records, whatever the bytes look like.
        found = records(stream, text.length, side) if text.lines else ()
        return cls(connection, side, stream, text.lines, text.length, found)

    def units(self) -> list[tuple[int, float]]:
        """Return size and time of each record, or where there are none, of each burst."""
        if not self.records:
            return [(burst.size, burst.at) for burst in bursts(self.connection.pieces, self.side)]
        at = times(self.connection.pieces, self.side, [record.offset for record in self.records])
        return [(record.size, when) for record, when in zip(self.records, at, strict=True)]


def _find_texts(
    charter: Charter, carried: Sequence[Connection], listeners: Mapping[Endpoint, str]
) -> Iterator[TextMatch]:
    streams = {}
    for number, connection in enumerate(carried):
        for peer in listeners.values():
            name = peer if len(carried) == 1 else f"{peer}, connection {number}"
            streams[name] = connection.stream(_side(peer, connection, listeners))
    for what, why, texts in _texts(charter):
        where = None
        for name, stream in streams.items():
            offsets = [offset for text in texts if (offset := stream.find(text)) >= 0]
            if offsets and where is None:
                where = f"{name}, byte {min(offsets)}"
        yield TextMatch(what, why, where)


def _texts(charter: Charter) -> Iterator[tuple[str, str, list[bytes]]]:
    """Give the short texts that the peers know: what each is, where it travels, and its forms."""
    hash = charter.hash()
    yield "charter's hash", "in every message", [hash, hash.hex().encode()]
    for member in charter.members:
        key = public_key(PeerId(member.peer_id)).public_bytes_raw()
        yield f"id and key of {member.name}", "proven in the handshake", [member.peer_id.encode(), key]
    yield "members' names", "nowhere: in the charter only", [m.name.encode() for m in charter.members]
    lanes = [f"/p2pfl/{kind}/".encode() for kind in LaneKind]
    yield "lanes' names", "negotiated for each stream", lanes
    yield "muxer's name", "negotiated after keys", [b"/yamux/", b"/mplex/"]


def _faults(real: Observation, control: Observation) -> Iterator[str]:
    for sent in control.sent:
        if not 0 < sent.updates.windows == sent.updates.found:
            yield (
                f"the search is no proof: of the plaintext control's updates of {sent.peer} it found "
                f"{sent.updates.found} windows of {sent.updates.windows}"
            )
    for sent in real.sent:
        if sent.models.found:
            yield f"{sent.models.found} windows of {sent.peer}'s models can be read, from byte {sent.models.offset}"
    for text in real.texts:
        if text.where is not None:
            yield f"the {text.what} can be read: {text.where}"
    for sent in (*real.sent, *control.sent):
        if not 0 < sent.received <= sent.bytes:
            yield (
                f"{sent.bytes} bytes of {sent.peer} were captured, but {sent.received} arrived: not all of the peers' "
                "traffic went past the observer"
            )


# The report


def _search_table(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in ("what the peers know", "encrypted", "the control", "where it travels"):
        table.add_column(title)
    for real, control in zip(report.real.sent, report.control.sent, strict=True):
        table.add_row(f"updates of {real.peer}", _count(real.updates), _count(control.updates), "in settling rounds")
        table.add_row("all its models", _count(real.models), _count(control.models), "these are, or made of, updates")
    for text, other in zip(report.real.texts, report.control.texts, strict=True):
        table.add_row(text.what, _where(text, "not there"), _where(other, "not sent"), text.why)
    return table


def _count(match: Match) -> Text:
    return Text(f"{match.found} of {match.windows}", "bold red" if match.found else "green")


def _where(text: TextMatch, absent: str) -> Text:
    return Text(absent, "green") if text.where is None else Text(text.where, "bold red")


def _seen(seen: Observation) -> Iterator[str]:
    ends = "; ".join(f"from {dialer} to {listener}" for dialer, listener in seen.connections)
    plural = "s" if len(seen.connections) > 1 else ""
    refused = f"; attempts before the other peer listened: {seen.refused}" if seen.refused else ""
    yield f"who talks to whom: {len(seen.connections)} TCP connection{plural}, {ends}{refused}"
    names = dict.fromkeys(line for sent in seen.sent for line in sent.lines)
    yield f"that they speak libp2p, and the security protocol: {', '.join(names) or 'no names'} (multistream-select)"
    yield "the handshake's first keys, made for this connection alone (Noise XX); the peers' own keys are encrypted"
    for sent in seen.sent:
        yield _volume(sent)
    training, settling = seen.rounds
    yield (
        f"from these, the model's size ({seen.parameters} values are {4 * seen.parameters} bytes) and the number of "
        f"rounds ({training} of training and {settling} of settling), when each ended and how long it took"
    )
    for sent in seen.sent:
        yield (
            f"of {sent.peer}'s {sent.encrypted} bytes behind the names, an entropy of {sent.entropy:.4f} bits a byte; "
            f"random bytes of that length have {random_entropy(sent.encrypted):.4f}"
        )
    yield (
        "updates of training rounds travel the same way, but no file keeps them: the search is for those of settling "
        "rounds, and for all models"
    )
    yield "nothing known travels as it is; that the cipher is right is for published test vectors to show"


def _volume(sent: Sent) -> str:
    size, count = sent.large
    unit = "records, whose lengths are in the clear" if sent.records else "bursts"
    pace = f", {1000 * sent.interval:.1f} ms apart (median)" if sent.interval is not None else ""
    return (
        f"{sent.peer} sends {size_text(sent.bytes)} in {sent.bursts} bursts"
        f"{f' and {sent.records} {unit}' if sent.records else ''}; {count} large ones of {size} bytes{pace}"
    )
