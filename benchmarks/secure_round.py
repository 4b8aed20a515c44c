"""What hiding each update costs: a group's round, plain against masked, in time, processor time, bytes and memory.

    python benchmarks/secure_round.py [--parameters 0.1 1 25] [--rounds 4] [--only TEXT]

The rows are whole peers (`measured_peers.py`): processes that meet over libp2p on the loopback interface, average, and
keep checkpoints; only the training is replaced by a ready vector. All of them share two cores. The first round is not
counted. A round's seconds go from when the last peer has its vector until the last has the average; the checkpoint
that follows is not in them. CPU is a peer's mean in the best round: interference only ever adds. `secure` is the part
of it that is masking, unmasking and commitments, `check` the check of the sums, each timed by its thread's own clock
where it happens; what the line of JSON has of each further part adds decoding, and the protocol's machine. Bytes are
those written to sockets.

With dropouts, two of eight peers are killed in the second round, after they uploaded and before they acknowledged.
On shaped links each peer has a network namespace, joined by `veth` to a bridge, with `tc tbf` at both ends.

hivemind (optional) needs other versions than p2pfl of what both use: install it in an environment of its own, and name
that one's Python in P2PFL_HIVEMIND_PYTHON.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from measured_peers import KILL_ROUND, VICTIMS, Case, CaseFailed, RoundCost, ring_bits, run_case
from round import run_demo, seconds_per_round

from p2pfl.node.launcher import interrupted_by_signals

MILLION = 1_000_000
LARGEST = 25.0
CORES = 2
MEMBERS, FEW = 8, 4
HERE = Path(__file__).parent
HIVEMIND_PYTHON = os.environ.get("P2PFL_HIVEMIND_PYTHON", sys.executable)
HIVEMIND_BYTES, HIVEMIND_SECONDS = 100_000_000, 150.0
MEMORY_EXTRA = 64 << 20
HEAD = """
    M peers             bits drops  links      best s median  CPU s secure  check  round sent/x chunk/x mem/x  rss/x"""


@dataclass(frozen=True)
class Row:
    """A case, and what its counted rounds took.

    Attributes:
        seconds: of each counted round.
        cpu: CPU seconds of a peer in the best round: of averaging.
        round_cpu: the same of the whole round, the checkpoint and what others still ask for included.
        secure: the part of it that is masking, unmasking and commitments.
        check: the part of it that is the check of sums.
        sent: bytes a peer writes to sockets in a round, the mean.
        chunks: bytes of chunks among them.
        anonymous: the most anonymous memory of a peer while averaging, beyond the process without vectors.
        resident: the same of all memory, pages of mapped files included.
        parts: CPU seconds of a peer in the best round, by what they are.
    """

    case: Case
    seconds: tuple[float, ...]
    cpu: float
    round_cpu: float
    secure: float
    check: float
    sent: float
    chunks: float
    anonymous: int
    resident: int
    parts: dict[str, float]

    @property
    def best(self) -> float:
        """Seconds of the best round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)


def summed(case: Case, peers: list[list[RoundCost]]) -> Row:
    """Sum up the counted rounds of a case.

    Raises:
        CaseFailed: a counted round was not full, or somebody was missing in it who was not killed.
    """
    first = KILL_ROUND if case.dropouts else 1
    counted = [[rounds[number] for rounds in peers] for number in range(first, case.rounds)]
    others = case.members - 1 - case.dropouts
    for costs in counted:
        bad = [cost for cost in costs if cost.outcome != "full" or cost.heard != others]
        if bad:
            raise CaseFailed(f"round {bad[0].round} was {bad[0].outcome} with {bad[0].heard} others")

    def best(value: Callable[[RoundCost], float]) -> float:
        return min(statistics.mean(map(value, costs)) for costs in counted)

    def mean(value: Callable[[RoundCost], float]) -> float:
        return statistics.mean(value(cost) for costs in counted for cost in costs)

    kinds = sorted({kind for costs in counted for cost in costs for kind in cost.computed})
    parts = {kind: best(lambda cost, kind=kind: cost.computed.get(kind, 0.0)) for kind in kinds}
    return Row(
        case,
        tuple(max(c.averaged for c in costs) - max(c.trained for c in costs) for costs in counted),
        best(lambda cost: cost.cpu),
        best(lambda cost: cost.round_cpu),
        best(lambda cost: cost.secure_cpu),
        best(lambda cost: cost.check_cpu),
        mean(lambda cost: cost.sent),
        mean(lambda cost: sum(cost.payload.values())),
        max(cost.anonymous for costs in counted for cost in costs),
        max(cost.resident for costs in counted for cost in costs),
        parts | {"machine": best(lambda cost: cost.handled)},
    )


