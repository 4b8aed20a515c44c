"""What a peer must not forget: what it signed and sent, and where it stands. The machine says what, the store how.

A peer uploads at most one vector for a round number and signs at most one set of survivors, over all its lives. So
both are on the disk before the first byte, and before the signature, leaves. And what its steps may tell of an example
is there before they are made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from p2pfl.core.ids import Round

SESSION_BYTES = 32


@dataclass(frozen=True, slots=True)
class Uploading:
    """From now on the update of `round` is spent, in this session (32 bytes) and no other.

    Attributes:
        rho: what that may tell of this peer's data, in zCDP (`p2pfl.core.privacy`); 0 where no noise bounds it.
    """

    round: Round
    session: bytes
    rho: float = 0.0


@dataclass(frozen=True, slots=True)
class Stepped:
    """From now on `steps` local steps of `round` may be in whatever this peer sends; see `ExampleBudget`.

    On the disk before the first of them: whether they leave in this round, in a later one, or only as momentum, they
    count. Those that a crash undoes count, too.
    """

    round: Round
    steps: int


@dataclass(frozen=True, slots=True)
class Voted:
    """The peer signed that exactly `survivors` (places in the roster) are in the sum of `session`."""

    round: Round
    session: bytes
    survivors: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where a peer stands between two rounds.

    Attributes:
        round: the next one; every lower number is over for this peer.
        base: the last adopted average, float32 [parameters].
        update: what local training added to it and no sum has taken in, float32 [parameters]; None for nothing.
        released: the round whose released average `base` is; -1 for the initial model.
        results: that average's chunks as they were signed, for others to ask for; none unless the last round's.
        mixed: whether base and update are what came of mixing what training gave last; see `p2pfl.core.machine.Train`.
    """

    round: Round
    base: NDArray[np.float32]
    update: NDArray[np.float32] | None
    released: int = -1
    results: tuple[NDArray[np.float32] | NDArray[np.uint8], ...] = ()
    mixed: bool = True


Record = Uploading | Stepped | Voted | Checkpoint


@dataclass(frozen=True, slots=True)
class Resume:
    """What a peer that starts again knows of its former lives.

    Attributes:
        checkpoint: the last good one.
        above: the peer takes part only in rounds above this number, which it may have taken part in; -1 for none.
    """

    checkpoint: Checkpoint
    above: int


def resume(checkpoint: Checkpoint, records: Sequence[Uploading | Stepped | Voted]) -> Resume:
    """Return what follows from the last good checkpoint and every durable record.

    An update that a record says was spent is gone: the sum it went into may have been released.
    """
    taken = [record.round for record in records if not isinstance(record, Stepped)]
    above = max([checkpoint.round - 1, *taken])
    spent = any(isinstance(record, Uploading) and record.round >= checkpoint.round for record in records)
    kept = replace(checkpoint, update=None) if spent else checkpoint
    return Resume(kept, above)
