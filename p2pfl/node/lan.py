"""Members on the same local network, by mDNS (RFC 6762, 6763): told where we are, and heard where they say they are.

Whoever is on that network reads our peer id and address, and can answer under any member's name. So this is off unless
asked for, and what is heard is a hint to dial: the channel proves who is there.
"""

import ipaddress
import logging
from collections.abc import Callable, Collection, Sequence

import ifaddr
import trio
from zeroconf import (
    Error,
    InterfaceChoice,
    ServiceBrowser,
    ServiceInfo,
    ServiceStateChange,
    Zeroconf,
)

from p2pfl.core.ids import PeerId

logger = logging.getLogger(__name__)

SERVICE = "_p2pfl._tcp.local."
MOST_WAITING = 32
"""Answers that wait to be looked up; more are dropped, and come again with the next announcement."""
LOOK_UP_TIMEOUT = 3.0
"""Seconds for the address behind a name; zeroconf's own default."""


async def meet_on_lan(
    me: PeerId,
    members: Collection[PeerId],
    bound: Sequence[str],
    hint: Callable[[PeerId, str], None],
    interfaces: Sequence[str] | InterfaceChoice = InterfaceChoice.Default,
) -> None:
    """Tell the local network where this peer listens, and `hint` at the addresses of members; until cancelled.

    Args:
        me: this peer.
        members: whom to listen for.
        bound: the multiaddresses this peer listens on.
        hint: told a member and a multiaddress.
        interfaces: IP addresses of the network's interfaces; by default the one the system prefers.

    Raises:
        OSError: there is no network that takes multicast.
    """
    zeroconf = await trio.to_thread.run_sync(lambda: Zeroconf(interfaces=interfaces))
    try:
        send, names = trio.open_memory_channel[str](MOST_WAITING)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_announce, zeroconf, me, bound)
            _browse(zeroconf, frozenset(members) - {me}, send, trio.lowlevel.current_trio_token())
            async for name in names:
                await _look_up(zeroconf, name, hint)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(zeroconf.close)  # says goodbye to the network


async def _announce(zeroconf: Zeroconf, me: PeerId, bound: Sequence[str]) -> None:
    for number, (port, hosts) in enumerate(sorted(_reachable(bound).items())):
        # A service has one port; a peer that listens on several is several services.
        name = f"{me}.{SERVICE}" if number == 0 else f"{number}-{me}.{SERVICE}"
        service = ServiceInfo(SERVICE, name, port=port, parsed_addresses=hosts)
        try:
            await trio.to_thread.run_sync(zeroconf.register_service, service)
        except Error as error:  # somebody uses our name: the others find us by the charter
            logger.warning("mDNS: cannot announce this peer: %r", error)


def _reachable(bound: Sequence[str]) -> dict[int, list[str]]:
    """Return for each port the IP addresses that reach it; for one that listens everywhere those of this machine."""
    ports: dict[int, list[str]] = {}
    for address in bound:
        _, _, host, _, port = address.split("/")[:5]
        ip = ipaddress.ip_address(host)
        ports.setdefault(int(port), []).extend(_own_addresses(ip.version) if ip.is_unspecified else [host])
    return ports


def _own_addresses(version: int) -> list[str]:
    """Return this machine's addresses of IP version 4 or 6 that other machines could reach."""
    found = (ip.ip if isinstance(ip.ip, str) else ip.ip[0] for adapter in ifaddr.get_adapters() for ip in adapter.ips)
    ips = [ipaddress.ip_address(each.partition("%")[0]) for each in found]
    return [str(ip) for ip in ips if ip.version == version and not ip.is_loopback and not ip.is_link_local]


def _browse(
    zeroconf: Zeroconf, members: frozenset[PeerId], send: trio.MemorySendChannel[str], token: trio.lowlevel.TrioToken
) -> None:
    def put(name: str) -> None:
        try:
            send.send_nowait(name)
        except (trio.WouldBlock, trio.BrokenResourceError):
            logger.debug("mDNS: %s was dropped", name)

    def changed(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        del zeroconf, service_type
        if state_change is not ServiceStateChange.Removed and _peer_of(name) in members:
            try:
                token.run_sync_soon(put, name)
            except trio.RunFinishedError:
                logger.debug("mDNS: %s came after the end", name)

    ServiceBrowser(zeroconf, SERVICE, handlers=[changed])


def _peer_of(name: str) -> PeerId:
    return PeerId(name.removesuffix(f".{SERVICE}").rpartition("-")[2])


async def _look_up(zeroconf: Zeroconf, name: str, hint: Callable[[PeerId, str], None]) -> None:
    service = ServiceInfo(SERVICE, name)
    found = await trio.to_thread.run_sync(service.request, zeroconf, LOOK_UP_TIMEOUT * 1000)
    if found and service.port:
        for address in service.parsed_addresses():
            ip = ipaddress.ip_address(address.partition("%")[0])
            hint(_peer_of(name), f"/ip{ip.version}/{ip}/tcp/{service.port}")
