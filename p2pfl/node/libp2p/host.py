"""Our transport over a libp2p host: who may connect, which streams are lanes, and how all of it ends.

Owns the host's life, the roster's gate and the table of incoming lanes. Patches nothing: that is `guard`.
"""

import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import trio
from libp2p import new_host
from libp2p.abc import IMuxedConn, ISecureConn, ISecureTransport
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_noise_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.config import ConnectionConfig
from libp2p.network.stream.net_stream import NetStream
from libp2p.peer.id import ID
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from multiaddr import Multiaddr

from p2pfl.core.errors import AddressInUse, InvalidConfig, OutOfTurn, RemoteError, TransportError, Unreachable
from p2pfl.core.ids import PeerId, Seconds
from p2pfl.crypto.suite import suite
from p2pfl.node.libp2p import guard
from p2pfl.node.libp2p.addresses import parse, resolve
from p2pfl.node.libp2p.channel import ChannelTransport
from p2pfl.node.libp2p.choice import SecurityChoice
from p2pfl.node.libp2p.gate import RosterGate, explain, objection_in
from p2pfl.node.libp2p.lanes import StreamIncomingLane, StreamOutgoingLane, StreamTalk
from p2pfl.node.libp2p.relay import RENEW_EVERY, Relay, circuit_of, dial_through, expect_circuits, reserve
from p2pfl.node.libp2p.tcp import CONNECTIONS_PER_PEER, ByteCount, TcpTransport, is_address_in_use
from p2pfl.node.libp2p.yamux import YamuxConnection
from p2pfl.node.transport import LaneHandler, LaneKind, OutgoingLane, RefusalHandler, Talk, TalkHandler

logger = logging.getLogger(__name__)

PROTOCOLS = {kind: TProtocol(f"/p2pfl/{kind}/1") for kind in LaneKind}
"""What each kind of lane is called in multistream-select."""

HANDSHAKE_DEADLINE = 10.0
"""Seconds a stranger's connection may take to prove who it is; libp2p's own default."""

OPEN_DEADLINE = 10.0
"""Seconds a peer may take to accept a lane; libp2p's own default for a stream."""

GOODBYE_DEADLINE = 1.0
"""Seconds spent on telling peers that we leave, before the sockets are closed on them; a guess."""

NO_ANSWER = "no answer"
"""How the reason begins where an address let a dial wait until its time was over, as behind most firewalls."""

MAX_CONNECTIONS = 1 << 20
"""Places in libp2p's own count, in which strangers and members are one. Never reached: `tcp` bounds each of them."""


@dataclass(frozen=True)
class ChannelTerms:
    """What both ends of a channel must hold in common.

    Attributes:
        suite: the cipher suite's name.
        charter: the charter's hash, 32 bytes.
    """

    suite: str
    charter: bytes


