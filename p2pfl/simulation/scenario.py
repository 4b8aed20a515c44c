"""What a scenario file says: a network, data, an algorithm and what goes wrong, for the convergence lab.

Owns the file's keys, what they mean in words (`p2pfl scenario explain` prints these docstrings), and the hash by which
a run is known: a run is a pure function of its resolved settings. The federation's part, [training], [averaging] and
[security], has a charter's own keys. Must not run anything.
"""

import dataclasses
import hashlib
import inspect
import itertools
import json
import math
import re
import textwrap
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import tomlkit
from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from p2pfl.core.charter import MOST_EPSILON, AveragingTerms, SecurityTerms, TrainingTerms, check_name
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import Settings, parse_toml, validate
from p2pfl.gossip.compress import COMPRESSORS
from p2pfl.gossip.robust import RULES, rule, verify_masks
from p2pfl.gossip.schedule import SCHEDULES, WEIGHTS, describe, options_of
from p2pfl.learning.algorithms import ALGORITHMS
from p2pfl.learning.task import load_task
from p2pfl.learning.tasks import BUILT_IN
from p2pfl.node.store import read_text
from p2pfl.simulation.attacks import ATTACKS
from p2pfl.simulation.contents import contents

FOLDER = Path(__file__).resolve().parent / "scenarios"
"""The scenarios that ship with the package, by the names of their files."""

MOST_POINTS = 10_000
"""Of a sweep: a guess above what anybody waits for."""

DATA_FILES = ("path", "test_path")
"""Keys of `data.settings` that name a file or a folder, as in a peer.toml."""

MASKABLE = ("groups", "stars")
"""Topologies in which sums do not overlap, so that masks can hide single updates."""

NOT_SIMULATED: Mapping[str, tuple[str, ...]] = {
    "averaging": ("edges", "regroup", "weights", "samples_max", "bits", "change_clip"),
}  # fmt: skip
"""A charter's keys that would change what comes out, and are refused."""

CHARTERS_ONLY: Mapping[str, tuple[str, ...]] = {
    "averaging": ("alpha_min", "tolerance", "settle_rounds", "audit"), "security": ("suite", "channel"),
}  # fmt: skip
"""A charter's keys that change nothing of what comes out: a run ends with its last round of training."""

_Share = Annotated[float, Field(ge=0, le=1)]
_Chance = Annotated[float, Field(ge=0, lt=1)]


class DataTerms(Settings):
    """What peers train on, and how it is dealt to them. The held-out examples are the same for all.

    Attributes:
        task: a built-in task's name, or `file.py:ClassName`, the file relative to the scenario's.
        settings: handed to the task as its `[data]` table, such as a path.
        partition: `iid`, at random in equal parts; `dirichlet`, by class, the fewer classes for each peer the lower
            alpha is (Hsu, Qi, Brown 2019, arXiv 1909.06335); `classes`, so many for each peer (McMahan et al. 2017,
            arXiv 1602.05629); `quantity`, at random in parts the less equal the lower alpha is (Li et al. 2022, arXiv
            2102.02079); `order`, in equal parts as examples lie, for tasks that made them for so many peers
            (`quadratics` and `synthetic`); or `replacement`, each peer draws `examples` from all with replacement, so
            that any number of peers has enough. However many a peer has, it makes as many steps and weighs as much.
        alpha: of `dirichlet` and `quantity`.
        classes: of `classes`: how many each peer sees; 2, as in the papers.
        examples: of `replacement`: how many each peer draws. The default is a guess.
    """

    task: str = "digits"
    settings: dict[str, Any] = Field(default_factory=dict)
    partition: Literal["iid", "dirichlet", "classes", "quantity", "order", "replacement"] = "dirichlet"
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.5
    classes: Annotated[int, Field(ge=1)] = 2
    examples: Annotated[int, Field(ge=1)] = 64


