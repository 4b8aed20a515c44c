"""A peer of another implementation: js-libp2p dials one of ours over standard Noise and yamux."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from p2pfl.core.ids import PeerId
from p2pfl.crypto.identity import Identity
from p2pfl.node.libp2p.host import Libp2pTransport
from tests.node.libp2p.libp2p_tools import LOOPBACK
from tests.trio_tools import trio_test

HERE = Path(__file__).parent
SEED = bytes([77]) * 32

pytestmark = [
    pytest.mark.interop,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (HERE / "node_modules" / "libp2p").is_dir(),
        reason="js-libp2p is not installed: run `npm ci --ignore-scripts` in tests/interop",
    ),
]


async def dial(address: str) -> subprocess.CompletedProcess[bytes]:
    command = ["node", "--import", "./polyfill.mjs", "dial.mjs", address, SEED.hex()]
    return await trio.run_process(command, cwd=HERE, capture_stdout=True, capture_stderr=True, check=False)


async def dialled(roster: set[PeerId]) -> tuple[subprocess.CompletedProcess[bytes], PeerId, list[tuple[str, str]]]:
    """How a js peer's dial ended, whom it dialled, and what that peer refused."""
    refused: list[tuple[str, str]] = []
    ours = Libp2pTransport(bytes([78]) * 32, roster, None)
    async with ours.run((LOOPBACK,), _no_lanes, lambda who, why: refused.append((who, why))) as (address,):
        return await dial(f"{address}/p2p/{ours.identity}"), ours.identity, refused


async def _no_lanes(*_: object) -> None:
    raise NotImplementedError


@trio_test
async def test_a_js_peer_dials_pings_and_identifies_us() -> None:
    stranger = Identity(SEED).peer_id
    ended, identity, refused = await dialled({stranger})
    assert ended.returncode == 0, ended.stderr.decode()[-2000:]
    seen = json.loads(ended.stdout)
    assert seen["self"] == stranger
    assert seen["peer"] == seen["identified"] == identity
    assert (seen["encryption"], seen["muxer"]) == ("/noise", "/yamux/1.0.0")
    assert seen["milliseconds"] >= 0
    assert "/ipfs/ping/1.0.0" in seen["protocols"]
    assert refused == []


@trio_test
async def test_a_js_peer_that_is_not_on_the_roster_is_refused() -> None:
    ended, _, refused = await dialled(set())
    assert ended.returncode != 0
    assert refused == [(Identity(SEED).peer_id, "is not on the roster")]
