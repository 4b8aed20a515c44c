"""The standard network under drawn faults, seed after seed: what fails is shrunk and kept.

    make soak                 until stopped, or for SOAK_SECONDS, on all cores
    p2pfl replay FILE         a case again that was kept

A case is everything a run follows from. `standard_network` says what is run.
"""

import argparse
import json
import math
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from p2pfl.core.charter import AveragingTerms, Charter, Deadlines, Member, ModelTerms, TaskTerms, TrainingTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import PeerId, Round
from p2pfl.core.ledger import Checkpoint, resume
from p2pfl.core.machine import Machine, Vector
from p2pfl.crypto.suite import suite
from p2pfl.gossip.chunks import bounds
from p2pfl.gossip.group_machine import GroupMachine, GroupPlan
from p2pfl.gossip.grouping import weight_for
from p2pfl.gossip.peer_machine import Plan
from p2pfl.gossip.secure_sum import MaskTerms
from p2pfl.gossip.star_machine import StarMachine
from p2pfl.simulation.faults import MIXES, Schedule, decode_schedule, encode_schedule, shrink
from p2pfl.simulation.invariants import (
    AgreementProven,
    AveragesComputed,
    Bounds,
    Check,
    FixedPoint,
    InvariantViolated,
    OffersAnswered,
    SpentOnce,
)
from p2pfl.simulation.simnet import Director, Disk, Network, PeerSpec, SimulatedKeyring

HORIZON = 6.0
"""Virtual seconds within which faults befall the standard network: somewhat longer than it runs without any."""
PATIENCE = 400.0
"""Virtual seconds after the last fault within which it has to finish: several times the slowest seen."""
LOCAL_STEPS, STEP_SECONDS = 10, 0.05
STRICT_EVERY = 4
"""Every fourth seed has each message encoded and decoded on its way; that takes a third more time."""
BATCH = 8
"""Runs that a process makes before it reports."""
REGRESSIONS = Path("tests/simulation/regressions")
SECRET = b"p2pfl/simulation"
CLIP = 64.0
"""Above every value that the standard network trains to."""
CHANGE_CLIP = 2.0
"""Of changes in 16-bit words: below the largest of the standard network's first rounds, so that some are cut off."""


@dataclass(frozen=True, slots=True)
class Case:
    """What a run follows from.

    Attributes:
        seed: of everything left to chance.
        mix: where the faults are drawn from; a key of `faults.MIXES`.
        faults: what goes wrong instead; None for what the mix draws.
        peers: how many.
        group: members wanted in a group.
        topology: `groups`, or an overlay, whose stars average.
        rounds: with local training.
        words: the vector's length.
        masked: whether updates are hidden in the sums.
        bits: 16 where members that share a base average changes in words of 16 bits.
        weighted: whether members weigh by samples: the i-th of n has i + 1 of at most n.
        says: what went wrong when the case was kept; for readers.
    """

    seed: int
    mix: str = "standard"
    faults: Schedule | None = None
    peers: int = 8
    group: int = 4
    rounds: int = 3
    words: int = 64
    masked: bool = False
    topology: str = "groups"
    weighted: bool = False
    bits: int = 32
    says: str = ""

    def schedule(self) -> Schedule:
        """Return what goes wrong."""
        return self.faults if self.faults is not None else MIXES[self.mix](self.seed, self.peers, HORIZON)


def _charter(
    peers: int,
    group: int,
    rounds: int,
    words: int,
    masks: Literal["on", "off"],
    topology: Any,
    samples_max: int | None,
) -> Charter:
    settle = 10 if topology == "groups" else 100
    members = tuple(
        Member(name=f"m{place:0{len(str(peers - 1))}}", peer_id=f"peer-{place}", addresses=("/memory",))
        for place in range(peers)
    )
    return Charter(
        name="simulated",
        task=TaskTerms(source="digits", sha256="0" * 64),
        model=ModelTerms(file="m.safetensors", sha256="0" * 64, parameters=words),
        training=TrainingTerms(rounds=rounds, local_steps=LOCAL_STEPS, window=2.0),
        averaging=AveragingTerms(
            topology=topology,
            masks=masks,
            group_size=group,
            settle_rounds=settle,
            weights="equal" if samples_max is None else "samples",
            samples_max=samples_max,
        ),
        deadlines=Deadlines(start=10.0, round=8.0, heartbeat=2.0, silence=6.0),
        members=members,
    )


@lru_cache(maxsize=8)
def _plans(
    peers: int, group: int, rounds: int, words: int, topology: str, *, masked: bool, weighted: bool
) -> tuple[tuple[GroupPlan, ...], tuple[Plan, ...], tuple[int, ...]]:
    masks: Literal["on", "off"] = "on" if masked else "off"
    charter = _charter(peers, group, rounds, words, masks, topology, peers if weighted else None)
    settling = () if topology == "groups" else tuple(Plan.for_peer(charter, peer) for peer in charter.roster())
    weights = tuple(weight_for(charter.averaging, place + 1) for place in range(peers))
    return tuple(GroupPlan.for_peer(charter, peer) for peer in charter.roster()), settling, weights


