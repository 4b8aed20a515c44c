"""How many rounds of averaging peers need: the table of the Moshpit repository, published and measured side by side.

    python benchmarks/moshpit.py [--restarts 100] [--failures]

Peers hold one number each, drawn from a normal distribution, and average until its variance over the peers is below
1e-9 (in brackets: 1e-4), at most 50 rounds. Peers fail with probability p in each round: they neither send nor average.
Groups have 32 members, the Moshpit grid has 32 x 32 cells. Published: mean of 10 runs in
https://github.com/yandex-research/moshpit-sgd, averaging_experiments/plot_results.ipynb (Ryabinin et al. 2021,
arXiv 2103.03239). Measured: mean over the restarts, with its standard error.

The repository's SGP shifts matrices with `numpy.roll` without an axis, which also moves entries to the next row, and
gives back rows that sum to 1, not columns: "sgp" is that, to compare like with like, "sgp (circulant)" is without it.
"""

import argparse
import json
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import NDArray

from p2pfl.gossip.schedule import Round, from_matrix, schedule

SIDE, MOST_ROUNDS, TARGETS = 32, 50, (1e-9, 1e-4)
PUBLISHED_RUNS, DEVIATIONS = 10, 4
"""A published mean is met if ours differs by at most so many standard errors of the difference."""
METHODS = ("all-reduce", "ring", "sgp", "sgp (circulant)", "random groups", "moshpit")
_COLUMNS = ("all-reduce", "ring", "sgp", "random groups", "moshpit")
PUBLISHED: dict[tuple[int, float], dict[str, tuple[float, float]]] = {
    (peers, failure): dict(zip(_COLUMNS, zip(row[::2], row[1::2], strict=True), strict=True))
    for peers, failure, row in [
        (512, 0.0, (1.0, 1.0, 50.0, 50.0, 47.6, 15.6, 6.1, 3.0, 8.2, 3.6)),
        (512, 0.001, (1.6, 1.6, 50.0, 50.0, 47.6, 15.6, 6.3, 3.0, 8.5, 3.3)),
        (512, 0.005, (10.9, 10.9, 50.0, 50.0, 47.8, 15.6, 6.3, 3.0, 8.8, 3.9)),
        (512, 0.01, (41.7, 41.7, 50.0, 50.0, 47.8, 15.6, 6.6, 3.0, 8.8, 3.9)),
        (768, 0.0, (1.0, 1.0, 50.0, 50.0, 43.2, 13.8, 6.2, 3.0, 6.0, 3.0)),
        (768, 0.001, (1.8, 1.8, 50.0, 50.0, 43.2, 13.8, 6.5, 3.0, 6.0, 3.0)),
        (768, 0.005, (28.7, 28.7, 50.0, 50.0, 43.2, 14.1, 6.6, 3.0, 6.6, 3.0)),
        (768, 0.01, (50.0, 50.0, 50.0, 50.0, 43.9, 14.2, 7.0, 3.0, 6.9, 3.0)),
        (900, 0.0, (1.0, 1.0, 50.0, 50.0, 45.0, 14.7, 6.4, 3.0, 5.0, 2.9)),
        (900, 0.001, (1.8, 1.8, 50.0, 50.0, 45.0, 14.7, 6.3, 3.0, 5.1, 2.9)),
        (900, 0.005, (50.0, 50.0, 50.0, 50.0, 45.2, 14.7, 6.7, 3.0, 5.9, 3.1)),
        (900, 0.01, (50.0, 50.0, 50.0, 50.0, 45.6, 14.9, 7.0, 3.1, 6.5, 3.0)),
    ]
}
"""By peers and probability of failure: rounds to a variance below 1e-9 and 1e-4."""

Values = NDArray[np.float64]
Step = Callable[[int, Values, NDArray[np.bool_]], Values]
"""The values after a round, from its number, the values before, and who did not fail, [peers] each."""


def mixed(round: Round, values: Values, alive: NDArray[np.bool_]) -> Values:
    """Mix; those who failed are left out, and what remains of each row is scaled to sum to 1."""
    if alive.all():
        return (round.weights * values[round.indices]).sum(axis=1)
    weights = round.weights * alive[round.indices]
    sums = weights.sum(axis=1)
    after = (weights * values[round.indices]).sum(axis=1) / np.where(sums > 0, sums, 1)
    return np.where(alive & (sums > 0), after, values)