def name_of(case: Case) -> str:
    """Return a case's name among the figures."""
    bits = "" if case.bits is None or not case.masks else f"_{case.bits}_bits"
    shaped = "_1_gbit" if case.shaped else ""
    masks = "masked" if case.masks else "plain"
    parameters = f"{case.parameters / MILLION:g}m"
    return f"{parameters}_{case.members}_peers_{case.suite}_{masks}{bits}_{case.dropouts}_dropouts{shaped}"


def show(row: Row) -> None:
    """Print a line of the table."""
    case, size = row.case, row.case.vector_bytes
    what = f"{case.suite} {'masked' if case.masks else 'plain'}"
    bits = "" if case.bits is None or not case.masks else str(case.bits)
    links = "1 Gbit/s" if case.shaped else "loopback"
    print(
        f"{case.parameters / MILLION:>5g} {case.members:>5} {what:<11} {bits:>4} {case.dropouts:>5}  {links:<9}"
        f"{row.best:>8.3f}{row.median:>7.3f}{row.cpu:>7.3f}{row.secure:>7.3f}{row.check:>7.3f}{row.round_cpu:>7.3f}"
        f"{row.sent / size:>7.3f}{row.chunks / size:>8.3f}{row.anonymous / size:>6.2f}{row.resident / size:>7.2f}",
        flush=True,
    )


def cases(millions: Sequence[float], rounds: int, seconds: float) -> list[Case]:
    """Return what is measured, small vectors first."""
    found = []
    for parameters in [round(million * MILLION) for million in millions]:
        for dropouts in (0, len(VICTIMS)):
            for suite in ("aes", "sm4"):
                base = Case(parameters, MEMBERS, suite, masks=False, dropouts=dropouts, seconds=seconds)
                base = replace(base, rounds=KILL_ROUND + 1 if dropouts else rounds)
                found += [base, *(replace(base, masks=True, bits=bits) for bits in ring_bits())]
        few = Case(parameters, FEW, "aes", masks=False, rounds=rounds, seconds=seconds)
        for shaped in (False, True):
            kept = ring_bits() if shaped else ring_bits()[:1]
            found += [replace(few, shaped=shaped)]
            found += [replace(few, shaped=shaped, masks=True, bits=bits) for bits in kept]
    return found


def measure(case: Case) -> Row:
    """Run a case; one on shaped links in a namespace that is its own.

    Raises:
        CaseFailed: it cannot be run here, or did not end well.
    """
    if not case.shaped:
        return summed(case, run_case(case))
    missing = [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]
    if missing:
        raise CaseFailed(f"there is no {' and no '.join(missing)}")
    command = ["unshare", "--map-root-user", "--net", sys.executable, str(HERE / "measured_peers.py")]
    out, reason = run_alone([*command, json.dumps(asdict(case))], 2 * case.seconds)
    if not out:
        raise CaseFailed(reason)
    return summed(case, [[RoundCost(**cost) for cost in rounds] for rounds in json.loads(out)])


