"""The beacon: what groups and stars are drawn from, which no member could choose.

Each member draws a salt and puts its hash into its entry of the charter, before anybody knows another's; once it signs,
it reveals the salt. Whoever joins last knows no salt but its own, and whoever signs last can only refuse to sign.
"""

import hashlib
from collections.abc import Mapping

from p2pfl.core.canonical import canonical
from p2pfl.core.charter import Charter

COMMITMENT_DOMAIN = "p2pfl/salt-commitment/1"


def commitment_to(salt: bytes, federation: str, version: int, peer: str) -> str:
    """Return what a member's entry says of its salt, in hexadecimal.

    Args:
        salt: 32 bytes.
        federation: the charter's name.
        version: the charter's: what is revealed under one version serves no other.
        peer: the member's id, so that nobody can commit to another's salt.
    """
    return hashlib.sha256(canonical([COMMITMENT_DOMAIN, federation, version, peer, salt])).hexdigest()


def beacon_of(charter: Charter) -> bytes:
    """Return the 32 bytes that everything is drawn from that a federation draws.

    Over the salts and not the charter's hash: whoever knew all salts could else try terms until it likes the groups.
    """
    salts: Mapping[str, str] = charter.salts
    drawn = [[name, salts.get(name, "")] for name in charter.names()]
    return hashlib.sha256(canonical(["p2pfl/beacon/2", charter.name, charter.version, drawn])).digest()
