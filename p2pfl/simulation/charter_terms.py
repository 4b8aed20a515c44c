"""What a scenario says of a federation, as a charter: for its peers in the simulated network, or as a draft."""

from typing import Any, get_args

from pydantic import ValidationError

from p2pfl.core.charter import (
    NOT_FOR_PEERS,
    AveragingTerms,
    Charter,
    Member,
    ModelTerms,
    PrivacyTerms,
    SecurityTerms,
    TaskTerms,
    TrainingTerms,
)
from p2pfl.core.errors import InvalidConfig
from p2pfl.gossip.grouping import averaging_faults, privacy_faults
from p2pfl.gossip.schedule import SCHEDULES
from p2pfl.simulation.attacks import ATTACKS
from p2pfl.simulation.noised import noise_of_scenario
from p2pfl.simulation.scenario import Scenario

MOST_PEERS = 256
"""A guess of what anybody waits for."""
ONLY_SIMULATED = ("attackers", "faults", "stopping", "participation")
"""Tables and keys of what befalls a simulated run, of which no charter speaks."""


def _verify_terms(scenario: Scenario) -> None:
    for name, chosen in (("compression", scenario.compression.name), ("defence", scenario.defence.rule)):
        if chosen != "none":
            raise InvalidConfig(f'real peers have no {name} yet: it is for the engine "dense"; leave it out')
    name = scenario.training.algorithm
    if name in NOT_FOR_PEERS:
        raise InvalidConfig(f'real peers do not run it: {NOT_FOR_PEERS[name]}, or simulate it with the engine "dense"')
    topologies = [name for name in get_args(AveragingTerms.model_fields["topology"].annotation) if name in SCHEDULES]
    if scenario.averaging.topology not in topologies:
        raise InvalidConfig(
            f"averaging.topology: {scenario.averaging.topology} is of the lab alone: take one of "
            f'{", ".join(topologies)}, or simulate it with the engine "dense"'
        )
    if scenario.averaging.options:
        raise InvalidConfig("averaging.options: a charter's topologies have none; leave them out")


def verify_peers(scenario: Scenario) -> None:
    """Check that real peers can do what a scenario asks.

    Raises:
        InvalidConfig: they cannot.
    """
    _verify_terms(scenario)
    if scenario.participation < 1:
        raise InvalidConfig(
            "participation: real members all take part in every round, and nobody draws some of them; leave it out, "
            'set faults.leave for members that are away, or take the engine "dense"'
        )
    if scenario.faults.missed:
        raise InvalidConfig(
            "faults.missed: among real peers no exchange fails alone, as what is lost is asked for again and a fallen "
            'link takes time; set faults.loss, leave or parts, or take the engine "dense"'
        )
    name = scenario.attackers.attack
    if scenario.attackers.among(scenario.peers) and not ATTACKS[name].alone:
        raise InvalidConfig(
            f"attackers.attack: {name} is from what all others send in the round, and a real peer has sent its own "
            'before it sees that, if it ever does; take another attack, or the engine "dense"'
        )
    if scenario.peers > MOST_PEERS:
        raise InvalidConfig(f'{scenario.peers} peers; the engine "simnet" takes {MOST_PEERS} at most')


def charter_of(scenario: Scenario, parameters: int, steps: int, seed: int) -> Charter:
    """Return the charter under which peers of the simulated network run a scenario.

    Args:
        scenario: whose.
        parameters: of the model.
        steps: local ones of every peer in a round.
        seed: draws the groups, as the members' salts would.

    Raises:
        InvalidConfig: a charter has no such terms.
    """
    own = {
        name: {key: getattr(getattr(scenario, name), key) for key in kind.model_fields}
        for name, kind in (("training", TrainingTerms), ("averaging", AveragingTerms))
    }
    own["training"] |= {"options": scenario.training.options or None, "local_steps": steps}
    if _is_plain(scenario):
        own["training"]["algorithm"] = "d-psgd"
    privacy = _privacy(scenario)
    names = [f"peer-{place}" for place in range(scenario.peers)]
    try:
        charter = Charter(
            name=f"{scenario.name}-{seed}",
            task=TaskTerms(source=scenario.data.task, sha256="0" * 64),
            model=ModelTerms(file="m.safetensors", sha256="0" * 64, parameters=parameters),
            training=TrainingTerms(**own["training"]),
            averaging=AveragingTerms(**own["averaging"]),
            privacy=None if privacy is None else PrivacyTerms(**privacy),
            members=tuple(Member(name=name, peer_id=name, addresses=("/memory",)) for name in names),
        )
    except ValidationError as error:
        raise InvalidConfig(f"a charter has no such terms: {error.errors()[0]['msg']}") from error
    faults = averaging_faults(scenario.peers, charter.averaging) or privacy_faults(charter)
    if faults:
        raise InvalidConfig(faults[0])
    return charter


def _is_plain(scenario: Scenario) -> bool:
    """Return whether the algorithm is a charter's d-psgd, under another name."""
    return scenario.training.algorithm == "local-sgd" and not scenario.training.options


def _privacy(scenario: Scenario) -> dict[str, Any] | None:
    """Return a charter's table of noise in sums; None for none.

    Raises:
        InvalidConfig: survivors are too few to hide one.
    """
    noise, terms = noise_of_scenario(scenario), scenario.privacy
    if noise is None:
        return None
    table: dict[str, Any] = {"noise": noise.multiplier, "epsilon": terms.epsilon, "delta": terms.delta}
    return table | ({} if terms.survivors is None else {"survivors": terms.survivors})


def draft_terms(scenario: Scenario) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the tables of a charter's draft that a scenario gives, and what of it no charter says, in words.

    Only what the scenario sets itself is in them; all else has the charter's defaults, such as masks, which are on.

    Raises:
        InvalidConfig: real peers cannot do what it asks.
    """
    _verify_terms(scenario)
    given = scenario.model_dump(exclude_unset=True)
    tables: dict[str, dict[str, Any]] = {}
    for name, kind in (("training", TrainingTerms), ("averaging", AveragingTerms), ("security", SecurityTerms)):
        tables[name] = {key: value for key, value in given.get(name, {}).items() if key in kind.model_fields}
    if _is_plain(scenario):
        tables["training"].pop("algorithm", None)
    privacy = _privacy(scenario)
    if privacy is not None:
        tables["privacy"] = privacy
    said = [f"{name}: not of a charter" for name in (*ONLY_SIMULATED, "engine", "cost") if name in given]
    if scenario.training.epochs:
        said.append("training.epochs: a charter counts local_steps; set them")
    if scenario.training.learning_rate:
        said.append("training.learning_rate: the task's optimiser has its own")
    if scenario.sweep:
        said.append(
            f"sweep of {', '.join(scenario.sweep)}: a charter has one value of each; --set KEY=VALUE chooses it"
        )
    if "data" in given:
        said.append("data: each member's own, in its peer.toml")
    return tables, said