class Training(TrainingTerms):
    """What each peer does in a round. A minibatch is drawn with replacement from the peer's own share.

    Attributes:
        algorithm: `p2pfl scenario explain` lists them; `d-psgd`, a charter's word, is `local-sgd` as it is.
        options: of the algorithm, as listed there.
        learning_rate: of plain SGD, which then makes the local steps in place of the task's own optimiser; 0 for that.
        epochs: local work as passes over an average share: the steps are epochs * examples / batch_size, rounded up,
            the same for all peers; 0 for `local_steps`.
        window: here, seconds by `cost.step_seconds`, which is the same for all peers: of the steps that `local_steps`
            or `epochs` ask for, those are made that begin before its end; 0: all.
    """

    algorithm: str = "d-psgd"  # type: ignore[assignment]
    options: dict[str, Any] = Field(default_factory=dict)
    learning_rate: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    epochs: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @field_validator("algorithm")
    @classmethod
    def _is_for_peers(cls, name: object) -> object:
        return name  # a charter alone refuses some

    @field_validator("options")
    @classmethod
    def _is_none_if_empty(cls, options: dict[str, Any] | None) -> dict[str, Any] | None:
        return options


class Averaging(AveragingTerms):
    """Who averages with whom.

    Attributes:
        topology: `p2pfl scenario explain` lists them.
        options: of the topology, as listed there.
        masks: whether single updates are hidden, in groups and stars only. Here off unless asked for; on, values go
            through the fixed point of masked sums. No keys are made.
    """

    topology: str = "groups"  # type: ignore[assignment]
    options: dict[str, Any] = Field(default_factory=dict)
    masks: Literal["on", "off"] = "off"

    @field_validator(*NOT_SIMULATED["averaging"])
    @classmethod
    def _is_simulated(cls, value: object, info: ValidationInfo) -> object:
        if value != cls.model_fields[str(info.field_name)].default:
            raise ValueError("is not simulated; leave it out")
        return value

    @model_validator(mode="after")
    def _can_be_run(self) -> "Averaging":
        if self.masks == "on" and self.topology not in MASKABLE:
            raise ValueError(
                f"masks are on and the topology is {self.topology}; take {' or '.join(MASKABLE)}, or set masks to off"
            )
        return self


class PrivacyTerms(Settings):
    """Noise in masked sums, as much as it takes that all rounds together cost so much of each peer's privacy.

    A peer adds noise to its update of norm training.clip_norm at most, measured by the honest among the fewest
    survivors that a sum may have. See `p2pfl.core.privacy` for what epsilon and delta are about.

    Attributes:
        epsilon: what all rounds cost; 0 for no noise.
        delta: at this.
        survivors: fewest peers in a sum, if more than averaging.colluders asks for.
    """

    epsilon: Annotated[float, Field(ge=0, le=MOST_EPSILON)] = 0.0
    delta: Annotated[float, Field(ge=1e-12, le=0.01)] = 1e-5
    survivors: Annotated[int, Field(ge=3)] | None = None


class CompressionTerms(Settings):
    """In how many bytes a vector travels; they are counted exactly.

    What peers send then are changes: everybody who takes in a peer's vectors keeps a copy of what it knows of them, so
    the topology must be the same in all rounds. Only rand-k goes with any topology, and with masks: all send the values
    in the same places, which are mixed, and the others stay as they are; it needs neither feedback nor gamma. A
    fetch of what was missed while away is not counted.

    Attributes:
        name: `p2pfl scenario explain` lists them.
        ratio: of rand-k and top-k: the share of the values that is sent. The default is a guess.
        bits: of quantise: of each value.
        rank: of low-rank: of the matrices that stand for the model's.
        error_feedback: whether what is left out goes into the next message (Koloskova et al. 2019, arXiv 1902.00340)
            or is lost (Tang et al. 2018, arXiv 1803.06443).
        gamma: with feedback, how far a round's mixing goes. The more is left out, the lower it has to be, or errors
            feed on themselves: 1 does for 8 bits, the authors of choco-sgd take 0.5 for sign on a ring of 16.
    """

    name: str = "none"
    ratio: Annotated[float, Field(gt=0, le=1)] = 0.1
    bits: Annotated[int, Field(ge=2, le=8)] = 8
    rank: Annotated[int, Field(ge=1)] = 2
    error_feedback: bool = True
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return _known(name, COMPRESSORS)


