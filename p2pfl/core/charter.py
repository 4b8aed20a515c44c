"""The charter: what all members agree on before round 0. Hashed, signed by each, and its hash in every message.

A draft is a charter that some members have not signed. Anything that two peers must hold in common to average stands
here, and nothing that is one peer's own business (that is `p2pfl.core.config`).
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from p2pfl.core.canonical import canonical
from p2pfl.core.ids import PeerId
from p2pfl.core.privacy import Budget, ExampleBudget
from p2pfl.core.settings import Settings

Topology = Literal["groups", "exponential", "ring", "complete", "random-regular", "torus", "hypercube", "path", "edges"]
Algorithm = Literal[
    "d-psgd", "local-sgd", "fedprox", "qg-dsgdm", "diloco", "gradient-tracking", "k-gt", "partial-sharing",
]  # fmt: skip
NOT_FOR_PEERS: Mapping[str, str] = MappingProxyType({
    "push-sum": "push-sum is for links that go one way, and a charter's go both ways; take local-sgd",
    "choco-sgd": "choco-sgd needs a copy of what each neighbor knows, which peers do not keep; take local-sgd",
    "d2": "d2 is for one mixing matrix in all rounds, and an absence changes it; take k-gt, with one local step",
    "ad-psgd": "ad-psgd has no rounds, and is for the convergence lab; take local-sgd",
})  # fmt: skip
"""Algorithms of scenarios that peers do not run, and why."""
Edge = Annotated[tuple[str, str], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False, max_length=1000)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Sm2Key = Annotated[str, Field(pattern=r"^04[0-9a-f]{128}$")]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


CHANGE_CLIP = 0.5
"""The default of `AveragingTerms.change_clip`, measured on `digits` with 8 peers and the demo's settings: the largest
change of a parameter in round 0 is 0.54, in round 59 it is 0.09, and half of them are below 0.002 throughout."""
MOST_EPSILON = 128.0
"""Far above what protects anybody; the error of drawing noise counts e^epsilon times, and is too small to see up to
here."""
MOST_COLUMNS, MOST_VALUES, LONGEST_TEXT = 10_000, 10_000, 200
"""Columns of a table, values of a category and characters of either's name: guesses far above what tables have."""