class Libp2pTransport:
    """See `p2pfl.node.transport.Transport`.

    Args:
        private_key: the 32-byte seed of the peer's Ed25519 key.
        roster: the peers that may connect, looked up anew at each handshake and lane; a charter's never changes. Who
            changes it says so with `roster_changed`.
        channel: the suite and charter of our own channel, the one security transport that is offered then; None
            offers libp2p's standard Noise instead, which other implementations speak, and which knows no charter.
        muxer: what carries streams over a secured connection; `guard.GuardedYamux` is libp2p's own, with its worst
            faults mended. On the wire they are the same.
        relay: whether this peer leads members to members that cannot be dialled.

    Raises:
        InvalidConfig: the key has another length, the suite is not there, or the libp2p installed is one we do not
            know.
    """

    def __init__(
        self,
        private_key: bytes,
        roster: Collection[PeerId],
        channel: ChannelTerms | None,
        muxer: Callable[[ISecureConn, ID], IMuxedConn] = YamuxConnection,
        relay: bool = False,
    ) -> None:
        guard.verify_version()
        guard.silence()
        if len(private_key) != 32:
            raise InvalidConfig(f"an Ed25519 private key has 32 bytes, not {len(private_key)}")
        self._key_pair = create_new_key_pair(private_key)
        self._identity = PeerId(str(ID.from_pubkey(self._key_pair.public_key)))
        self._roster = roster
        self._channel = channel
        self._suite = None if channel is None else suite(channel.suite, clock=time.perf_counter)
        self._muxer = muxer
        self._offers_relay = relay
        self._relay: Relay | None = None
        self._relays: set[PeerId] = set()
        self._count = ByteCount()
        self._host: BasicHost | None = None
        self._tcp = TcpTransport(self._count)
        self._dialling: dict[PeerId, trio.Lock] = {}
        self._incoming: dict[tuple[PeerId, LaneKind], StreamIncomingLane] = {}
        self._talks: dict[tuple[PeerId, str], StreamTalk] = {}

    @property
    def identity(self) -> PeerId:
        """Our own peer id."""
        return self._identity

    @property
    def bytes_in(self) -> int:
        """Bytes received from sockets so far, everything above TCP included."""
        return self._count.received

    @property
    def bytes_out(self) -> int:
        """Bytes written to sockets so far, everything above TCP included."""
        return self._count.sent

    def run(
        self, listen: Sequence[str], on_lane: LaneHandler, on_refused: RefusalHandler
    ) -> AbstractAsyncContextManager[Sequence[str]]:
        """Listen, and accept lanes from the roster, while the context lasts; see the interface.

        Leaving it, cancelled or not, closes every socket. What the body raises leaves it as it is, in no group.

        Raises:
            AddressInUse: an address is taken.
            InvalidConfig: an address cannot be bound, with the reason.
            OutOfTurn: it runs already.
            TransportError: libp2p itself failed.
        """
        return self._run([parse(address) for address in listen], on_lane, on_refused)

    @asynccontextmanager
    async def _run(
        self, listen: list[Multiaddr], on_lane: LaneHandler, on_refused: RefusalHandler
    ) -> AsyncIterator[Sequence[str]]:
        if self._host is not None:
            raise OutOfTurn("this transport runs already")
        self._tcp = TcpTransport(self._count, on_refused)
        host = self._host = self._new_host(on_refused)
        self._accept_lanes(host, on_lane, on_refused)
        if self._offers_relay:
            self._relay = Relay(host, self.is_connected)
        failure: BaseException | None = None
        try:
            async with host.run(listen_addrs=[]):
                try:
                    yield await self._listen(host, listen)
                except trio.Cancelled:
                    raise
                except BaseException as error:  # noqa: BLE001 - raised below, outside libp2p's nurseries and their groups
                    failure = error
                finally:
                    await self._shut_down(host)
        except Exception as error:
            if failure is None:
                raise TransportError(f"libp2p failed: {explain(error)}") from error
        finally:
            self._tcp.abort_all()
            self._host = None
            self._incoming.clear()
            self._talks.clear()
        if failure is not None:
            raise failure

    def _new_host(self, on_refused: RefusalHandler) -> BasicHost:
        # multistream-select is not authenticated: whatever is listed here can be forced on us. So one is.
        security = self._security(on_refused)
        muxers = {guard.YAMUX: self._muxer}
        host = new_host(
            key_pair=self._key_pair,
            sec_opt=security,
            muxer_opt=muxers,
            connection_config=ConnectionConfig(
                min_connections=0,
                low_watermark=0,
                high_watermark=MAX_CONNECTIONS,
                max_connections=MAX_CONNECTIONS,
                max_connections_per_peer=CONNECTIONS_PER_PEER,
                inbound_upgrade_timeout=HANDSHAKE_DEADLINE,
                outbound_upgrade_timeout=HANDSHAKE_DEADLINE,
                outbound_stream_protocol_negotiation_timeout=OPEN_DEADLINE,
                inbound_stream_protocol_negotiation_timeout=OPEN_DEADLINE,
            ),
            transports=[self._tcp],
            disable_identify_address_discovery=True,
        )
        guard.harden(host, muxers, SecurityChoice(security, on_refused))
        return host

    def _security(self, on_refused: RefusalHandler) -> dict[TProtocol, ISecureTransport]:
        if self._suite is None or self._channel is None:
            noise = NoiseTransport(self._key_pair, noise_privkey=create_noise_key_pair().private_key)
            return {NOISE: RosterGate(noise, self._identity, self._roster, on_refused)}
        channel = ChannelTransport(self._suite, self._key_pair, self._channel.charter, self._roster, on_refused)
        return {channel.protocol: channel}

    async def _listen(self, host: BasicHost, listen: list[Multiaddr]) -> Sequence[str]:
        for address in listen:
            (first, _), _ = address.items()
            if not first.name.startswith("ip"):
                raise InvalidConfig(f"{address}: listen on an IP address, such as /ip4/0.0.0.0/tcp/4001")
            if not await host.get_network().listen(address):
                error = self._tcp.bind_error
                if error is not None and is_address_in_use(error):
                    raise AddressInUse(
                        f"{address} is taken by another process: stop it, or listen on another port"
                    ) from error
                raise InvalidConfig(f"cannot listen on {address}: {error}") from error
        return [str(address) for listener in self._tcp.listeners for address in listener.get_addrs()]

    async def _shut_down(self, host: BasicHost) -> None:
        """Say goodbye on all connections at once, then close the sockets of those that do not listen."""
        with trio.CancelScope(shield=True):
            with trio.move_on_after(GOODBYE_DEADLINE):
                await self._close(host.get_network().get_connections())
            self._tcp.abort_all()
            with trio.move_on_after(GOODBYE_DEADLINE):
                await host.close()

    async def _close(self, connections: Sequence[object]) -> None:
        async with trio.open_nursery() as nursery:
            for connection in connections:
                nursery.start_soon(_close_quietly, connection)

    def _accept_lanes(self, host: BasicHost, on_lane: LaneHandler, on_refused: RefusalHandler) -> None:
        def handler_of(kind: LaneKind) -> object:
            async def handle(stream: NetStream) -> None:
                await self._serve(kind, stream, on_lane, on_refused)

            return handle

        for kind, protocol in PROTOCOLS.items():
            host.set_stream_handler(protocol, handler_of(kind))

    async def _serve(self, kind: LaneKind, stream: NetStream, on_lane: LaneHandler, on_refused: RefusalHandler) -> None:
        peer = PeerId(str(stream.muxed_conn.peer_id))
        if peer not in self._roster:  # it left the roster after its handshake
            on_refused(peer, f"opened a {kind} lane but is not on the roster any more")
            await self.disconnect(peer)
            return
        lane = StreamIncomingLane(peer, stream)
        older = self._incoming.get((peer, kind))
        self._incoming[peer, kind] = lane
        if older is not None:
            await older.reset()
        try:
            await on_lane(kind, lane)
        except TransportError as error:
            logger.debug("a %s lane of %s ended: %s", kind, peer, error)
        except Exception as error:  # noqa: BLE001 - contained, as the interface promises
            logger.warning("the handler of a %s lane of %s failed: %r", kind, peer, error)
        finally:
            if self._incoming.get((peer, kind)) is lane:
                del self._incoming[peer, kind]
            await lane.reset()  # refuses the rest; nothing after a clean end

    def answer(self, protocol: str, handler: TalkHandler) -> None:
        """Have `handler` hold the talks that members begin under `protocol`, one at a time with each; within `run`.

        A member's newer talk breaks off its older one.

        Raises:
            OutOfTurn: the transport does not run.
        """

        async def handle(stream: NetStream) -> None:
            peer = PeerId(str(stream.muxed_conn.peer_id))
            talk = StreamTalk(peer, stream)
            if peer not in self._roster:
                await talk.reset()
                return
            older, self._talks[peer, protocol] = self._talks.get((peer, protocol)), talk
            if older is not None:
                await older.reset()
            try:
                await handler(talk)
            except (RemoteError, TransportError) as error:
                logger.debug("a talk of %s ended: %s", peer, error)
            except Exception as error:  # noqa: BLE001 - contained, as the interface promises
                logger.warning("the handler of a talk of %s failed: %r", peer, error)
            finally:
                if self._talks.get((peer, protocol)) is talk:
                    del self._talks[peer, protocol]
                await talk.reset()

        self._running().set_stream_handler(TProtocol(protocol), handle)

    async def talk(self, peer: PeerId, protocol: str) -> Talk:
        """Begin a talk on the standing connection.

        Raises:
            Unreachable: there is no connection, or the peer does not speak `protocol`.
        """
        return StreamTalk(peer, await self._open(peer, protocol))

    async def probe(self, peer: PeerId, address: str, timeout: Seconds, *, keep: bool = False) -> None:
        """Dial `address` anew, whatever stands already, and let the handshake prove who is there.

        Args:
            peer: who should be.
            address: a multiaddress; what cannot be parsed counts as one that does not answer.
            timeout: for all of it.
            keep: whether the connection stays; else it is closed at once, but for one over a relay.

        Raises:
            RemoteError: somebody is there, and one end objects to the other: `WrongCharter`, `NotAMember` and so on.
            Unreachable: nobody answers there as that peer in time; the message says why, without the address.
        """
        if peer == self._identity or peer not in self._roster:
            raise Unreachable("is this peer itself, or not on the roster")
        circuit = circuit_of(address)
        if circuit is not None and circuit.relay == self._identity:
            if not self.is_connected(peer):
                raise Unreachable("leads over this peer, to which it keeps no connection")
            return
        if circuit is not None:
            reason = await self._dial_circuit(peer, address, timeout)
            if reason is not None:
                raise Unreachable(reason)
            return
        failure: Exception = Unreachable("the name has no address")
        with trio.move_on_after(timeout):
            try:
                for each in await resolve(parse(address)):
                    try:
                        connection = await self._running().get_network().dial_addr(each, ID.from_base58(peer))
                    except Exception as error:  # noqa: BLE001 - whatever libp2p raises, the next address may answer
                        failure = objection_in(error) or Unreachable(explain(error))
                    else:
                        if not keep:
                            await _close_quietly(connection)
                        return
            except (OSError, InvalidConfig) as error:
                failure = Unreachable(str(error))
            raise failure
        raise Unreachable(f"{NO_ANSWER} in {timeout:.3g} s")

    async def connect(self, peer: PeerId, addresses: Sequence[str], timeout: Seconds) -> None:
        """Have an authenticated connection to `peer`; see the interface. Calls for one peer at once share an attempt.

        Each address gets an equal share of the time that is left, so that a silent one does not cost the next its turn.
        An address that cannot be parsed counts as one that does not answer: it may have come from another peer.

        Raises:
            Unreachable: none answered as that peer in time; the message says why for each.
        """
        if self.is_connected(peer):
            return
        if peer == self._identity or peer not in self._roster:
            raise Unreachable(f"{peer} is {'this peer itself' if peer == self._identity else 'not on the roster'}")
        failures: list[str] = []
        deadline = trio.current_time() + timeout
        turn = self._dialling.setdefault(peer, trio.Lock())
        with trio.move_on_after(timeout) as waiting:
            await turn.acquire()
        if waiting.cancelled_caught:
            raise Unreachable(f"{peer} does not answer: an earlier attempt still runs after {timeout:.3g} s")
        try:
            if self.is_connected(peer) or await self._dial_each(peer, addresses, deadline, failures):
                return
        finally:
            turn.release()
        raise Unreachable(f"{peer} does not answer: {'; '.join(failures) or 'no address is known'}")

    async def _dial_each(self, peer: PeerId, addresses: Sequence[str], deadline: float, failures: list[str]) -> bool:
        for position, text in enumerate(addresses):
            left = max(0.0, deadline - trio.current_time())
            reason = await self._dial(peer, text, left / (len(addresses) - position))
            if reason is None:
                return True
            failures.append(f"{text}: {reason}")
        return False

    async def _dial(self, peer: PeerId, text: str, seconds: float) -> str | None:
        """Dial one address, and say why it failed. Past libp2p's own dialling, its cache of failures and its delays."""
        if circuit_of(text) is not None:
            return await self._dial_circuit(peer, text, seconds)
        network = self._running().get_network()
        reason = "the name has no address"
        with trio.move_on_after(seconds):
            try:
                for address in await resolve(parse(text)):
                    try:
                        await network.dial_addr(address, ID.from_base58(peer))
                        return None
                    except Exception as error:  # noqa: BLE001 - whatever libp2p raises, the next address may answer
                        reason = explain(error)
            except (OSError, InvalidConfig) as error:
                reason = str(error)
            return reason
        return f"{NO_ANSWER} in {seconds:.3g} s"

    async def _dial_circuit(self, peer: PeerId, text: str, seconds: float) -> str | None:
        circuit = circuit_of(text)
        if circuit is None or circuit.relay in (self._identity, peer):
            return "leads over one of its own ends"
        with trio.move_on_after(seconds):
            try:
                await self.connect(circuit.relay, (circuit.address,), Seconds(seconds))
                await dial_through(self._running(), circuit.relay, peer)
                return None
            except Exception as error:  # noqa: BLE001 - whatever libp2p raises, the next address may answer
                return explain(error)
        return f"{NO_ANSWER} in {seconds:.3g} s"

    async def keep_reachable(self, addresses: Sequence[str]) -> None:
        """Keep a reservation at the relays among one's own addresses, until cancelled; at once where there is none."""
        circuits = [circuit for address in addresses if (circuit := circuit_of(address)) is not None]
        if not circuits:
            return
        self._relays = {circuit.relay for circuit in circuits}
        expect_circuits(self._running(), lambda peer: peer in self._relays)
        while True:
            for circuit in circuits:
                try:
                    await self.connect(circuit.relay, (circuit.address,), Seconds(OPEN_DEADLINE))
                    await reserve(self._running(), circuit.relay)
                except Unreachable as error:
                    logger.warning("not reachable over a relay: %s", error)
            await trio.sleep(RENEW_EVERY)

    def is_connected(self, peer: PeerId) -> bool:
        """Whether an authenticated connection to `peer` stands, whoever dialled it."""
        if self._host is None:
            return False
        connections = self._host.get_network().connections.get(ID.from_base58(peer), [])
        return any(c.muxed_conn.is_established and not c.is_closed for c in connections)

    async def open(self, peer: PeerId, kind: LaneKind) -> OutgoingLane:
        """Open a lane on the standing connection.

        Raises:
            Unreachable: there is no connection, or the peer does not answer.
        """
        return StreamOutgoingLane(peer, await self._open(peer, PROTOCOLS[kind]))

    async def _open(self, peer: PeerId, protocol: str) -> NetStream:
        if not self.is_connected(peer):
            raise Unreachable(f"{peer} is not connected")
        try:
            with trio.fail_after(OPEN_DEADLINE):
                return await self._running().new_stream(ID.from_base58(peer), [TProtocol(protocol)])
        except Exception as error:
            raise Unreachable(f"{peer} does not accept a stream of {protocol}: {explain(error)}") from error

    async def disconnect(self, peer: PeerId) -> None:
        """Close every connection to `peer`, its sockets after `GOODBYE_DEADLINE` at the latest. Never raises."""
        if self._host is None:
            return
        with trio.CancelScope(shield=True), trio.move_on_after(GOODBYE_DEADLINE):
            await self._close(self._host.get_network().get_connections(ID.from_base58(peer)))
        self._tcp.abort_peer(peer)

    async def roster_changed(self) -> None:
        """Close every connection to a peer that is not on the roster any more. Never raises."""
        over_relays = self._host.get_network().connections if self._host is not None else ()
        known = {connection.peer for connection in self._tcp.connections} | {PeerId(str(peer)) for peer in over_relays}
        gone = known - {None, *self._roster}
        async with trio.open_nursery() as nursery:
            for peer in gone:
                nursery.start_soon(self.disconnect, peer)

    def _running(self) -> BasicHost:
        if self._host is None:
            raise OutOfTurn("the transport does not run: use it inside run()")
        return self._host


async def _close_quietly(connection: object) -> None:
    try:
        await connection.close()  # type: ignore[attr-defined]
    except Exception as error:  # noqa: BLE001 - its socket is closed next, whatever it says
        logger.debug("a connection did not close cleanly: %r", error)