class AttackerTerms(Settings):
    """Who lies. Attackers are the last peers; each seed draws their places in the topology.

    Evaluations are of honest peers and of their mean alone. With the attack none all are honest. The engine simnet has
    those that need to know nothing of what others send.

    Attributes:
        attack: `p2pfl scenario explain` lists them.
        count: how many attackers there are.
        fraction: of all peers, in place of a count; rounded.
        strength: of the attack, as listed there; leave it out for its default.
    """

    attack: str = "none"
    count: Annotated[int, Field(ge=0)] = 0
    fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @field_validator("attack")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return _known(name, ("none", *ATTACKS))

    @model_validator(mode="after")
    def _is_whole(self) -> "AttackerTerms":
        if self.count and self.fraction:
            raise ValueError("there are a count and a fraction of attackers; leave one out")
        if self.attack != "none" and not self.count and not self.fraction:
            raise ValueError(f"nobody is to attack by {self.attack}; set count or fraction")
        return self

    def among(self, peers: int) -> int:
        """Return how many attack."""
        return 0 if self.attack == "none" else self.count or round(self.fraction * peers)


class DefenceTerms(Settings):
    """By what rule a peer puts together what it received, in place of the weighted mean.

    A rule that compares single updates needs masks off, and in groups each member sends its vectors to every other.

    Attributes:
        rule: `p2pfl scenario explain` lists them.
        share: of weight that may lie, where the rule has it: what a trimmed mean leaves out on each side, what clipping
            may cut, and f of Krum as a share of the vectors. The default is a guess.
        radius: of clipping: the length at which differences are cut off; 0: each time as short as `share` allows.
    """

    rule: str = "none"
    share: Annotated[float, Field(ge=0, lt=0.5)] = 0.2
    radius: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @field_validator("rule")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return _known(name, RULES)


def _known(name: str, names: Collection[str]) -> str:
    if name not in names:
        raise ValueError(f"{name!r} is unknown; there are {', '.join(names)}")
    return name


class Faults(Settings):
    """What goes wrong, drawn by the seed. Whoever is away stays as it is, and nobody averages with it.

    Weight that would have gone to or come from somebody who is away stays with the peer; in groups those who are there
    average among themselves.

    Attributes:
        missed: the probability that a peer, having trained, misses a round's exchange; of the engine dense alone, as
            among real peers no exchange fails alone.
        leave: the probability that a peer that is here leaves before a round.
        rejoin: the probability that one that left is back before a round, with the model it left with.
        parts: into how many parts, equal and drawn by the seed, the network is split for a while; 1: it is not. Peers
            of different parts are away for each other.
        split: after how many rounds it is split.
        heal: after how many rounds it is whole again. The defaults of both are guesses.
        loss: the probability that a message is lost on its way; of the engine simnet alone, which has messages.
    """

    missed: _Chance = 0.0
    leave: _Chance = 0.0
    rejoin: _Share = 0.1
    parts: Annotated[int, Field(ge=1)] = 1
    split: Annotated[int, Field(ge=0)] = 20
    heal: Annotated[int, Field(ge=0)] = 60
    loss: _Chance = 0.0

    @model_validator(mode="after")
    def _heals_after_the_split(self) -> "Faults":
        if self.heal < self.split:
            raise ValueError(f"the network is split after {self.split} rounds and heals after {self.heal}: swap them")
        return self


