"""Multiaddresses as this transport uses them: a host, a TCP port, and nothing else.

Owns parsing and name resolution. Opens no connection.
"""

import socket

import trio
from multiaddr import Multiaddr

from p2pfl.core.errors import InvalidConfig

NAMES = {"dns": socket.AF_UNSPEC, "dns4": socket.AF_INET, "dns6": socket.AF_INET6}
"""Address protocols that hold a name, and the family they ask for."""


def parse(text: str) -> Multiaddr:
    """Read an address such as `/ip4/192.0.2.1/tcp/4001` or `/dns4/peer.example/tcp/4001`; drop a peer id at its end.

    Raises:
        InvalidConfig: it is not one.
    """
    try:
        parts = list(Multiaddr(text).items())
    except Exception as error:  # the library raises whatever its codecs do
        raise InvalidConfig(
            f"{text!r} is not a multiaddress ({error}); write one like /ip4/192.0.2.1/tcp/4001"
        ) from error
    names = [protocol.name for protocol, _ in parts]
    if names[1:] not in (["tcp"], ["tcp", "p2p"]) or names[0] not in ("ip4", "ip6", *NAMES):
        raise InvalidConfig(f"{text!r}: only TCP addresses can be used; write one like /ip4/192.0.2.1/tcp/4001")
    return Multiaddr(f"/{names[0]}/{parts[0][1]}/tcp/{parts[1][1]}")


async def resolve(address: Multiaddr) -> list[Multiaddr]:
    """Return the IP addresses behind `address`, itself where it is one already.

    Raises:
        OSError: the name is unknown, or the name server does not answer.
    """
    (first, host), (_, port) = address.items()
    if first.name not in NAMES:
        return [address]
    found = await trio.socket.getaddrinfo(host, int(port), family=NAMES[first.name], type=socket.SOCK_STREAM)
    ips = dict.fromkeys(str(sockaddr[0]) for *_, sockaddr in found)
    return [Multiaddr(f"/ip{6 if ':' in ip else 4}/{ip}/tcp/{port}") for ip in ips]
