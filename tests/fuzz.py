"""Feeds everything that decodes what strangers send with nonsense, for as long as one likes.

    python tests/fuzz.py [--seconds 600] [--seed N]      0 seconds: until stopped

Runs the property tests of all decoders with fresh random examples, round after round; the seed of the round that
fails is printed, and Hypothesis keeps the failing example for the next ordinary run. Memory is bounded: a decoder that
hoards fails.
"""

import argparse
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DECODERS = (
    "tests/core/test_wire.py",
    "tests/core/test_trace.py",
    "tests/core/test_settings.py",
    "tests/core/test_charter.py",
    "tests/crypto/test_noise.py",
    "tests/crypto/test_shares.py",
    "tests/crypto/test_envelope.py",
    "tests/node/libp2p/test_frames.py",
    "tests/node/libp2p/test_yamux.py",
    "tests/node/libp2p/test_channel.py",
    "tests/gossip/test_peer_machine.py",
    "tests/simulation/test_evidence.py",
)
"""Where the property tests of decoders are; ordinary tests beside them run too, and cost little."""
MEMORY_BYTES = 4 << 30


def run_round(seed: int) -> int:
    """Run all property tests once with this seed; return pytest's exit code."""
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_DATA, ({MEMORY_BYTES}, {MEMORY_BYTES}))"
    command = f"{limit}; import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    options = ["-q", "-x", "-p", "no:cacheprovider", f"--hypothesis-seed={seed}", "--no-header"]
    return subprocess.run([sys.executable, "-c", command, *options, *DECODERS], cwd=ROOT, check=False).returncode


def main() -> None:
    """Run rounds until the time is over, something fails, or the user stops it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--seed", type=int, help="run this one round only")
    options = parser.parse_args()
    if options.seed is not None:
        sys.exit(run_round(options.seed))
    end = time.monotonic() + options.seconds if options.seconds else float("inf")
    rounds = 0
    try:
        while time.monotonic() < end:
            seed = random.SystemRandom().randrange(2**32)
            print(f"round {rounds}, seed {seed}", flush=True)
            code = run_round(seed)
            if code:
                print(f"round {rounds} failed; again: {sys.executable} {os.path.relpath(__file__)} --seed {seed}")
                sys.exit(code)
            rounds += 1
    except KeyboardInterrupt:
        pass
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(f"{rounds} rounds without a finding; at most {used / 1024:.0f} MiB at a time")


if __name__ == "__main__":
    main()
