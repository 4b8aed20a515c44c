"""How examples that lie in one place are dealt to peers, for demonstrations, tests and scenarios.

Owns the dealing and the keys of `[data]` that choose it. Must not read data. Real peers hold their own and need none
of this.
"""

from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import Examples

Indices = NDArray[np.int64]

KEYS = ("partition", "alpha", "classes", "peers", "index", "seed")
"""The keys of `[data]` that `share` reads."""


def iid(count: int, peers: int, seed: int, minimum: int = 1) -> list[Indices]:
    """Deal `count` examples at random: sizes differ by one at most. Returns `peers` sorted arrays, int64.

    Raises:
        InvalidConfig: if a peer would get fewer than `minimum`.
    """
    _verify_enough(count, peers, minimum)
    order = _random(seed).permutation(count)
    return [np.sort(part).astype(np.int64) for part in np.array_split(order, peers)]


def dirichlet(targets: ArrayLike, peers: int, alpha: float, seed: int, minimum: int = 1) -> list[Indices]:
    """Deal examples so that peers see different classes: the fewer the lower `alpha` is.

    Peer by peer, the class proportions q are drawn from Dir(alpha * C * p), where C is the number of classes and p
    are their proportions over all examples, and the peer's share is drawn by q without replacement; a class that has
    run out leaves q. The procedure is that of Hsu, Qi and Brown 2019 (arXiv 1909.06335), whose alpha is the sum of
    the parameters, C times ours; ours is each parameter where classes are equally frequent: what is commonly written
    Dir(0.5). All peers get equally many, give or take one, and every example is dealt.

    Args:
        targets: the class of each example, [n].
        peers: how many to deal to.
        alpha: above 0; towards 0 a single class for each, towards infinity all peers alike.
        seed: 0 to 2**32 - 1; equal seeds deal equally, with any version of numpy.
        minimum: the fewest examples a peer may get.

    Returns:
        For each peer the indices of its examples, sorted, int64.

    Raises:
        InvalidConfig: if a peer would get fewer than `minimum`, or alpha is not a positive number.
    """
    classes, members = np.unique(np.asarray(targets), return_inverse=True)
    _verify_enough(len(members), peers, minimum)
    _verify_alpha(alpha)
    random = _random(seed)
    piles = [random.permutation(np.flatnonzero(members == c)) for c in range(len(classes))]
    left = np.array([len(pile) for pile in piles])
    prior = left / left.sum()
    parts = []
    for quota in (len(part) for part in np.array_split(np.arange(len(members)), peers)):
        taken = _draw(random, _proportions(random, alpha * len(classes) * prior), left, quota)
        parts.append(
            np.concatenate([pile[n - t : n] for pile, n, t in zip(piles, left.tolist(), taken.tolist(), strict=True)])
        )
        left = left - taken
    return [np.sort(part).astype(np.int64) for part in parts]


def by_classes(targets: ArrayLike, peers: int, classes: int, seed: int) -> list[Indices]:
    """Deal examples so that each peer sees `classes` classes alone, drawn so that all are in equally many hands.

    Two of ten is the classic case: McMahan et al. 2017 (arXiv 1602.05629), whose shards of sorted examples hold at most
    two classes for most peers; Zhao et al. 2018 (arXiv 1806.00582). A class is dealt evenly to those who see it, and
    every example is dealt. Where classes are unequal, so are shares.

    Returns:
        For each peer the indices of its examples, sorted, int64.

    Raises:
        InvalidConfig: there are fewer classes than that, one would be nobody's, or one has too few examples for all who
            are to see it.
    """
    kinds, members = np.unique(np.asarray(targets), return_inverse=True)
    if not 1 <= classes <= len(kinds):
        raise InvalidConfig(f"{classes} classes for each peer, and there are {len(kinds)}; give each from 1 to all")
    if peers * classes < len(kinds):
        raise InvalidConfig(
            f"{peers} peers with {classes} of {len(kinds)} classes leave some to nobody; give each more"
        )
    random = _random(seed)
    held, hands = np.zeros(len(kinds), np.int64), []
    for _ in range(peers):
        # The classes in the fewest hands so far; among equals, by lot.
        chosen = np.lexsort((random.random_sample(len(kinds)), held))[:classes]
        held[chosen] += 1
        hands.append(chosen)
    piles = [random.permutation(np.flatnonzero(members == kind)) for kind in range(len(kinds))]
    for kind, (pile, count) in enumerate(zip(piles, held.tolist(), strict=True)):
        if len(pile) < count:
            raise InvalidConfig(f"class {kinds[kind]} has {len(pile)} examples for {count} peers; use fewer peers")
    parts = [iter(np.array_split(pile, count)) for pile, count in zip(piles, held.tolist(), strict=True)]
    return [np.sort(np.concatenate([next(parts[kind]) for kind in chosen])).astype(np.int64) for chosen in hands]