def run_alone(command: Sequence[str], seconds: float) -> tuple[str, str]:
    """Run a command; return what it printed if it ended well, and else why not. None of its children is left."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, said = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return "", f"not over after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    ended = f"ended with {process.returncode}"
    return ("", (said.strip().splitlines() or [ended])[-1]) if process.returncode else (out, "")


def hivemind() -> tuple[list[float], str]:
    """Return the seconds of each step of hivemind's averager, and why there are none.

    Its peers do not always find each other, so they get a second chance.
    """
    _, reason = run_alone([HIVEMIND_PYTHON, "-c", "import hivemind"], HIVEMIND_SECONDS)
    command = [HIVEMIND_PYTHON, str(HERE / "hivemind_round.py"), "--bytes", str(HIVEMIND_BYTES), "--peers", str(FEW)]
    steps: list[float] = []
    for _ in range(0 if reason else 2):
        out, reason = run_alone(command, HIVEMIND_SECONDS)
        steps = json.loads(out)["seconds"] if out else []
        if steps:
            break
    return steps, reason or "no step had all peers"


def demo_round() -> float:
    """Return the median seconds of a masked round of the demo, start to start."""
    with tempfile.TemporaryDirectory(prefix="p2pfl-bench-") as folder:
        _, rounds = run_demo(Path(folder) / "run", "groups")
    return statistics.median(seconds_per_round(rounds))


def target(value: float, limit: float, *, least: bool = False) -> dict[str, Any]:
    """Return a figure beside the target it must stay under, or reach."""
    return {"value": round(value, 4), "target": limit, "met": value >= limit if least else value <= limit}


def targets_of(rows: Sequence[Row], millions: float, steps: Sequence[float], demo: float | None) -> dict[str, Any]:
    """Return each target that this run says something of."""
    parameters = round(millions * MILLION)

    def row(members: int, *, masks: bool, bits: int | None = None, shaped: bool = False) -> Row | None:
        for each in rows:
            case = each.case
            same = (case.parameters, case.members, case.suite, case.dropouts) == (parameters, members, "aes", 0)
            if same and (case.masks, case.shaped) == (masks, shaped) and (not masks or case.bits == bits):
                return each
        return None

    widest, narrow = ring_bits()[0], ring_bits()[-1]
    plain, masked = row(MEMBERS, masks=False), row(MEMBERS, masks=True, bits=widest)
    shaped = [row(FEW, masks=masks, bits=widest if masks else None, shaped=True) for masks in (False, True)]
    four, short = row(FEW, masks=True, bits=widest), row(MEMBERS, masks=True, bits=narrow)
    found: dict[str, Any] = {}
    if masked is not None:
        size = masked.case.vector_bytes
        found["secure_cpu_seconds"] = target(masked.secure, 0.30)
        found["sent_over_vector_32_bits"] = target(masked.sent / size, 1.95)
        found["memory_bytes"] = target(masked.anonymous, 3 * size + MEMORY_EXTRA)
        if plain is not None:
            found["masked_over_plain_8_peers"] = target(masked.best / plain.best, 2.3)
    if short is not None and short.case.bits == 16:
        found["sent_over_vector_16_bits"] = target(short.sent / short.case.vector_bytes, 1.0)
    if shaped[0] is not None and shaped[1] is not None:
        found["masked_over_plain_4_peers_1_gbit"] = target(shaped[1].best / shaped[0].best, 1.3)
    if four is not None and steps:
        ours, theirs = four.case.vector_bytes / four.best, HIVEMIND_BYTES / min(steps)
        found["speed_over_hivemind"] = target(ours / theirs, 3.0, least=True)
    if demo is not None:
        found["demo_masked_round_seconds"] = target(demo, 0.25)
    return found


def measure_all(wanted: Sequence[Case], most: float) -> tuple[list[Row], dict[str, str]]:
    """Measure and print a row for each case; return them, and why others are missing."""
    rows: list[Row] = []
    failed: dict[str, str] = {}
    waited: dict[bool, tuple[int, float]] = {}
    for case in wanted:
        try:
            if case.dropouts and case.masks in waited:
                verify_bearable(case, *waited[case.masks], most)
            row = measure(case)
        except CaseFailed as error:
            failed[name_of(case)] = str(error)
            print(f"{name_of(case)}: {error}", flush=True)
            continue
        show(row)
        rows.append(row)
        if case.dropouts:
            waited[case.masks] = (case.parameters, row.best)
    return rows, failed


def verify_bearable(case: Case, parameters: int, seconds: float, most: float) -> None:
    """Check that a round with dropouts may be over in time, by one with fewer parameters.

    Raises:
        CaseFailed: not if its waits grow with the length.
    """
    expected = seconds * case.parameters / parameters
    if case.parameters > parameters and expected > most:
        raise CaseFailed(f"not run: at {parameters / MILLION:g} M it took {seconds:.0f} s, so here {expected:.0f} s")


def main() -> None:
    """Measure, print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, nargs="+", default=[0.1, 1.0, LARGEST], help="in millions")
    parser.add_argument("--rounds", type=int, default=4, help="the first is not counted")
    parser.add_argument("--seconds", type=float, default=300.0, help="after which a row is given up")
    parser.add_argument("--only", default="", help="run the rows that have this in their name; no demo, no hivemind")
    options = parser.parse_args()
    millions = sorted(options.parameters)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])

    with interrupted_by_signals():  # so that no peer is left behind
        run(options, millions)