def plans_of(case: Case) -> tuple[tuple[GroupPlan, ...], tuple[Plan, ...], tuple[int, ...]]:
    """Return each peer's plan of the rounds, on an overlay that of the settling after them, and each peer's weight."""
    shape = (case.peers, case.group, case.rounds, case.words, case.topology)
    return _plans(*shape, masked=case.masked, weighted=case.weighted)


def standard_network(
    case: Case,
    *,
    strict: bool | None = None,
    log: bool = False,
    director: Director | None = None,
    checks: Sequence[Check] = (),
) -> Network:
    """Return the network of a case, ready to run.

    Args:
        case: what to run.
        strict: whether messages are encoded and decoded; by default for some seeds.
        log: whether to keep what happens.
        director: adds faults at what peers do.
        checks: further rules.
    """
    plans, settling, weights = plans_of(case)
    initial = np.zeros(case.words, np.float32)
    last = case.rounds if settling else math.inf
    initial.flags.writeable = False
    return Network(
        [_spec(plan, settling[plan.me] if settling else None, weights[plan.me], initial, case) for plan in plans],
        case.schedule(),
        case.seed,
        charter=plans[0].charter,
        checks=[
            SpentOnce(),
            OffersAnswered(),
            Bounds(),
            AveragesComputed(initial, bounds, FixedPoint(CLIP), last, FixedPoint(CHANGE_CLIP, 16)),
            *([] if settling else [AgreementProven()]),
            *checks,
        ],
        strict=case.seed % STRICT_EVERY == 0 if strict is None else strict,
        log=log,
        quorum=plans[0].least,
        director=director,
    )


def _spec(plan: GroupPlan, settling: Plan | None, weight: int, initial: Vector, case: Case) -> PeerSpec:
    entropy = random.Random(f"{case.seed}/entropy/{plan.me}")  # noqa: S311 - a simulation's entropy is drawn from its seed
    change_clip = CHANGE_CLIP if case.bits == 16 else None
    masks = MaskTerms(suite("aes"), 32, CLIP, entropy.randbytes, change_clip) if case.masked else None
    keyring = SimulatedKeyring(SECRET, plan.me, len(plan.roster))

    def build(disk: Disk) -> Machine:
        last = disk.checkpoint or Checkpoint(Round(0), initial, None)
        known = resume(last, disk.records) if disk.checkpoint or disk.records else None
        if settling is not None:
            return StarMachine(plan, settling, keyring, initial, known, masks, weight)
        return GroupMachine(plan, keyring, initial, known, masks, weight)

    peer = plan.roster[plan.me]
    others = tuple(plan.roster[place] for place in plan.neighbors)
    optimum = (plan.me + np.arange(plan.parameters) / plan.parameters).astype(np.float32)
    train = partial(_train, optimum)
    return PeerSpec(peer, plan.names[plan.me], build, train, others, STEP_SECONDS, keyring.sign)


def _train(
    optimum: Vector, peer: PeerId, round: Round, vector: Vector, seconds: float, mixed: bool
) -> tuple[Vector, float, int]:
    """Make gradient steps towards the peer's own optimum; at least one, and no more than fit into `seconds`."""
    del peer, round, mixed
    steps = LOCAL_STEPS if math.isinf(seconds) else min(LOCAL_STEPS, max(1, int(seconds / STEP_SECONDS)))
    distance = optimum - vector
    return vector + distance * np.float32(1 - 0.9**steps), float(distance @ distance), steps


# One case


def run_case(case: Case) -> str:
    """Run a case; return what went wrong in one line, or an empty string."""
    try:
        standard_network(case).run(PATIENCE)
    except InvariantViolated as violated:
        return violated.reason
    return ""


def shrink_case(case: Case, reason: str) -> Case:
    """Return the case with fewer faults, with which it still breaks the same rule."""

    def fails(schedule: Schedule) -> bool:
        return _rule(run_case(replace(case, faults=schedule))) == _rule(reason)

    smaller = replace(case, faults=shrink(case.schedule(), fails))
    return replace(smaller, says=run_case(smaller))


def _rule(reason: str) -> str:
    """Return what of a reason does not depend on who, when and how often."""
    return re.sub(r"(#, )*# (has|have) ", "# has ", re.sub(r"\bm?[0-9][0-9.]*", "#", reason))


# Files


def encode_case(case: Case) -> str:
    """Return the text of a case's file."""
    values = asdict(case) | {"faults": None if case.faults is None else encode_schedule(case.faults)}
    return json.dumps({"case": 1} | values, indent=1) + "\n"