def _check_text(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError(f"{text!r} has spaces around it or cannot be printed; files are read without such")
    return text


_Text = Annotated[str, Field(min_length=1, max_length=LONGEST_TEXT), AfterValidator(_check_text)]
_Finite = Annotated[float, Field(ge=-1e30, le=1e30, allow_inf_nan=False)]


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
        salt_commitment: SHA-256 of the salt that this member gives to the beacon; see `p2pfl.crypto.beacon`.
    """

    name: str
    peer_id: str
    addresses: Annotated[tuple[str, ...], Field(min_length=1, strict=False)]
    sm2_public_key: Sm2Key | None = None
    salt_commitment: Sha256 | None = None

    _check_name = field_validator("name")(check_name)


class ColumnTerms(Settings):
    """What a column of every member's table holds, and what of it is refused.

    Attributes:
        kind: `number`, or `category`: one of some values, as text.
        low: the least plausible number, which the model sees as -1. Values outside of low to high are refused.
        high: the largest plausible number, which the model sees as 1.
        mean: a number's mean, where the charter gives the scaling.
        deviation: its standard deviation, where the charter gives the scaling.
        values: a category's values.
        other: whether all further values count as one more category; else they are refused.
        missing: whether empty cells are refused; or count as 0 after scaling, with an input that says so.
    """

    kind: Literal["number", "category"]
    low: _Finite | None = None
    high: _Finite | None = None
    mean: _Finite | None = None
    deviation: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    values: Annotated[tuple[_Text, ...], Field(min_length=1, max_length=MOST_VALUES, strict=False)] | None = None
    other: bool | None = None
    missing: Literal["refuse", "zero"] = "refuse"

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> "ColumnTerms":
        is_number = self.kind == "number"
        foreign = ("values", "other") if is_number else ("low", "high", "mean", "deviation")
        for name in foreign:
            if getattr(self, name) is not None:
                raise ValueError(f"a {self.kind} has no {name}; remove it")
        if is_number:
            _check_range(self.low, self.high)
        else:
            _check_values(self.values, "values")
        if (self.mean is None) != (self.deviation is None):
            raise ValueError("mean and deviation come together; give both or none")
        return self


class TargetTerms(Settings):
    """What is learned from a table: a column of classes, or of numbers.

    Attributes:
        column: its name.
        classes: the values that stand for classes 0, 1, ..., as text; with two of them, class 1 is the one that AUC
            and KS rank above the other.
        low: the least plausible number, where the target is no class.
        high: the largest plausible number.
    """

    column: _Text
    classes: Annotated[tuple[_Text, ...], Field(min_length=2, max_length=MOST_VALUES, strict=False)] | None = None
    low: _Finite | None = None
    high: _Finite | None = None

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> "TargetTerms":
        if self.classes is None:
            _check_range(self.low, self.high)
        elif self.low is not None or self.high is not None:
            raise ValueError("a target has classes, or low and high; remove one or the other")
        else:
            _check_values(self.classes, "classes")
        return self


class TableTerms(Settings):
    """The table that every member trains on: what its columns mean, so that all models have the same inputs.

    Attributes:
        target: what is learned.
        columns: the inputs, by column; a member's further columns are not read. Their order means nothing.
        scaling: where numbers' means and deviations come from: `session`, all members' data, agreed on in round 0; or
            `charter`.
        hidden: the widths of the model's hidden layers; none for a linear model. The default is a guess.
    """

    target: TargetTerms
    columns: Annotated[dict[_Text, ColumnTerms], Field(min_length=1, max_length=MOST_COLUMNS)]
    scaling: Literal["session", "charter"] = "session"
    hidden: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(max_length=8, strict=False)] = (32,)

    @model_validator(mode="after")
    def _columns_fit(self) -> "TableTerms":
        if self.target.column in self.columns:
            raise ValueError(f"{self.target.column!r} is the target and a column; remove it from the columns")
        for name, column in self.columns.items():
            if column.kind != "number":
                continue
            if self.scaling == "charter" and column.mean is None:
                raise ValueError(f"column {name!r}: scaling is charter; give mean and deviation")
            if self.scaling == "session" and column.mean is not None:
                raise ValueError(f"column {name!r}: scaling is session; remove mean and deviation")
        return self


def _check_range(low: float | None, high: float | None) -> None:
    if low is None or high is None or not low < high:
        raise ValueError("a number needs low and high, low below high: the range of what is plausible for all members")


def _check_values(values: tuple[str, ...] | None, what: str) -> None:
    if values is None:
        raise ValueError(f"a category needs {what}: all that any member may have")
    twice = sorted({value for value in values if values.count(value) > 1}) if len(set(values)) < len(values) else []
    if twice:
        raise ValueError(f"{what} has {twice[0]!r} twice; remove one")


class TaskTerms(Settings):
    """What is trained: a built-in task's name, or `file.py:ClassName` beside the charter, and that file's SHA-256.

    Attributes:
        table: for tasks that take one, what every member's table holds.
    """

    source: str
    sha256: Sha256
    table: TableTerms | None = None

    @property
    def whole_rounds(self) -> int:
        """In how many first rounds all members average in one group: in one where they agree on the scaling."""
        return int(self.table is not None and self.table.scaling == "session")

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
        algorithm: `d-psgd`: local steps by the task's optimizer, then averaging; the others are of
            `p2pfl.learning.algorithms`.
        options: of the algorithm, by the names of its fields.
        window: seconds after which a peer begins no further local step in a round, so that a slow one contributes what
            it has; 0 for no limit.
        clip_norm: a round's local update is scaled down to this L2 norm; 0 leaves it as it is.
    """

    algorithm: Algorithm = "d-psgd"
    options: dict[str, bool | int | float | str | Names] | None = None
    rounds: Annotated[int, Field(ge=0, le=10_000_000)] = 60
    local_steps: Annotated[int, Field(ge=1)] = 2
    batch_size: Annotated[int, Field(ge=1)] = 32
    window: Annotated[float, Field(ge=0, le=10_000_000, allow_inf_nan=False)] = 0.0
    clip_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @field_validator("algorithm", mode="before")
    @classmethod
    def _is_for_peers(cls, name: object) -> object:
        if name in NOT_FOR_PEERS:
            raise ValueError(NOT_FOR_PEERS[str(name)])
        return name

    @field_validator("options")
    @classmethod
    def _is_none_if_empty(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        return options or None


class AveragingTerms(Settings):
    """Who averages with whom, and until when.

    The tolerance is far below what moves a prediction of the built-in tasks; the limit of rounds is a guess.

    Attributes:
        topology: `groups`, drawn anew each round; or an overlay, on which under masks drawn centres average with all
            their neighbors, and without masks all neighbors with each other. `edges` is the overlay that follows.
        edges: pairs of members' names, where the topology says so.
        regroup: `each-round`: groups are drawn anew; `never`: members travel in cohorts that stay together, and the
            groups of a round are unions of them.
        group_size: members wanted in a group; a group has up to twice as many, less one.
        colluders: how many members may work together without being able to forge an average or drag the others along.
        topology_seed: draws the overlay of `random-regular`.
        masks: whether single updates are hidden; if not, neighbors see each other's.
        weights: whether all members weigh the same in an average, or by their samples: alpha = samples / samples_max.
        samples_max: the largest number of samples that a member has; there where weights = samples, and only there.
        alpha_min: the least such weight: with tiny weights a sum is nearly one peer's vector.
        clip: under masks, the largest absolute value of a model's parameter or buffer that is represented; a sum's
            fixed point is this fine, divided by 2^31 and multiplied by the members.
        bits: under masks, of a word in the sums of members that all have the same base: 32, and whole models are
            averaged; or 16, and what each changed in the base is, which halves what is sent. Else a word has 32.
        change_clip: with bits = 16, and only there: the largest absolute change of a parameter that is represented;
            what is beyond goes into later sums. `most_change` has the default.
        audit: under masks, whether each sum is checked by random inner products before anybody adopts it.
        tolerance: after the last training round the peers average until the consensus distance is below this.
        settle_rounds: at most so many rounds of that.
    """

    topology: Topology = "groups"
    edges: Annotated[tuple[Edge, ...], Field(strict=False)] = ()
    regroup: Literal["each-round", "never"] = "each-round"
    group_size: Annotated[int, Field(ge=3, le=32)] = 8
    colluders: Annotated[int, Field(ge=0, le=30)] = 1
    topology_seed: Annotated[int, Field(ge=0)] = 0
    masks: Literal["on", "off"] = "on"
    weights: Literal["equal", "samples"] = "equal"
    samples_max: Annotated[int, Field(ge=1, le=2**53)] | None = None
    alpha_min: Annotated[float, Field(ge=1e-3, le=1, allow_inf_nan=False)] = 0.5
    clip: Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)] = 64.0
    bits: Literal[32, 16] = 32
    change_clip: Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)] | None = None
    audit: Literal["full", "off"] = "full"
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-6
    settle_rounds: Annotated[int, Field(ge=0, le=100_000)] = 500

    @model_validator(mode="after")
    def _fit(self) -> "AveragingTerms":
        if (self.topology == "edges") != bool(self.edges):
            raise ValueError("edges go with the topology edges, and it with them; write both or neither")
        if self.regroup == "never" and self.topology != "groups":
            raise ValueError(f"regroup is never and the topology is {self.topology}; only groups are drawn anew")
        if self.weights == "samples" and self.samples_max is None:
            raise ValueError("weights are samples and samples_max is missing; set it to the most that a member has")
        if self.weights == "equal" and self.samples_max is not None:
            raise ValueError("samples_max means something only with weights = samples; leave it out, or set weights")
        if self.bits == 16 and self.masks == "off":
            raise ValueError("bits = 16 is of masked sums, and masks are off; set bits = 32, or masks = on")
        if self.bits == 32 and self.change_clip is not None:
            raise ValueError("change_clip means something only with bits = 16; leave it out, or set bits")
        return self

    @property
    def most_change(self) -> float | None:
        """The largest absolute change that is represented; None where whole models are averaged throughout."""
        return None if self.bits == 32 else CHANGE_CLIP if self.change_clip is None else self.change_clip


