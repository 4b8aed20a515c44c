"""Peers that are away for a while or for good, a given share of all at each time, and what becomes of the rounds.

python -m p2pfl.simulation.absence --seed 1
"""

import argparse
import heapq
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from p2pfl.core.trace import RoundEnded
from p2pfl.simulation.faults import Crash, Schedule
from p2pfl.simulation.hosts import Host, stream
from p2pfl.simulation.simnet import Network
from p2pfl.simulation.soak import PATIENCE, Case, standard_network

BEGIN = 3.0
"""Virtual seconds after which the first go: all have linked by then."""
PEERS, GROUP, AWAY, ROUNDS = 24, 8, 7, 70
"""Seven of 24 are 29 %. The last of the rounds are for those that come back last."""
SECONDS = 420.0
"""Virtual seconds until all are back: with absences a round takes 7, without one."""
MEAN_AWAY = 10.0
"""Seconds; some rounds long."""


def absences(seed: int, peers: int, away: int, seconds: float, mean: float) -> Schedule:
    """Return crashes that keep `away` of the peers away at each time; as one comes back, another goes.

    Args:
        seed: equal seeds draw equal absences.
        peers: how many there are.
        away: how many of them are away at a time.
        seconds: virtual seconds until all are back.
        mean: of the seconds that one is away; exponential, at least a tenth of it.
    """
    draw = stream(seed, "absences")
    end = BEGIN + seconds
    here = list(range(peers))
    crashes: list[Crash] = []
    back: list[tuple[float, int]] = []

    def leave(at: float) -> None:
        place = here.pop(draw.randrange(len(here)))
        until = min(end, at + max(mean / 10, draw.expovariate(1 / mean)))
        crashes.append(Crash(at, place, until - at, silent=draw.random() < 0.3))
        heapq.heappush(back, (until, place))

    for _ in range(away):
        leave(BEGIN)
    while back[0][0] < end:
        at, place = heapq.heappop(back)
        leave(at)
        here.append(place)
    return Schedule(tuple(crashes))


def lasting_absences(seed: int, peers: int, away: int) -> Schedule:
    """Return crashes after which `away` of the peers never come back."""
    places = stream(seed, "absences").sample(range(peers), away)
    return Schedule(tuple(Crash(BEGIN, place, None) for place in sorted(places)))


def absence_network(seed: int, *, lasting: bool, log: bool = False) -> Network:
    """Return the network of 24 peers in masked groups of 8, ready to run.

    Args:
        seed: of everything.
        lasting: whether the same peers are away to the end; else others in turn.
        log: whether to keep what happens.
    """
    faults = lasting_absences(seed, PEERS, AWAY) if lasting else absences(seed, PEERS, AWAY, SECONDS, MEAN_AWAY)
    case = Case(seed, "none", faults, peers=PEERS, group=GROUP, rounds=ROUNDS, masked=True)
    return standard_network(case, strict=False, log=log)


@dataclass(frozen=True)
class Story:
    """What came of a run.

    Attributes:
        ended: how rounds with training ended, over those that are left and their rounds.
        passed: rounds with training that had ended for somebody when the last one came back, or at the end.
        fewest: the fewest rounds whose average anybody took over who is left.
        models: how many different ones those that are left end with.
        waiting: how many of them have not finished.
        seconds: virtual.
    """

    ended: Counter[str]
    passed: int
    fewest: int
    models: int
    waiting: int
    seconds: float

    def share(self, *outcomes: str) -> float:
        """Return how large a part of all ends these are."""
        return sum(self.ended[each] for each in outcomes) / max(1, self.ended.total())


def story(network: Network) -> Story:
    """Return what came of a run that has ended."""
    left = [peer for peer in network.peers if not peer.gone]
    lasting = len(left) < len(network.peers)
    until = network.now if lasting else network.faults.healed_at
    records = {peer: _records(peer) for peer in left}
    return Story(
        ended=Counter(record.outcome for each in records.values() for _, record in each),
        passed=max((record.round + 1 for each in records.values() for at, record in each if at <= until), default=0),
        fewest=min(
            sum(record.outcome in ("full", "late", "partial") for _, record in each) for each in records.values()
        ),
        models=len({peer.adopted[-1][1].tobytes() for peer in left}),
        waiting=sum(not peer.finished for peer in left),
        seconds=network.now,
    )


def _records(peer: Host) -> list[tuple[float, RoundEnded]]:
    """Return a peer's records of rounds with training, over all its lives, each with its time."""
    return [(at, event) for at, event in peer.events if isinstance(event, RoundEnded) and not event.settling]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one seed from the command line, and say what came of it."""
    parser = argparse.ArgumentParser(description="24 peers, seven of them away at each time.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lasting", action="store_true", help="the same seven, to the end")
    options = parser.parse_args(arguments)
    network = absence_network(options.seed, lasting=options.lasting)
    network.run(PATIENCE)
    sys.stdout.write(f"{story(network)}\n")


if __name__ == "__main__":
    main()