def decode_case(text: str) -> Case:
    """Read a case's file.

    Raises:
        InvalidConfig: it is none.
    """
    try:
        values: dict[str, Any] = json.loads(text)
        if values.pop("case") != 1:
            raise InvalidConfig("a case of another version than 1")
        faults = values.pop("faults")
        return Case(**values, faults=None if faults is None else decode_schedule(faults))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidConfig(f"no case of the simulated network: {error!r}") from error


# Many


@dataclass(frozen=True, slots=True)
class Failure:
    """A case that went wrong."""

    case: Case
    reason: str

    def command(self) -> str:
        """Return the command that replays it."""
        usual = Case(0)
        told = [
            f" --{name} {value}"
            for name in ("group", "peers", "topology", "bits")
            if (value := getattr(self.case, name)) != getattr(usual, name)
        ]
        flags = " --masks" * self.case.masked + " --weighted" * self.case.weighted
        return f"p2pfl replay --seed {self.case.seed} --mix {self.case.mix}{''.join(told)}{flags}"


def run_cases(cases: Sequence[Case]) -> list[Failure]:
    """Run cases one after the other, and return those that went wrong."""
    return [Failure(case, reason) for case in cases if (reason := run_case(case))]


def run_seeds(seeds: range, mix: str = "standard", processes: int | None = None, **network: Any) -> list[Failure]:
    """Run the standard network under each seed, on all cores, and return those that went wrong.

    Args:
        seeds: of the cases.
        mix: where the faults are drawn from.
        processes: how many run cases; by default as many as there are cores.
        network: other fields of `Case`.
    """
    cases = [Case(seed, mix, **network) for seed in seeds]
    with worker_pool(processes) as pool:
        return [failure for batch in pool.map(run_cases, _batches(cases)) for failure in batch]


def worker_pool(processes: int | None = None) -> ProcessPoolExecutor:
    """Return processes, one for each core by default, that leave Ctrl-C to this one."""
    # Ctrl-C is for the parent alone, which then ends the others.
    ignored = (signal.SIGINT, signal.SIG_IGN)
    return ProcessPoolExecutor(processes, get_context("spawn"), initializer=signal.signal, initargs=ignored)


def _batches(cases: Sequence[Case]) -> list[Sequence[Case]]:
    return [cases[begin : begin + BATCH] for begin in range(0, len(cases), BATCH)]


def soak(seconds: float, folder: Path, say: Callable[[str], None], *, seed: int, mixes: Sequence[str]) -> int:
    """Run seeds for `seconds`, or until interrupted; shrink and keep what fails. Return how many did.

    Args:
        seconds: of real time; 0 for no limit.
        folder: where failing cases are kept.
        say: told a line at a time.
        seed: the first.
        mixes: each seed is run under each of them.
    """
    ends = time.monotonic() + seconds if seconds else math.inf
    done = failed = 0
    with worker_pool() as pool:
        running: set[Future[list[Failure]]] = set()
        try:
            while time.monotonic() < ends:
                while len(running) < 2 * (os.cpu_count() or 1):
                    cases = [Case(seed + offset, mix) for offset in range(BATCH // len(mixes)) for mix in mixes]
                    seed += BATCH // len(mixes)
                    running.add(pool.submit(run_cases, cases))
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    failures = future.result()
                    done, failed = done + BATCH, failed + len(failures)
                    for failure in failures:
                        keep(failure, folder, say)
        except KeyboardInterrupt:
            pass
        pool.shutdown(cancel_futures=True)
    say(f"{done} runs, {failed} failed")
    return failed


def keep(failure: Failure, folder: Path, say: Callable[[str], None]) -> None:
    """Shrink a failure, keep it in a file, and say how to replay it."""
    say(f"seed {failure.case.seed}, mix {failure.case.mix}: {failure.reason}")
    say(f"  again: {failure.command()}")
    smaller = shrink_case(failure.case, failure.reason)
    path = folder / f"{smaller.mix}-{smaller.seed}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(encode_case(smaller))
    count = len(smaller.schedule().faults)
    say(f"  with {count} of {len(failure.case.schedule().faults)} faults: p2pfl replay {path}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `soak` from the command line; see the Makefile."""
    parser = argparse.ArgumentParser(description="Run the simulated network under drawn faults, seed after seed.")
    parser.add_argument("--seconds", type=float, default=0.0, help="of real time; 0: until interrupted")
    parser.add_argument("--seed", type=int, help="the first; by default drawn")
    parser.add_argument("--mix", choices=list(MIXES), action="append", help="repeatable; standard and hostile if none")
    parser.add_argument("--keep", type=Path, default=REGRESSIONS, help="the folder for cases that fail")
    options = parser.parse_args(arguments)
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    mixes = options.mix or ["standard", "hostile"]

    def say(text: str) -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    say(f"from seed {seed} on, under {' and '.join(mixes)}")
    return 1 if soak(options.seconds, options.keep, say, seed=seed, mixes=mixes) else 0


if __name__ == "__main__":
    sys.exit(main())