class SecurityTerms(Settings):
    """How what peers send is protected.

    Attributes:
        suite: the cipher suite of every channel and every mask; see `p2pfl suites`.
        channel: `suite`, our own channel under the suite; or `noise`, libp2p's standard Noise in its place, so that
            other implementations of libp2p can connect. That knows no charter: only messages carry its hash.
    """

    suite: Literal["aes", "sm4", "gm"] = "aes"
    channel: Literal["suite", "noise"] = "suite"


class ExampleTerms(Settings):
    """Noise in each local step's gradients, and how much all steps may tell of one example; see `p2pfl.core.privacy`.

    Attributes:
        noise: the standard deviation of the noise in a step's sum of gradients, as a multiple of `clip`.
        clip: one example's gradient is scaled down to this L2 norm.
        epsilon: the budget: training ends before the round that would exceed it.
        delta: at this; 1e-5 is customary (Abadi et al. 2016, arXiv 1607.00133), and it should be well below one in the
            number of examples.
        samples_min: the fewest training examples that a member has. It stands here since the fewer there are, the more
            often each is used; a peer with fewer does not start.
    """

    noise: Annotated[float, Field(ge=1e-2, le=1e3, allow_inf_nan=False)]
    clip: Annotated[float, Field(ge=1e-9, le=1e9, allow_inf_nan=False)]
    epsilon: Annotated[float, Field(gt=0, le=MOST_EPSILON, allow_inf_nan=False)]
    delta: Annotated[float, Field(ge=1e-12, le=0.01, allow_inf_nan=False)] = 1e-5
    samples_min: Annotated[int, Field(ge=1, le=2**53)]


