"""The charter: what all members agree on before round 0. Hashed, signed by each, and its hash in every message.

A draft is a charter that some members have not signed. Anything that two peers must hold in common to average stands
here, and nothing that is one peer's own business (that is `p2pfl.core.config`).
"""

import hashlib
import re
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from p2pfl.core.canonical import canonical
from p2pfl.core.ids import PeerId
from p2pfl.core.settings import Settings

Topology = Literal["groups", "exponential", "ring", "complete", "random-regular"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sm2Key = Annotated[str, Field(pattern=r"^04[0-9a-f]{128}$")]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def check_name(name: str) -> str:
    """Return `name` if it can name a member or a federation: it becomes a folder and a key in tables.

    Raises:
        ValueError: it cannot.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no name: up to 63 letters, digits, '.', '_' and '-', the first a letter or a digit"
        )
    return name


def _check_file(name: str) -> str:
    if not name or name != PurePosixPath(name).name or name == ".." or not name.isprintable() or "\\" in name:
        raise ValueError(f"{name!r} is not the name of a file beside the charter")
    return name


class Member(Settings):
    """An organisation's peer.

    Attributes:
        sm2_public_key: the uncompressed point in hexadecimal, where the suite signs with SM2; None elsewhere.
    """

    name: str
    peer_id: str
    addresses: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    sm2_public_key: Sm2Key | None = None

    _check_name = field_validator("name")(check_name)


class TaskTerms(Settings):
    """What is trained: a built-in task's name, or `file.py:ClassName` beside the charter, and that file's SHA-256."""

    source: str
    sha256: Sha256

    @field_validator("source")
    @classmethod
    def _is_beside(cls, source: str) -> str:
        file, colon, _ = source.rpartition(":")
        if colon:
            _check_file(file)
        return source


class ModelTerms(Settings):
    """The common initial model: a safetensors file beside the charter.

    Attributes:
        parameters: how many float32 values of it are averaged.
    """

    file: str
    sha256: Sha256
    parameters: Annotated[int, Field(ge=1)]

    _check_file = field_validator("file")(_check_file)


class TrainingTerms(Settings):
    """What each peer does in a round. The defaults are those that the task `digits` was measured with.

    Attributes:
        window: seconds after which a peer begins no further local step in a round, so that a slow one contributes what
            it has; 0 for no limit.
        clip_norm: a round's local update is scaled down to this L2 norm; 0 leaves it as it is.
    """

    algorithm: Literal["d-psgd"] = "d-psgd"
    rounds: Annotated[int, Field(ge=0, le=10_000_000)] = 60
    local_steps: Annotated[int, Field(ge=1)] = 2
    batch_size: Annotated[int, Field(ge=1)] = 32
    window: Annotated[float, Field(ge=0, le=10_000_000, allow_inf_nan=False)] = 0.0
    clip_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0


class AveragingTerms(Settings):
    """Who averages with whom, and until when.

    The tolerance is far below what moves a prediction of the built-in tasks; the limit of rounds is a guess.

    Attributes:
        topology: an overlay on which neighbors average; or `groups`, drawn anew each round.
        group_size: members wanted in a group; a group has up to twice as many, less one.
        colluders: how many members may work together without being able to forge an average or drag the others along.
        topology_seed: draws the overlay of `random-regular`.
        masks: whether single updates are hidden: in groups only, where no two sums overlap, and there unless said
            otherwise.
        weights: whether all members weigh the same in an average, or by their samples: alpha = samples / samples_max.
        samples_max: the largest number of samples that a member has; there where weights = samples, and only there.
        alpha_min: the least such weight: with tiny weights a sum is nearly one peer's vector.
        clip: under masks, the largest absolute value of a model's parameter or buffer that is represented; a sum's
            fixed point is this fine, divided by 2^31 and multiplied by the members.
        tolerance: after the last training round the peers average until the consensus distance is below this.
        settle_rounds: at most so many rounds of that.
    """

    topology: Topology = "groups"
    group_size: Annotated[int, Field(ge=3, le=32)] = 8
    colluders: Annotated[int, Field(ge=0, le=30)] = 1
    topology_seed: Annotated[int, Field(ge=0)] = 0
    masks: Literal["on", "off"] = "on"
    weights: Literal["equal", "samples"] = "equal"
    samples_max: Annotated[int, Field(ge=1, le=2**53)] | None = None
    alpha_min: Annotated[float, Field(ge=1e-3, le=1, allow_inf_nan=False)] = 0.5
    clip: Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)] = 64.0
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    settle_rounds: Annotated[int, Field(ge=0, le=100_000)] = 500

    @model_validator(mode="before")
    @classmethod
    def _mask_groups(cls, values: Any) -> Any:
        if isinstance(values, dict) and "masks" not in values:
            return {**values, "masks": "on" if values.get("topology", "groups") == "groups" else "off"}
        return values

    @model_validator(mode="after")
    def _weights_fit(self) -> "AveragingTerms":
        if self.weights == "samples" and self.samples_max is None:
            raise ValueError("weights are samples and samples_max is missing; set it to the most that a member has")
        if self.weights == "equal" and self.samples_max is not None:
            raise ValueError("samples_max means something only with weights = samples; leave it out, or set weights")
        return self

    @model_validator(mode="after")
    def _masks_fit(self) -> "AveragingTerms":
        if self.masks == "on" and self.topology != "groups":
            raise ValueError(
                f"masks are on and the topology is {self.topology}, where overlapping sums would give single updates "
                "away; set topology to groups, or masks to off"
            )
        return self


class SecurityTerms(Settings):
    """How what peers send is protected.

    Attributes:
        suite: the cipher suite of every channel and every mask; see `p2pfl suites`.
        channel: `suite`, our own channel under the suite; or `noise`, libp2p's standard Noise in its place, so that
            other implementations of libp2p can connect. That knows no charter: only messages carry its hash.
    """

    suite: Literal["aes", "sm4", "gm"] = "aes"
    channel: Literal["suite", "noise"] = "suite"


class Deadlines(Settings):
    """How long a peer waits, in seconds. The defaults are guesses for organisations that start peers by hand.

    Attributes:
        start: for its neighbors, before round 0.
        round: for its neighbors' updates of a round, once its own is sent.
        heartbeat: between signs of life on a quiet link.
        silence: without any sign of life, after which a link counts as dead.
    """

    start: Annotated[float, Field(gt=0, le=86_400)] = 300.0
    round: Annotated[float, Field(gt=0, le=86_400)] = 60.0
    heartbeat: Annotated[float, Field(gt=0, le=3_600)] = 5.0
    silence: Annotated[float, Field(gt=0, le=86_400)] = 20.0

    @model_validator(mode="after")
    def _heartbeats_fit(self) -> "Deadlines":
        if self.silence < 2 * self.heartbeat:
            raise ValueError("silence must be at least twice heartbeat, or a peer that is well counts as dead")
        return self


class Charter(Settings):
    """The federation agreement."""

    name: str
    version: Annotated[int, Field(ge=1)] = 1
    task: TaskTerms
    model: ModelTerms
    training: TrainingTerms = TrainingTerms()
    averaging: AveragingTerms = AveragingTerms()
    security: SecurityTerms = SecurityTerms()
    deadlines: Deadlines = Deadlines()
    members: Annotated[tuple[Member, ...], Field(strict=False)] = ()
    signatures: dict[str, str] = Field(default_factory=dict)

    _check_name = field_validator("name")(check_name)

    @model_validator(mode="after")
    def _members_differ(self) -> "Charter":
        for what in ("name", "peer_id", "sm2_public_key"):
            values = [value for member in self.members if (value := getattr(member, what)) is not None]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"two members have the {what} {twice[0]}; each needs its own")
        strangers = sorted(set(self.signatures) - {m.name for m in self.members})
        if strangers:
            raise ValueError(f"signed by {strangers[0]}, who is not a member; remove that signature or add the member")
        return self

    def terms(self) -> dict[str, Any]:
        """Return everything but the signatures, members in the order of their names, as plain values.

        What a member does not have is left out, as it is in the file.
        """
        values: dict[str, Any] = self.model_dump(exclude={"signatures"}, exclude_none=True)
        values["members"] = sorted(values["members"], key=lambda member: member["name"])
        return values

    def hash(self) -> bytes:
        """Return the 32 bytes by which peers know this charter: the SHA-256 of its terms' canonical encoding."""
        return hashlib.sha256(canonical(["p2pfl/charter/3", self.terms()])).digest()

    def roster(self) -> tuple[PeerId, ...]:
        """Return the members' peer ids in the order of their names: the overlay's nodes.

        By name, so that a run with fresh keys has the same overlay.
        """
        return tuple(PeerId(member.peer_id) for member in sorted(self.members, key=lambda member: member.name))

    def member(self, name: str) -> Member | None:
        """Return the member of this name, if there is one."""
        return next((member for member in self.members if member.name == name), None)
