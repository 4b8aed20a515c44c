"""The keys of a charter's members at work: this peer's statements signed, others' checked."""

from p2pfl.core.charter import Charter
from p2pfl.core.errors import BadSignature
from p2pfl.core.statements import DOMAIN, message_to_sign
from p2pfl.crypto.identity import Signer, verify_statement


class Keyring:
    """Signs and checks statements under one charter, as `p2pfl.gossip.session` asks; members by their place."""

    def __init__(self, signer: Signer, charter: Charter) -> None:
        self._signer = signer
        self._suite = charter.security.suite
        self._charter = charter.hash()
        self._members = sorted(charter.members, key=lambda member: member.name)

    def sign(self, body: bytes) -> bytes:
        """Return this peer's signature of a statement's body."""
        return self._signer.sign(DOMAIN, message_to_sign(self._charter, body))

    def verify(self, signer: int, body: bytes, signature: bytes) -> None:
        """Check that the member at this place of the roster signed the body.

        Raises:
            BadSignature: it did not, or there is no such member.
        """
        if not 0 <= signer < len(self._members):
            raise BadSignature(f"a statement of member {signer}; there are {len(self._members)}")
        verify_statement(self._suite, self._members[signer], DOMAIN, message_to_sign(self._charter, body), signature)