class PrivacyTerms(Settings):
    """Noise in released sums, and how much they may tell of one member's data in all; see `p2pfl.core.privacy`.

    Attributes:
        noise: the standard deviation of the noise that honest survivors add at least, as a multiple of
            `training.clip_norm`. What is small enough depends on members and model: `p2pfl privacy` computes it. None
            where only examples are protected.
        epsilon: the budget: training ends before the round that would exceed it.
        delta: at this; 1e-5 is customary (Abadi et al. 2016, arXiv 1607.00133).
        survivors: fewest members in a sum, if more than averaging.colluders asks for: the more there are, the less
            each has to add. A round in which more drop out releases nothing.
        examples: noise in each member's gradients, for single examples; None where only members are protected.
    """

    noise: Annotated[float, Field(ge=1e-3, le=1e3, allow_inf_nan=False)] | None = None
    epsilon: Annotated[float, Field(gt=0, le=MOST_EPSILON, allow_inf_nan=False)] | None = None
    delta: Annotated[float, Field(ge=1e-12, le=0.01, allow_inf_nan=False)] = 1e-5
    survivors: Annotated[int, Field(ge=3, le=64)] | None = None
    examples: ExampleTerms | None = None

    @model_validator(mode="after")
    def _is_complete(self) -> "PrivacyTerms":
        if (self.noise is None) != (self.epsilon is None):
            raise ValueError("noise and epsilon come together; give both, or neither with a table examples")
        if self.noise is None and self.survivors is not None:
            raise ValueError("survivors means something only with noise; leave it out, or give noise and epsilon")
        if self.noise is None and self.examples is None:
            raise ValueError("neither noise and epsilon nor a table examples is there; give one, or remove privacy")
        return self


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
    privacy: PrivacyTerms | None = None
    deadlines: Deadlines = Deadlines()
    members: Annotated[tuple[Member, ...], Field(strict=False)] = ()
    signatures: dict[str, str] = Field(default_factory=dict)
    salts: dict[str, Sha256] = Field(default_factory=dict)

    _check_name = field_validator("name")(check_name)

    @model_validator(mode="after")
    def _members_differ(self) -> "Charter":
        for what in ("name", "peer_id", "sm2_public_key"):
            values = [value for member in self.members if (value := getattr(member, what)) is not None]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"two members have the {what} {twice[0]}; each needs its own")
        names = {member.name for member in self.members}
        for signed, what in ((self.signatures, "signature"), (self.salts, "salt")):
            strangers = sorted(set(signed) - names)
            if strangers:
                raise ValueError(f"signed by {strangers[0]}, who is not a member; remove that {what} or add the member")
        return self

    @model_validator(mode="after")
    def _scaling_is_agreed_on(self) -> "Charter":
        if self.task.whole_rounds and self.averaging.topology != "groups":
            raise ValueError(
                f"task.table.scaling is session and the topology is {self.averaging.topology}, where no round has all "
                "members in one sum; set topology to groups, or scaling to charter and give means and deviations"
            )
        return self

    @model_validator(mode="after")
    def _noise_fits(self) -> "Charter":
        if self.privacy is None:
            return self
        if self.training.algorithm != "d-psgd":
            raise ValueError(
                f"privacy with algorithm = {self.training.algorithm}: what it sends beside the model has no bound; set "
                "algorithm to d-psgd"
            )
        if self.task.whole_rounds:
            raise ValueError(
                "privacy with task.table.scaling = session: means and deviations of columns have no bound that noise "
                "could be measured by; set scaling to charter, and give them"
            )
        if self.privacy.noise is not None:
            self._sums_fit()
        for budget, where in ((self.budget, "privacy"), (self.example_budget, "privacy.examples")):
            if budget is not None and self.training.rounds and not budget.rounds:
                raise ValueError(
                    f"{where}: an epsilon of {budget.epsilon:g} at a delta of {budget.delta:g} bears no round with "
                    f"noise = {budget.noise:g}; raise noise or epsilon"
                )
        return self

    def _sums_fit(self) -> None:
        if self.averaging.masks == "off":
            raise ValueError("privacy adds noise to masked sums, and masks are off; set masks = on, or remove privacy")
        if self.averaging.weights != "equal":
            raise ValueError(
                "privacy with weights = samples: each sum would tell the total of samples without noise; set weights "
                "to equal"
            )
        if not self.training.clip_norm:
            raise ValueError(
                "privacy needs training.clip_norm, the largest L2 norm of a round's update: noise is a multiple of it"
            )

    @property
    def budget(self) -> Budget | None:
        """What a member's data may give away; None without noise in sums."""
        privacy = self.privacy
        if privacy is None or privacy.noise is None or privacy.epsilon is None:
            return None
        return Budget(privacy.noise, privacy.epsilon, privacy.delta, self.model.parameters)

    @property
    def example_budget(self) -> ExampleBudget | None:
        """What one example may give away; None without noise in gradients."""
        terms = None if self.privacy is None else self.privacy.examples
        if terms is None:
            return None
        rate, steps = min(1.0, self.training.batch_size / terms.samples_min), self.training.local_steps
        return ExampleBudget(terms.noise, terms.epsilon, terms.delta, rate, steps, self.model.parameters)

    @property
    def rounds(self) -> int:
        """In how many rounds members train: as many as the budgets bear, if those are fewer than agreed on.

        All members compute the same, and each uploads once in a round at most; so nobody has spent more by then.
        """
        rounds, budget, examples = self.training.rounds, self.budget, self.example_budget
        if budget is not None and not budget.bears(rounds):
            rounds = budget.rounds
        if examples is not None and not examples.bears(rounds * examples.steps):
            rounds = examples.rounds
        return rounds

    def terms(self) -> dict[str, Any]:
        """Return everything but signatures and salts, members in the order of their names, as plain values.

        What a member does not have is left out, as it is in the file.
        """
        values: dict[str, Any] = self.model_dump(exclude={"signatures", "salts"}, exclude_none=True)
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

    def names(self) -> tuple[str, ...]:
        """Return the members' names in the order of the roster."""
        return tuple(sorted(member.name for member in self.members))

    def member(self, name: str) -> Member | None:
        """Return the member of this name, if there is one."""
        return next((member for member in self.members if member.name == name), None)
