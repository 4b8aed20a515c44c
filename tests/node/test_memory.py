"""Freed memory goes back to the system, or is kept for the next use; what is rarely read is left to the disk."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from p2pfl.core.errors import StoreFailed
from p2pfl.node.memory import LARGE, mapped

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


STEPS = """
import resource
import sys
import types
import numpy as np
from pathlib import Path
from p2pfl.node.memory import return_large_blocks
from p2pfl.node.peer import LocalTraining

def anonymous():
    _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
    return (resident - shared) * 4096

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

class Steps:
    def train(self, vector, *_):
        np.ones(8 << 20, np.uint8)
        before = faults()
        for _ in range(16):
            np.ones(8 << 20, np.uint8)
        self.faults = faults() - before
        return types.SimpleNamespace(vector=vector, loss=0.0, steps=16)

    def state(self):
        return b""

steps = Steps()
assert return_large_blocks()
before = anonymous()
LocalTraining(steps, 2).train(1, np.zeros(4, np.float32), 1.0, False)
held, outside = anonymous() - before, faults()
np.ones(8 << 20, np.uint8)
np.ones(8 << 20, np.uint8)
print(steps.faults, held, faults() - outside)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc is what has the setting")
def test_local_steps_use_blocks_again_and_give_them_back() -> None:
    out = subprocess.run([sys.executable, "-c", STEPS], capture_output=True, text=True, check=True, timeout=60)
    within, held, outside = map(int, out.stdout.split())
    assert 4 * within < outside, "pages that the system cleared, for 16 blocks and for 2"
    assert held < 4 << 20


AGAIN = """
import resource
import sys
import numpy as np
from p2pfl.node.memory import keep_freed_blocks

if sys.argv[1] == "keep":
    assert keep_freed_blocks()
np.ones(64 << 20, np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    np.ones(64 << 20, np.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is what has the setting")
def test_freed_blocks_are_used_again_without_the_system() -> None:
    def faults(word: str) -> int:
        command = [sys.executable, "-c", AGAIN, word]
        return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)

    assert 4 * faults("keep") < faults("as it is")


def test_a_large_vector_is_left_to_the_disk_and_its_file_has_no_name(tmp_path: Path) -> None:
    vector = np.arange(LARGE, dtype=np.float32)
    found = mapped(vector, tmp_path)
    assert isinstance(found, np.memmap)
    assert not found.flags.writeable
    np.testing.assert_array_equal(found, vector)
    assert list(tmp_path.iterdir()) == []
    small = np.ones(10, np.float32)
    assert mapped(small, tmp_path) is small
    with pytest.raises(StoreFailed, match="make room"):
        mapped(vector, tmp_path / "nowhere")