def by_quantity(count: int, peers: int, alpha: float, seed: int, minimum: int = 1) -> list[Indices]:
    """Deal examples at random in shares as unequal as Dir(alpha) draws them: the more so the lower alpha is.

    The quantity skew of Li et al. 2022 (arXiv 2102.02079). Each peer gets `minimum` first; every example is dealt.

    Returns:
        For each peer the indices of its examples, sorted, int64.

    Raises:
        InvalidConfig: if there are fewer than `minimum` for each, or alpha is not a positive number.
    """
    _verify_enough(count, peers, minimum)
    _verify_alpha(alpha)
    random = _random(seed)
    exact = _proportions(random, np.full(peers, float(alpha))) * (count - peers * minimum)
    sizes = np.floor(exact).astype(np.int64)
    # By largest remainders, so that the sum is right.
    sizes[np.argsort(sizes - exact, kind="stable")[: count - peers * minimum - int(sizes.sum())]] += 1
    order = random.permutation(count)
    return [np.sort(part).astype(np.int64) for part in np.split(order, np.cumsum(sizes + minimum)[:-1])]


def share(examples: Examples, settings: Mapping[str, object], also: Collection[str] = ()) -> Examples:
    """Pick one peer's share of examples that all peers can read, as its `[data]` settings say; without `peers`, all.

    Args:
        examples: the same, in the same order, on every peer.
        settings: `peers` and `index` (0 is the first), `partition` ("iid", "dirichlet" or "quantity" with `alpha`,
            "classes" with `classes`), `seed`.
        also: keys of `settings` that the task reads itself.

    Raises:
        InvalidConfig: naming the key, if a setting is unknown, missing, or out of range.
    """
    unknown = sorted(set(settings) - set(KEYS) - set(also))
    if unknown:
        known = ", ".join([*KEYS, *also])
        raise InvalidConfig(f"[data] has the unknown key {unknown[0]!r}; it may have {known}")
    if "peers" not in settings:
        lone = [key for key in KEYS if key in settings]
        if lone:
            raise InvalidConfig(f"[data] has {lone[0]!r} but no 'peers'; add how many peers share the examples")
        return examples
    mine = torch.from_numpy(_indices(examples, settings))
    return Examples(examples.inputs.index_select(0, mine), examples.targets.index_select(0, mine))


def _indices(examples: Examples, settings: Mapping[str, object]) -> Indices:
    peers = _integer(settings, "peers", 1, len(examples))
    index = _integer(settings, "index", 0, peers - 1)
    seed = _integer({"seed": 0} | dict(settings), "seed", 0, 2**32 - 1)
    kind = settings.get("partition", "iid")
    if not isinstance(kind, str) or kind not in _READS:
        raise InvalidConfig(f'[data] partition is {kind!r}; use "iid", "dirichlet", "quantity" or "classes"')
    for key in ("alpha", "classes"):
        if key in settings and key != _READS[kind]:
            raise InvalidConfig(f"[data] has {key!r} but deals {kind}, which has none; remove it, or deal otherwise")
    if kind == "iid":
        return iid(len(examples), peers, seed)[index]
    if kind == "classes":
        number = _integer(settings, "classes", 1, len(examples))
        return by_classes(examples.targets.numpy(), peers, number, seed)[index]
    alpha = settings.get("alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise InvalidConfig(f"[data] alpha is {alpha!r}; a {kind} partition needs a number such as alpha = 0.5")
    if kind == "quantity":
        return by_quantity(len(examples), peers, alpha, seed)[index]
    return dirichlet(examples.targets.numpy(), peers, alpha, seed)[index]


_READS = {"iid": "", "dirichlet": "alpha", "quantity": "alpha", "classes": "classes"}
"""What each way of dealing has a key for."""


def _integer(settings: Mapping[str, object], key: str, low: int, high: int) -> int:
    if key not in settings:
        raise InvalidConfig(f"[data] has no {key!r}; add a whole number from {low} to {high}")
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidConfig(f"[data] {key} is {value!r}; it must be a whole number from {low} to {high}")
    return value


def _verify_enough(count: int, peers: int, minimum: int) -> None:
    if peers < 1 or count // peers < minimum:
        raise InvalidConfig(f"{count} examples cannot give each of {peers} peers {minimum} or more; use fewer peers")


def _verify_alpha(alpha: float) -> None:
    if not (np.isfinite(alpha) and alpha > 0):
        raise InvalidConfig(f"alpha is {alpha}; it must be a number above 0, such as 0.5 (skewed) or 100 (alike)")


def _random(seed: int) -> np.random.RandomState:
    # Peers deal for themselves and must agree: RandomState's numbers are frozen for all versions (NEP 19),
    # a Generator's are not.
    return np.random.RandomState(seed)


def _proportions(random: np.random.RandomState, concentration: NDArray[np.float64]) -> NDArray[np.float64]:
    q: NDArray[np.float64] = random.standard_gamma(concentration)
    if q.sum() > 0:
        q /= q.sum()
        return q
    # All of a very concentrated draw underflowed: its limit is one class, drawn by the prior.
    one = random.choice(len(concentration), p=concentration / concentration.sum())
    q[one] = 1.0
    return q


def _draw(random: np.random.RandomState, q: NDArray[np.float64], left: Indices, quota: int) -> Indices:
    """How many of each class, [classes], `quota` draws by q take of what is `left`."""
    taken = np.zeros_like(left)
    while (missing := quota - int(taken.sum())) > 0:
        weights = np.where(left > taken, q, 0.0)
        if weights.sum() <= 0:  # what q asks for has run out: what remains, as it lies
            weights = (left - taken).astype(np.float64)
        weights = weights / weights.sum()
        taken = np.minimum(taken + random.multinomial(missing, weights), left)
    return taken