class Stopping(Settings):
    """When a run ends before its last round, for each seed on its own.

    Attributes:
        metric: `consensus`, `loss`, or one of the task's metrics, of the mean model; with `peer_` before it the mean of
            the evaluated peers' own. Of losses and consensus less is better, of all others more. Empty: run all rounds.
        patience: stop when it has not improved in so many evaluations; 0: never for that reason.
        improvement: what counts as an improvement must be larger than this.
        target: stop when it is reached; leave it out for none.
    """

    metric: str = ""
    patience: Annotated[int, Field(ge=0)] = 0
    improvement: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    target: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> "Stopping":
        if not self.metric and (self.patience or self.target is not None):
            raise ValueError('patience and target need a metric, such as metric = "accuracy"')
        return self


class EvaluationTerms(Settings):
    """How often models are measured on the held-out examples. It costs more than a round.

    Attributes:
        times: evaluations at most, evenly spread from before the first round to after the last. The default is a guess.
        peers: how many peers' own models are measured beside the mean model, the same ones each time.
    """

    times: Annotated[int, Field(ge=2)] = 50
    peers: Annotated[int, Field(ge=0)] = 16


class Cost(Settings):
    """What bytes and seconds are modelled with; every figure that comes of it is labelled as modelled.

    A peer sends what it mixes, 4 bytes a value or what its compressor makes of it, to each that takes it in; in groups
    twice (m - 1) / m of it, as a reduce-scatter and an all-gather among m members do, if sums of what is sent are all
    that is needed. A round takes all its steps, one latency, and the bytes that the busiest peer sends or receives.
    Handshakes, keys and statements are not counted. The defaults are guesses at offices on the internet.

    Attributes:
        step_seconds: of a local step.
        latency: seconds from peer to peer.
        bandwidth: bytes a second, up and down, of each peer.
        slow: how many peers, the last ones, are slower than the others.
        slowness: how many times as long their local steps take.
    """

    step_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    latency: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.05
    bandwidth: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 12.5e6
    slow: Annotated[int, Field(ge=0)] = 0
    slowness: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1.0


