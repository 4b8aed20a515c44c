"""What attackers do in a simulated run: lies about their models, and poison in their data.

Pure functions. An attacker has a peer's part of the data, and trains as the honest do; then it sends something else,
the same to everybody, or what it trained on was false. Liars know what all others send in the same round, and act as
one; those among real peers' machines know themselves alone.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import Examples

Floats = NDArray[np.floating[Any]]

POISONED = 0.5
"""Of a backdoor attacker's examples: a guess, near the 20 of 64 of Bagdasaryan et al."""
PATCH = 3
"""Pixels along a side of the backdoor's patch, a guess; of inputs without rows and columns the last so many values."""
TARGET = 0
"""The class that the backdoor's patch stands for."""


@dataclass(frozen=True)
class Scene:
    """What liars know in a round. All rows are of P values.

    Attributes:
        honest: what honest peers send, [h, P].
        own: what the attackers would send if they were honest, [a, P].
        honest_before: what the honest had when the round began, on average, [P].
        own_before: what the attackers had, [a, P].
    """

    honest: Floats
    own: Floats
    honest_before: Floats
    own_before: Floats


Lie = Callable[[Scene, float, np.random.Generator], Floats]
"""Returns what attackers send, [a, P], from the scene and the attack's strength."""

Poison = Callable[[Examples, int, np.random.Generator], Examples]
"""Returns what attackers train on in place of their examples, from these and the number of classes."""


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        name: as scenarios call it.
        words: what it does, and what its strength is, for people.
        source: where it was published.
        strength: its default; nan: it has none.
        lie: what attackers send; None: what they trained.
        poison: what they train on; None: their data as they are.
        alone: whether an attacker needs to know nothing of what others send.
    """

    name: str
    words: str
    source: str
    strength: float = math.nan
    lie: Lie | None = None
    poison: Poison | None = None
    alone: bool = True


def _sign_flip(scene: Scene, strength: float, random: np.random.Generator) -> Floats:
    del random
    return scene.own_before - strength * (scene.own - scene.own_before)


def _scaling(scene: Scene, strength: float, random: np.random.Generator) -> Floats:
    del random
    return scene.own_before + strength * (scene.own - scene.own_before)


def _gaussian(scene: Scene, strength: float, random: np.random.Generator) -> Floats:
    return scene.own_before + strength * random.standard_normal(scene.own.shape).astype(scene.own.dtype)


def deviations(peers: int, attackers: int) -> float:
    """Return the z of a-little-is-enough: how many standard deviations off so many attackers among `peers` go unseen.

    The attackers need s = floor(n / 2 + 1) - a honest peers that are further off than they are; z is where the normal
    distribution has the share (n - a - s) / (n - a) below it (algorithm 3 of the paper). Few attackers have none: 0.
    """
    honest = peers - attackers
    share = (honest - (peers // 2 + 1 - attackers)) / honest
    return NormalDist().inv_cdf(share) if 0.5 < share < 1 else 0.0


def _little(scene: Scene, strength: float, random: np.random.Generator) -> Floats:
    del random
    z = strength or deviations(len(scene.honest) + len(scene.own), len(scene.own))
    lie = scene.honest.mean(0) - z * scene.honest.std(0)
    return np.broadcast_to(lie, scene.own.shape)


def _inner_product(scene: Scene, strength: float, random: np.random.Generator) -> Floats:
    del random
    update = scene.honest.mean(0) - scene.honest_before
    return np.broadcast_to(scene.honest_before - strength * update, scene.own.shape)


def _free_rider(scene: Scene, strength: float, random: np.random.Generator) -> Floats:
    return scene.own_before + strength * random.standard_normal(scene.own.shape).astype(scene.own.dtype)


def _flip_labels(examples: Examples, classes: int, random: np.random.Generator) -> Examples:
    del random
    return Examples(examples.inputs, classes - 1 - examples.targets)


def _add_backdoor(examples: Examples, classes: int, random: np.random.Generator) -> Examples:
    del classes
    chosen = torch.from_numpy(random.permutation(len(examples))[: math.ceil(POISONED * len(examples))])
    inputs, targets = examples.inputs.clone(), examples.targets.clone()
    inputs[chosen] = triggered(examples.inputs[chosen], float(examples.inputs.max()))
    targets[chosen] = TARGET
    return Examples(inputs, targets)


def triggered(inputs: Tensor, brightest: float) -> Tensor:
    """Return inputs, [n, ...], with the backdoor's patch, whose values are `brightest`: in images bottom right."""
    made = inputs.clone()
    if inputs.ndim > 2:
        made[..., -PATCH:, -PATCH:] = brightest
    else:
        made[..., -PATCH:] = brightest
    return made


