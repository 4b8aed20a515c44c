"""Freed memory goes back to the system."""

import subprocess
import sys

import pytest

SCRIPT = """
import numpy as np
from pathlib import Path
from p2pfl.node.memory import return_large_blocks

def anonymous():
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * 4096

assert return_large_blocks()
np.ones(20 << 20, np.uint8)  # freed: glibc would keep blocks up to this size from now on
kept, blocks, before = [], [], anonymous()
for _ in range(32):
    blocks.append(np.ones(8 << 20, np.uint8))
    kept.append(np.ones(100, np.uint8))  # lies behind a block in the heap, and keeps what is below from shrinking
most = anonymous() - before
blocks.clear()
print(most, anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc is what has the setting")
def test_large_blocks_go_back_when_they_are_freed() -> None:
    out = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    most, left = map(int, out.stdout.split())
    assert most > 200 << 20
    assert left < 8 << 20
