"""Decentralised training algorithms, written once for simulated and real peers.

An algorithm is three pure functions of a state that can be checkpointed, over as many peers as its tensors hold.
Epidemic learning is `LocalSgd` on a random graph. AD-PSGD has no rounds: it takes an engine that has a clock.
"""

from collections.abc import Mapping
from types import MappingProxyType

from p2pfl.learning.algorithms.ad_psgd import AdPsgd
from p2pfl.learning.algorithms.algorithm import Algorithm, State, Stochastic, conclude
from p2pfl.learning.algorithms.choco import ChocoSgd, Compressor
from p2pfl.learning.algorithms.local_sgd import FedProx, LocalSgd
from p2pfl.learning.algorithms.momentum import DiLoCo, QuasiGlobalMomentum
from p2pfl.learning.algorithms.partial_sharing import PartialSharing
from p2pfl.learning.algorithms.push_sum import PushSum
from p2pfl.learning.algorithms.tracking import D2, GradientTracking, KGradientTracking

__all__ = [
    "ALGORITHMS",
    "D2",
    "AdPsgd",
    "Algorithm",
    "ChocoSgd",
    "Compressor",
    "DiLoCo",
    "FedProx",
    "GradientTracking",
    "KGradientTracking",
    "LocalSgd",
    "PartialSharing",
    "PushSum",
    "QuasiGlobalMomentum",
    "State",
    "Stochastic",
    "conclude",
]

ALGORITHMS: Mapping[str, type[Algorithm]] = MappingProxyType(
    {
        algorithm.name: algorithm
        for algorithm in (
            *(LocalSgd, FedProx, QuasiGlobalMomentum, DiLoCo, GradientTracking, KGradientTracking, D2),
            *(PushSum, ChocoSgd, PartialSharing, AdPsgd),
        )
    }
)
"""By the name that scenarios use; the options are the dataclass's fields. `ChocoSgd` also takes a compressor, and
`PartialSharing` another algorithm, which are no plain values."""