class Scenario(Settings):
    """A scenario, complete with all defaults.

    Attributes:
        name: of the scenario, and of its runs' folders.
        description: what it shows, for people.
        peers: how many.
        engine: `dense`: peers as stacked tensors, thousands of them, without messages. `simnet`: real peers' machines
            and trainers over the simulated network, some tens of them, on a charter's topologies; and ad-psgd, which
            runs in virtual time by an engine of its own.
        seeds: each draws its own shares, initial model, minibatches, topology and faults. They run side by side.
        participation: the fraction of peers that take part in a round, at least one, drawn anew each round; of the
            engine dense alone, as of real peers all take part.
        sweep: lists of values by dotted key, such as `"data.alpha" = [0.1, 1.0]`: `p2pfl sweep` runs every combination.
            What `--set` gives a value is swept no more.
    """

    name: str = "scenario"
    description: str = ""
    engine: Literal["dense", "simnet"] = "dense"
    peers: Annotated[int, Field(ge=2, le=1_000_000)] = 16
    seeds: Annotated[
        tuple[Annotated[int, Field(ge=0, lt=2**53)], ...], Field(strict=False, min_length=1, max_length=1000)
    ] = (0,)  # fmt: skip
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    data: DataTerms = DataTerms()
    training: Training = Training()
    averaging: Averaging = Averaging()
    security: SecurityTerms = SecurityTerms()
    privacy: PrivacyTerms = PrivacyTerms()
    compression: CompressionTerms = CompressionTerms()
    attackers: AttackerTerms = AttackerTerms()
    defence: DefenceTerms = DefenceTerms()
    faults: Faults = Faults()
    stopping: Stopping = Stopping()
    evaluation: EvaluationTerms = EvaluationTerms()
    cost: Cost = Cost()
    sweep: dict[str, Annotated[tuple[Any, ...], Field(strict=False, min_length=1)]] = Field(default_factory=dict)

    _check_name = field_validator("name")(check_name)

    @field_validator("seeds")
    @classmethod
    def _differ(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is there twice; each adds a run only once")
        return seeds

    @model_validator(mode="after")
    def _fits_together(self) -> "Scenario":
        masks, compression = self.averaging.masks == "on", self.compression.name
        if masks and not COMPRESSORS[compression].linear:
            raise ValueError(
                f"masks are on and the compression is {compression}, of which sums are worth nothing; take rand-k, or "
                "set averaging.masks to off"
            )
        if self.training.algorithm == "choco-sgd" and (masks or not self.compression.error_feedback):
            raise ValueError(
                "choco-sgd shows neighbors what is sent, and is error feedback; set averaging.masks to off, and leave "
                "out compression.error_feedback"
            )
        try:
            verify_masks(rule(self.defence.rule), masks=masks)
        except InvalidConfig as error:
            raise ValueError(str(error)) from error
        if self.privacy.epsilon and not self.training.clip_norm:
            raise ValueError("privacy.epsilon needs training.clip_norm: noise is a multiple of it")
        if self.privacy.epsilon and (not masks or compression != "none"):
            raise ValueError("noise is for masked sums without compression; set averaging.masks to on")
        if self.faults.loss and self.engine == "dense":
            raise ValueError('faults.loss is of messages, and the engine dense sends none; set engine to "simnet"')
        if self.training.algorithm == "ad-psgd" and self.engine == "dense":
            raise ValueError('ad-psgd has no rounds, and the engine dense has no clock; set engine to "simnet"')
        if self.attackers.among(self.peers) >= self.peers:
            raise ValueError(f"attackers: all of {self.peers} peers would be; leave one honest")
        if self.faults.parts > self.peers:
            raise ValueError(f"faults.parts: {self.peers} peers cannot be split into {self.faults.parts} parts")
        return self

    def slowness_of(self, peer: int) -> float:
        """Return how many times as long as usual a peer's local steps take."""
        return self.cost.slowness if peer >= self.peers - self.cost.slow else 1.0

    def settings(self) -> dict[str, Any]:
        """Return all settings as plain values; what has none is left out, as TOML has no word for it."""
        return self.model_dump(mode="json", exclude_none=True)

    def to_toml(self) -> str:
        """Write the scenario as a file that says everything, defaults too."""
        return tomlkit.dumps(self.settings())

    def hash(self) -> str:
        """Return what a run of this scenario is known by: hexadecimal, of all that its results follow from.

        Names and descriptions do not count; of a task in a file, of a graph, and of data, what is in the files does.

        Raises:
            InvalidConfig: there is no such task or file.
        """
        values = self.settings()
        for key in ("name", "description", "sweep"):
            values.pop(key)
        if self.data.task not in BUILT_IN:
            values["data"]["task"] = load_task(self.data.task, Path()).sha256
        if "file" in self.averaging.options:
            text = read_text(Path(self.averaging.options["file"]), "a graph")
            values["averaging"]["options"]["file"] = hashlib.sha256(text.encode()).hexdigest()
        for key in DATA_FILES:
            if isinstance(file := values["data"]["settings"].get(key), str):
                values["data"]["settings"][key] = contents(Path(file))
        encoded = json.dumps(["p2pfl/scenario/1", values], sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(encoded.encode()).hexdigest()

    @property
    def folder(self) -> str:
        """The name of a run's folder."""
        return f"{self.name}-{self.hash()[:12]}"


def names() -> list[str]:
    """Return the names of the scenarios that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(source: str, changes: Sequence[str] = ()) -> Scenario:
    """Read a scenario from a file, or one that ships with the package by its name.

    Args:
        source: a path, or one of `names()`.
        changes: settings that go before the file's, `dotted.key=value`; the value as TOML has it, or else a word.
            Files in them are relative to where one is, those in a file to the file. A key that is set is swept no more.

    Raises:
        InvalidConfig: there is no such scenario, or something in it cannot be used.
    """
    path = Path(source)
    if not path.is_file():
        path = FOLDER / f"{source}.toml"
        if source not in names():
            raise InvalidConfig(f"{source}: neither a file nor one of {', '.join(names())}")
    values = _located(parse_toml(read_text(path, "a scenario"), str(path)), path.parent)
    for change in changes:
        key, value = assigned(change)
        values = _unswept(put(values, key, value), key)
    values.setdefault("name", path.stem)
    return validate(Scenario, _located(values, Path()), str(path))


def assigned(change: str) -> tuple[str, Any]:
    """Read what `--set` was given: a key, and its value.

    Raises:
        InvalidConfig: it is no key=value.
    """
    key, equals, text = change.partition("=")
    if not equals:
        raise InvalidConfig(f"--set {change}: write key=value, such as training.rounds=100")
    return key.strip(), value_of(text.strip())


def value_of(text: str) -> Any:
    """Read a value as TOML has it, or as a word without quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def put(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Return tables in which a dotted key has a value.

    Raises:
        InvalidConfig: a part of the key is a value, not a table.
    """
    first, dot, rest = key.partition(".")
    if not dot:
        return {**values, first: value}
    inner = values.get(first, {})
    if not isinstance(inner, Mapping):
        raise InvalidConfig(f"{key}: {first} is no table; p2pfl scenario explain lists the keys")
    return {**values, first: put(inner, rest, value)}


def _unswept(values: dict[str, Any], key: str) -> dict[str, Any]:
    """Return tables whose sweep has neither a key, nor what is in it or what it is in: these would undo its value."""
    if not isinstance(sweep := values.get("sweep"), Mapping):
        return values
    return {**values, "sweep": {swept: each for swept, each in sweep.items() if not _overlap(swept, key)}}


def _overlap(one: str, other: str) -> bool:
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Give settings by dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def get(values: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, None where there is none."""
    first, dot, rest = key.partition(".")
    inner = values.get(first)
    return (get(inner, rest) if isinstance(inner, Mapping) else None) if dot else inner


def varied(scenario: Scenario, lists: Sequence[str]) -> Scenario:
    """Return a scenario with further lists to sweep, each `dotted.key=[value, value]`, before those it has.

    Raises:
        InvalidConfig: one is no list.
    """
    added = {}
    for text in lists:
        key, _, value = text.partition("=")
        added[key.strip()] = value_of(value.strip())
        if not isinstance(added[key.strip()], list) or not added[key.strip()]:
            raise InvalidConfig(f"--vary {text}: write key=[value, value], such as data.alpha=[0.1, 1.0]")
    kept = {key: value for key, value in scenario.sweep.items() if key not in added}
    return scenario.model_copy(update={"sweep": {key: tuple(value) for key, value in added.items()} | kept})


def points(scenario: Scenario) -> list[Scenario]:
    """Return the scenarios of a sweep: every combination of its lists, the last key changing fastest.

    Raises:
        InvalidConfig: there is nothing to sweep, too much, or a value does not fit.
    """
    if not scenario.sweep:
        raise InvalidConfig(f'{scenario.name}: no sweep; write [sweep] with "data.alpha" = [0.1, 1.0], or --vary')
    count = 1
    for values in scenario.sweep.values():
        count *= len(values)
    if count > MOST_POINTS:
        raise InvalidConfig(f"{scenario.name}: a sweep of {count} runs; at most {MOST_POINTS}")
    found = []
    for combination in itertools.product(*scenario.sweep.values()):
        settings: dict[str, Any] = {**scenario.settings(), "sweep": {}}
        chosen = dict(zip(scenario.sweep, combination, strict=True))
        for key, value in chosen.items():
            settings = put(settings, key, value)
        said = ", ".join(f"{key} = {value}" for key, value in chosen.items())
        found.append(validate(Scenario, settings, f"{scenario.name} with {said}"))
    return found


def _located(values: Mapping[str, Any], base: Path) -> dict[str, Any]:
    """Name the files of task, data and graph from the root, so that settings mean the same from everywhere."""
    found = dict(values)
    for key in ("averaging.options.file", *(f"data.settings.{key}" for key in DATA_FILES)):
        if isinstance(file := get(found, key), str) and file:
            found = put(found, key, str((base / file).resolve()))
    task = get(found, "data.task")
    file, colon, name = task.rpartition(":") if isinstance(task, str) else ("", "", "")
    return put(found, "data.task", f"{(base / file).resolve()}:{name}") if colon else found


def explain(scenario: Scenario | None = None) -> Iterator[str]:
    """Say what each key of a scenario means, its type, bounds and default, or the value it has in `scenario`.

    Line by line, from the docstrings of the classes above and of the charter's; then topologies and algorithms from
    theirs.
    """
    values = (scenario or Scenario()).settings()
    yield from _explain_table(Scenario, "", values)
    for name, table in tables(Scenario).items():
        yield ""
        yield from _explain_table(table, name, values[name])
    yield from ("", "averaging.topology, and its averaging.options")
    for name in SCHEDULES:
        options = options_of(name).values()
        said = [f"{p.name} = {_said(p.default)}" for p in options if p.name not in NO_OPTIONS]
        said = ["file"] if name == "graph" else said
        yield f"  {name}{'    ' if said else ''}{', '.join(said)}"
        yield from _wrapped(describe(name), "      ")
    yield from ("", "averaging.options.weights, of the topologies above that have them")
    for name, words in WEIGHTS.items():
        yield f"  {name}"
        yield from _wrapped(words, "      ")
    yield from ("", "training.algorithm, and its training.options")
    for name, algorithm in ALGORITHMS.items():
        yield from _entry(name, algorithm, algorithm.source, NOT_OPTIONS.get(name, {}))
    yield from ("", "compression.name, and the keys of [compression] that it reads")
    for name, compressor in COMPRESSORS.items():
        yield from _entry(name, compressor, compressor.source, {"shapes": "", "bucket": ""})
    yield from ("", "attackers.attack, and the default of attackers.strength")
    for name, attack in ATTACKS.items():
        yield f"  {name}{'' if math.isnan(attack.strength) else f'    strength = {attack.strength:g}'}"
        yield from _wrapped(attack.words, "      ")
        yield from _wrapped(attack.source, "      ")
    yield from ("", "defence.rule, and the keys of [defence] that it reads")
    for name, chosen in RULES.items():
        yield from _entry(name, chosen, chosen.source, {})


def unread(scenario: Scenario) -> set[str]:
    """Return the keys that nothing comes of, by what a scenario chose for compression, attack and defence."""
    compression, attackers, defence = scenario.compression, scenario.attackers, scenario.defence
    keys = {f"defence.{key}" for key in ("share", "radius") if key not in _fields(RULES[defence.rule])}
    compressor = COMPRESSORS[compression.name]
    keys |= {f"compression.{key}" for key in ("ratio", "bits", "rank") if key not in _fields(compressor)}
    if compressor.linear and scenario.training.algorithm != "choco-sgd":
        keys |= {"compression.error_feedback", "compression.gamma"}
    elif not compression.error_feedback:
        keys.add("compression.gamma")
    if scenario.faults.parts == 1:
        keys |= {"faults.split", "faults.heal"}
    if not scenario.privacy.epsilon:
        keys |= {"privacy.delta", "privacy.survivors"}
    if attackers.attack == "none":
        keys |= {f"attackers.{key}" for key in ("count", "fraction", "strength")}
    return keys


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cast(Any, kind))]


def _entry(name: str, kind: type, source: str, other: Mapping[str, str]) -> Iterator[str]:
    """Say what a class is for, its source, and its fields with their defaults, or with other words for them."""
    fields = [(field.name, _said(field.default)) for field in dataclasses.fields(cast(Any, kind))]
    said = [f"{key} = {words}" for key, words in (dict(fields) | dict(other)).items() if words]
    yield f"  {name}{'    ' if said else ''}{', '.join(said)}"
    yield from _wrapped((inspect.getdoc(kind) or "").partition("\n\n")[0], "      ")
    yield from _wrapped(source, "      ")


def _said(value: object) -> str:
    return "(left out)" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


NO_OPTIONS = ("beacon", "graph", "name")
"""Arguments of topologies that no file can give."""

NOT_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "choco-sgd": {"compress": "that of [compression]", "gamma": "that of [compression]", "seed": ""},
    "partial-sharing": {"inner": "local-sgd, and its options", "personal": "(names of tensors)"},
}
"""What algorithms take that is no plain value, or comes from elsewhere in a file, and what is said of it."""