def run(options: argparse.Namespace, millions: Sequence[float]) -> None:
    """Measure and print everything that was asked for."""
    load = os.getloadavg()[0]
    print(
        f"{CORES} cores, load {load:.1f} before; {options.rounds} rounds, the first not counted; |x| is 4 bytes a value"
    )
    print(HEAD)
    wanted = [case for case in cases(millions, options.rounds, options.seconds) if options.only in name_of(case)]
    rows, failed = measure_all(wanted, options.seconds)
    steps: list[float] = []
    demo = None
    if not options.only:
        demo = demo_round()
        print(f"\na masked round of `p2pfl demo`: {1e3 * demo:.0f} ms, the median, start to start")
        steps, reason = hivemind()
        if steps:
            speed = HIVEMIND_BYTES / min(steps) / 1e6
            print(
                f"hivemind, {FEW} peers of {HIVEMIND_BYTES / 1e6:.0f} MB: "
                f"{min(steps):.2f} s, {speed:.1f} MB/s per peer, the best of {len(steps)}"
            )
        else:
            failed["hivemind"] = reason
            print(f"hivemind: skipped: {reason}; set P2PFL_HIVEMIND_PYTHON to a Python that has it")

    figures: dict[str, Any] = {"load_before": round(load, 2), "hivemind_seconds": steps, "not_measured": failed}
    for row in rows:
        figures[name_of(row.case)] = {
            "seconds": [round(each, 4) for each in row.seconds],
            "cpu_seconds": round(row.cpu, 4),
            "round_cpu_seconds": round(row.round_cpu, 4),
            "secure_cpu_seconds": round(row.secure, 4),
            "parts_cpu_seconds": {kind: round(seconds, 4) for kind, seconds in row.parts.items()},
            "sent_bytes": round(row.sent),
            "chunk_bytes": round(row.chunks),
            "anonymous_bytes": row.anonymous,
            "resident_bytes": row.resident,
        }
    targets = targets_of(rows, millions[-1], steps, demo)
    print()
    for name, found in targets.items():
        verdict = "met" if found["met"] else "MISSED"
        print(f"{name:<36}{found['value']:>16,.4f}   target {found['target']:>14,.2f}   {verdict}")
    print(json.dumps({"benchmark": "secure_round", "figures": figures, "targets": targets}))


if __name__ == "__main__":
    main()
