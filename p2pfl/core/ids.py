"""The names of things, as types: a peer id is never mistaken for a member's name, nor seconds for a count."""

from typing import NewType

PeerId = NewType("PeerId", str)
"""A libp2p peer id in base58btc: the multihash of the peer's public key."""

Round = NewType("Round", int)
"""The number of a round under one charter, from 0."""

Seconds = NewType("Seconds", float)
"""A duration, or a point on a monotonic clock, in seconds."""