CHARTERS: Mapping[str, type[Settings]] = {
    "training": TrainingTerms, "averaging": AveragingTerms, "security": SecurityTerms,
}  # fmt: skip
"""The tables that a charter has, too."""


def _explain_table(kind: type[BaseModel], table: str, values: Mapping[str, Any]) -> Iterator[str]:
    words = documented(kind)
    properties = kind.model_json_schema()["properties"]
    yield f"[{table}]" if table else "(at the top of the file)"
    yield from _wrapped(inspect.getdoc(kind) or "", "  ", until="Attributes:")
    for name in words:
        shared = table in CHARTERS and name in CHARTERS[table].model_fields
        given = json.dumps(values[name], ensure_ascii=False) if name in values else "none"
        note = "; as in a charter" if shared else ""
        if name in NOT_SIMULATED.get(table, ()):
            note = "; charters only, refused here"
        if name in CHARTERS_ONLY.get(table, ()):
            note = "; charters only, changes nothing here"
        yield f"  {name} = {given}    {_type(properties[name])}{note}"
        yield from _wrapped(words[name], "      ")


def documented(kind: type[BaseModel]) -> dict[str, str]:
    """Return what docstrings say of each attribute; a subclass's words go before those of the class above.

    Raises:
        KeyError: one of a class's own fields is not documented.
    """
    words: dict[str, str] = {}
    for each in reversed([base for base in kind.__mro__ if issubclass(base, BaseModel) and base.model_fields]):
        _, _, attributes = (inspect.cleandoc(each.__doc__ or "")).partition("Attributes:\n")
        for entry in re.split(r"\n(?=    \w+:)", "\n" + attributes)[1:]:
            name, _, text = entry.strip().partition(":")
            words[name] = " ".join(text.split())
    return {name: words.get(name) or _UNSAID[name] for name in kind.model_fields if name not in tables(kind)}


def tables(kind: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the fields that are tables of their own."""
    found = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: each for name, each in found.items() if isinstance(each, type) and issubclass(each, BaseModel)}


_UNSAID = {
    "rounds": "rounds of local training and averaging.",
    "local_steps": "minibatches a round.",
    "batch_size": "examples in a minibatch.",
    "algorithm": "what peers do.",
}
"""Words for what the charter's own docstrings take for granted."""


def _type(schema: Mapping[str, Any]) -> str:
    """Say a JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"] if each.get("type") != "null")
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    kinds = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false",
             "array": "list", "object": "table"}  # fmt: skip
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    said = [f"{words} {schema[key]}" for key, words in bounds.items() if key in schema]
    return ", ".join([kinds.get(schema.get("type", ""), "value"), *said])


def _wrapped(text: str, indent: str, until: str = "") -> Iterator[str]:
    kept = text.partition(until)[0] if until else text
    for paragraph in kept.strip().split("\n\n"):
        yield from textwrap.wrap(" ".join(paragraph.split()), 110, initial_indent=indent, subsequent_indent=indent)