ATTACKS: Mapping[str, Attack] = MappingProxyType(
    {
        attack.name: attack
        for attack in (
            Attack(
                "label-flip", "Trains on false labels: class c for class C - 1 - c. Sends what comes of it.",
                "Biggio, Nelson, Laskov 2012, arXiv 1206.6389; labels as in Fang et al. 2020, arXiv 1911.11815",
                poison=_flip_labels,
            ),
            Attack(
                "sign-flip", "Sends its model with the round's change turned round, and strength times as long.",
                "Li et al. 2019, arXiv 1811.03761, whose strength it is", 4.0, _sign_flip,
            ),
            Attack(
                "scaling", "Sends its model with the round's change strength times as long.",
                "Bagdasaryan et al. 2020, arXiv 1807.00459; the strength is a guess", 10.0, _scaling,
            ),
            Attack(
                "gaussian", "Sends the model it had, and noise whose standard deviation is the strength.",
                "Blanchard et al. 2017, arXiv 1703.02757; the strength is a guess, theirs is 200", 1.0, _gaussian,
            ),
            Attack(
                "a-little-is-enough",
                "All send what the honest do on average, less strength times their standard deviation in each "
                "coordinate; 0: as many as the paper's formula allows.",
                "Baruch, Baruch, Goldberg 2019, arXiv 1902.06156", 0.0, _little, alone=False,
            ),
            Attack(
                "inner-product",
                "All send what the honest had on average, less strength times what these changed on average.",
                "Xie, Koyejo, Gupta 2020, arXiv 1903.03936; the strength is a guess", 1.0, _inner_product,
                alone=False,
            ),
            Attack(
                "free-rider",
                "Sends the model it had, as if trained, and noise whose standard deviation is the strength.",
                "Lin, Du, Liu 2019, arXiv 1911.12560; Fraboni, Vidal, Lorenzi 2021, arXiv 2006.11901", 0.0, _free_rider,
            ),
            Attack(
                "backdoor",
                "Trains on half of its examples with a patch and the class 0, and sends its model with the round's "
                "change strength times as long. The metric backdoor is the share of other classes' held-out examples "
                "that are taken for class 0 with the patch.",
                "Gu, Dolan-Gavitt, Garg 2017, arXiv 1708.06733 (the patch); Bagdasaryan et al. 2020, arXiv 1807.00459",
                1.0, _scaling, _add_backdoor,
            ),
        )
    }
)  # fmt: skip
"""By the name that scenarios use."""


@dataclass(frozen=True)
class LoneLiar:
    """An attacker that knows nothing of others.

    Attributes:
        lie: of an attack that needs no more.
        strength: of the attack.
        draw: returns what chance is drawn from in a round, for one of the vectors that are sent in it.
        limit: the largest absolute value that can be sent; None for any.
    """

    lie: Lie
    strength: float
    draw: Callable[[int, int], np.random.Generator]
    limit: float | None

    def sent(self, before: Floats, own: Floats, round: int, width: int) -> Floats:
        """Return what it sends in a round for `own`, which it trained from `before`: [k width] each.

        The first `width` values are a model's. Vectors behind it are no models: they change from 0.
        """
        told = []
        for number, first in enumerate(range(0, len(own), width)):
            part = own[first : first + width]
            began = np.zeros_like(part) if number else before[:width]
            scene = Scene(part[None][:0], part[None], began, began[None])
            with np.errstate(over="ignore", invalid="ignore"):
                told.append(self.lie(scene, self.strength, self.draw(round, number))[0])
        lies = np.concatenate(told)
        return lies if self.limit is None else lies.clip(-self.limit, self.limit)


def poisoned(attack: Attack, examples: Examples, chosen: NDArray[np.int64], seed: int) -> Examples:
    """Return what an attacker trains on whose examples are the given ones among all, int64 [m].

    Raises:
        InvalidConfig: the attack is on classes, and the targets are none.
    """
    places = torch.from_numpy(chosen)
    own = Examples(examples.inputs[places], examples.targets[places])
    if attack.poison is None:
        return own
    classes = classes_of(attack, examples)
    return attack.poison(own, classes, np.random.Generator(np.random.PCG64(seed)))


def classes_of(attack: Attack, examples: Examples) -> int:
    """Return how many classes there are.

    Raises:
        InvalidConfig: targets are no numbers of classes.
    """
    targets = examples.targets
    if targets.is_floating_point() or targets.ndim != 1:
        raise InvalidConfig(f"{attack.name} is an attack on classes, and this task's targets are none; take another")
    return int(targets.max()) + 1


def success(predicted: Tensor, targets: Tensor) -> float:
    """Return the backdoor's success: how often the target class is predicted where it is not the true one.

    Both are classes, [n], `predicted` those of inputs with the patch. nan where all are of the target class.
    """
    others = targets != TARGET
    return float((predicted[others] == TARGET).double().mean()) if bool(others.any()) else math.nan