@cache
def push_rounds(peers: int, rolled: bool) -> tuple[Round, ...]:
    """Return the repository's rounds of SGP: in round k each hears itself and those 2^k and 2^(k+1) places away."""
    rounds = []
    one = np.eye(peers)
    for power in range(int(np.log2(peers - 1))):
        matrix = one + sum(np.roll(one, 2**hop, axis=None if rolled else 1) for hop in (power, power + 1))
        rounds.append(from_matrix(matrix / matrix.sum(axis=1, keepdims=True)))
    return tuple(rounds)


def stepper(method: str, peers: int, seed: int) -> Step:
    """Return what a round does to the values."""
    if method == "all-reduce":
        return lambda _, values, alive: np.full(peers, values.mean()) if alive.all() else values
    if method == "random groups":
        return lambda number, values, alive: grouped(number, values, alive, seed)
    if method.startswith("sgp"):
        rounds = push_rounds(peers, method == "sgp")
        # The repository counts rounds from 1.
        return lambda number, values, alive: mixed(rounds[(number + 1) % len(rounds)], values, alive)
    options = {"side": SIDE} if method == "moshpit" else {}
    plan = schedule(method, peers, seed, **options)
    return lambda number, values, alive: mixed(plan.at(number), values, alive)


def grouped(number: int, values: Values, alive: NDArray[np.bool_], seed: int) -> Values:
    """Average in groups of those who did not fail."""
    there = np.flatnonzero(alive)
    after = values.copy()
    round = schedule("groups", len(there), seed, size=SIDE).at(number)
    after[there] = (round.weights * values[there][round.indices]).sum(axis=1)
    return after


def rounds_needed(method: str, peers: int, failure: float, seed: int) -> tuple[int, ...]:
    """Return after how many rounds the variance is below each target, and `MOST_ROUNDS` where it is not."""
    random = np.random.default_rng(seed)
    values = random.normal(0, 1, peers)
    step = stepper(method, peers, seed)
    needed: dict[float, int] = {}
    for number in range(MOST_ROUNDS):
        values = step(number, values, random.random(peers) >= failure)
        variance = values.var()
        for target in TARGETS:
            if variance < target:
                needed.setdefault(target, number + 1)
        if len(needed) == len(TARGETS):
            break
    return tuple(needed.get(target, MOST_ROUNDS) for target in TARGETS)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=100)
    parser.add_argument("--failures", action="store_true", help="also the rows in which peers fail")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, float | None]] = {}
    targets: dict[str, dict[str, float]] = {}
    print(f"rounds to a variance < 1e-9 (1e-4), at most {MOST_ROUNDS}; {arguments.restarts} restarts\n")
    print("peers  p      method             published        measured       standard error")
    for (peers, failure), published in PUBLISHED.items():
        if failure and not arguments.failures:
            continue
        for method in METHODS:
            runs = np.array([rounds_needed(method, peers, failure, seed) for seed in range(arguments.restarts)])
            (fine, coarse), errors = runs.mean(axis=0), runs.std(axis=0) / max(1, len(runs) - 1) ** 0.5
            known = published.get(method)
            told = f"{known[0]:.1f} ({known[1]:.1f})" if known else "-"
            measured = f"{fine:.1f} ({coarse:.1f})"
            print(f"{peers:<6} {failure:<6} {method:18} {told:16} {measured:14} {errors[0]:.2f} ({errors[1]:.2f})")
            name = "_".join([*method.replace("(", "").replace(")", "").split(), f"{peers}_peers_{failure}_failing"])
            figures[name] = {
                "published": known[0] if known else None,
                "published_1e-4": known[1] if known else None,
                "measured": round(float(fine), 2),
                "measured_1e-4": round(float(coarse), 2),
                "standard_error": round(float(errors[0]), 3),
            }
            if known and not failure:
                # Published means are of 10 runs, printed to a tenth; a run's deviation is the same there.
                error = 0.05 + float(errors[0]) * (1 + len(runs) / PUBLISHED_RUNS) ** 0.5 * DEVIATIONS
                met = abs(float(fine) - known[0]) <= error
                targets[name] = {"value": round(float(fine), 2), "target": known[0], "met": met}
        print()
    print(json.dumps({"benchmark": "moshpit", "figures": figures, "targets": targets}))


if __name__ == "__main__":
    main()
