"""mDNS: two peers of one machine find each other over its loopback interface."""

import socket
import struct

import pytest
import trio

from p2pfl.core.ids import PeerId
from p2pfl.node.lan import _reachable, meet_on_lan
from p2pfl.node.launcher import free_ports
from p2pfl.node.libp2p.host import ChannelTerms, Libp2pTransport
from tests.node.test_links import CHARTER, IDENTITIES, PEERS, living
from tests.trio_tools import trio_test


def takes_multicast() -> str:
    """Why mDNS cannot be tried here, or nothing."""
    group = ("224.0.0.251", 5353)
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            listener.bind(group)
            there = struct.pack("4s4s", socket.inet_aton(group[0]), socket.inet_aton("127.0.0.1"))
            listener.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, there)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
            sender.sendto(bytes(12), group)
            listener.settimeout(1.0)
            listener.recv(100)
        except OSError as error:
            return f"the loopback interface takes no multicast here: {error}"
    return ""


NO_MULTICAST = takes_multicast()
needs_multicast = pytest.mark.skipif(bool(NO_MULTICAST), reason=NO_MULTICAST or "it does")


def test_what_is_told_is_where_the_peer_can_be_reached() -> None:
    bound = ["/ip4/192.0.2.7/tcp/4001", "/ip6/2001:db8::7/tcp/4001", "/ip4/192.0.2.8/tcp/4002"]
    assert _reachable(bound) == {4001: ["192.0.2.7", "2001:db8::7"], 4002: ["192.0.2.8"]}
    assert not any(host.startswith("127.") for host in _reachable(["/ip4/0.0.0.0/tcp/4001"])[4001])


@pytest.mark.slow
@needs_multicast
@trio_test
async def test_members_are_found_and_strangers_are_not_heard() -> None:
    me, other, stranger = PEERS[:3]
    found: dict[PeerId, str] = {}
    heard = trio.Event()

    def hint(peer: PeerId, address: str) -> None:
        found[peer] = address
        heard.set()

    def nothing(peer: PeerId, address: str) -> None:
        raise AssertionError("nobody it knows is there")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(meet_on_lan, stranger, [], ["/ip4/127.0.0.1/tcp/4003"], nothing, ["127.0.0.1"])
        nursery.start_soon(meet_on_lan, other, [], ["/ip4/127.0.0.1/tcp/4002"], nothing, ["127.0.0.1"])
        nursery.start_soon(meet_on_lan, me, [me, other], ["/ip4/127.0.0.1/tcp/4001"], hint, ["127.0.0.1"])
        await heard.wait()
        nursery.cancel_scope.cancel()
    assert found == {other: "/ip4/127.0.0.1/tcp/4002"}


@pytest.mark.slow
@needs_multicast
@trio_test
async def test_peers_whose_addresses_are_all_wrong_are_linked_over_the_lan() -> None:
    dead, *ports = free_ports(3)
    wrong = dict.fromkeys(PEERS[:2], (f"/ip4/127.0.0.1/tcp/{dead}",))
    places = [f"/ip4/127.0.0.1/tcp/{port}" for port in ports]
    transports = [
        Libp2pTransport(identity.seed(), PEERS[:2], ChannelTerms("aes", CHARTER)) for identity in IDENTITIES[:2]
    ]
    async with (
        living(transports[0], wrong, listen=[places[0]]) as left,
        living(transports[1], wrong, listen=[places[1]]) as right,
        trio.open_nursery() as nursery,
    ):
        for watch, me, place in ((left, PEERS[0], places[0]), (right, PEERS[1], places[1])):
            nursery.start_soon(meet_on_lan, me, PEERS[:2], [place], watch.links.hint, ["127.0.0.1"])
        await left.until(lambda: left.up == {PEERS[1]})
        await right.until(lambda: right.up == {PEERS[0]})
        nursery.cancel_scope.cancel()
