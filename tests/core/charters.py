"""A charter as its file has it, for tests that change one thing."""

from typing import Any

from p2pfl.crypto.beacon import commitment_to
from p2pfl.crypto.identity import Identity, salt_of

IDENTITIES = {name: Identity(bytes([number]) * 32) for number, name in enumerate(("ant", "bee", "cat"), 1)}


def charter_values() -> dict[str, Any]:
    """Return the tables of a charter with every setting and three members, not signed."""
    return {
        "name": "meadow",
        "version": 1,
        "task": {"source": "digits", "sha256": "1" * 64},
        "model": {"file": "initial.safetensors", "sha256": "2" * 64, "parameters": 4810},
        "training": {
            "algorithm": "d-psgd",
            "rounds": 60,
            "local_steps": 2,
            "batch_size": 32,
            "window": 0.0,
            "clip_norm": 0.0,
        },
        "averaging": {
            "topology": "ring",
            "edges": [],
            "regroup": "each-round",
            "group_size": 8,
            "colluders": 1,
            "topology_seed": 0,
            "masks": "off",
            "weights": "equal",
            "alpha_min": 0.5,
            "clip": 64.0,
            "tolerance": 1e-6,
            "settle_rounds": 500,
            "bits": 32,
            "audit": "full",
        },
        "security": {"suite": "aes", "channel": "suite"},
        "deadlines": {"start": 300.0, "round": 60.0, "heartbeat": 5.0, "silence": 20.0},
        "members": [
            {
                "name": name,
                "peer_id": identity.peer_id,
                "addresses": [f"/dns4/{name}.example/tcp/4001"],
                "salt_commitment": commitment_to(salt_of(identity, "meadow", 1), "meadow", 1, identity.peer_id),
            }
            for name, identity in IDENTITIES.items()
        ],
        "signatures": {},
        "salts": {},
    }
