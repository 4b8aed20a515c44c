"""What a session knows of payloads under way."""

from dataclasses import dataclass, field

from p2pfl.core.wire import Part

LEAST_RATE = 64 * 1024.0
"""Bytes a second below which a transfer counts as failed; a guess."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A payload that comes in, and the time at which it counts as failed."""

    part: Part
    chunk: int
    until: float


@dataclass
class Traffic:
    """What is known of payloads under way, so that none is sent or asked for twice that may still come."""

    quiet_at: float
    """When the last payload came in."""
    is_fed: bool = False
    """Whether a payload began or ended to come in since the last `advance`."""
    coming: dict[int, Transfer] = field(default_factory=dict)
    """By sender: the payload that was accepted and is not here yet."""
    answered: dict[tuple[object, ...], float] = field(default_factory=dict)
    """When a member, the first of each key, was last sent this."""
    sent: set[tuple[object, ...]] = field(default_factory=set)
    """Likewise, what has been sent since the last `advance`."""
    signed_at: dict[int, float] = field(default_factory=dict)
    """Since when a chunk's result is signed and not here."""
    asked: int = 0
    """How often a result was asked for of others than its signer; each time of another holder."""


def usual_seconds(size: int) -> float:
    """Return the seconds after which so many bytes should be there: at eight times the least rate, a guess."""
    return size / LEAST_RATE / 8
