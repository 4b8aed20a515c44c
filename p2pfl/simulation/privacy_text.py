"""What a charter's noise hides and costs, in words and numbers, for those who are to sign it; and what is spent."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from p2pfl.core.charter import Charter
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.privacy import Budget, epsilon_of, noise_for
from p2pfl.gossip.grouping import group_sizes, least_survivors, noise_of
from p2pfl.gossip.topology import overlay_of
from p2pfl.node.spending import Spendings

NO_NOISE = "no [privacy]: sums are exact, and what many of them tell of one member or example is not bounded"


def describe_noise(charter: Charter) -> Iterator[str]:
    """Give what the noise is, whom it protects against, what the budget bears and what it costs, line by line."""
    yield from _describe_members(charter)
    yield from _describe_examples(charter)


def _describe_members(charter: Charter) -> Iterator[str]:
    noise, budget, agreed = noise_of(charter), charter.budget, charter.training.rounds
    if noise is None or budget is None:
        return
    colluders, least = charter.averaging.colluders, least_survivors(charter)
    yield (
        f"noise     {noise.multiplier:g} times the clip of {noise.clip:g}, by the {noise.honest} honest of at least "
        f"{least} survivors: each adds {noise.deviation:.3g} to every parameter"
    )
    yield f"against   everybody who sees what is released, and up to {colluders} members that work together"
    yield (
        f"budget    epsilon {budget.epsilon:g} at delta {budget.delta:g}, for all data of one member: bears "
        f"{_rounds(budget.rounds)} of {agreed}"
    )
    if not budget.bears(agreed):
        yield f"          training ends after them; for all {agreed}: {_enough(budget, agreed)}"
    yield from _price(charter)


def _describe_examples(charter: Charter) -> Iterator[str]:
    terms = None if charter.privacy is None else charter.privacy.examples
    budget, training = charter.example_budget, charter.training
    if terms is None or budget is None:
        return
    yield (
        f"examples  each gradient is clipped to {terms.clip:g}; a step's sum gets noise of {terms.noise:g} times that"
    )
    yield (
        f"sampling  each is in a step with a probability of at most {budget.rate:.3g}: {training.batch_size} of "
        f"at least {terms.samples_min} that a member has, in the mean"
    )
    yield "against   everybody who sees anything that the member sends, masked or not"
    yield (
        f"budget    epsilon {budget.epsilon:g} at delta {budget.delta:g}, for one example: bears "
        f"{_rounds(budget.rounds)} of {training.rounds}, of {budget.steps} steps each"
    )
    if not budget.bears(training.rounds * budget.steps):
        epsilon = budget.spent(training.rounds * budget.steps)
        yield f"          training ends after them; all {training.rounds} take epsilon = {epsilon:.4g}"


def _rounds(count: int) -> str:
    return f"{count} round{'' if count == 1 else 's'}"


def _enough(budget: Budget, rounds: int) -> str:
    noise = noise_for(rounds, budget.epsilon, budget.delta)
    epsilon = epsilon_of(rounds * budget.rho, budget.delta)
    return f"noise = {noise:g}, or epsilon = {epsilon:.4g}"


def _price(charter: Charter) -> Iterator[str]:
    """Say how much of a group's average is noise."""
    noise, size, sizes = noise_of(charter), charter.model.parameters, _sizes(charter)
    if noise is None or sizes is None:
        return
    for members in dict.fromkeys(sizes):
        each = noise.deviation / math.sqrt(members)
        ratio = noise.clip / (each * math.sqrt(size))
        yield (
            f"price     the average of {members}: noise of {each:.3g} in each parameter, {each * math.sqrt(size):.3g} "
            f"in all; a common update of norm {noise.clip:g} is {ratio:.2g} of that"
        )


def _sizes(charter: Charter) -> tuple[int, int] | None:
    """Return the sizes of the smallest and the largest group or star; None where there can be none."""
    if len(charter.members) < 2:
        return None
    if charter.averaging.topology == "groups":
        return group_sizes(len(charter.members), charter.averaging)
    try:
        degrees = [degree for _, degree in overlay_of(charter).degree]
    except InvalidConfig:
        return None
    return 1 + min(degrees), 1 + max(degrees)


def describe_spent(spent: Spendings) -> Iterator[str]:
    """Give what a member has spent of its budgets, and what is left, line by line."""
    if (member := spent.member) is not None:
        rounds = _rounds(member.steps)
        yield f"spent     epsilon {member.epsilon:.4g} of {member.budget:g} (rho {spent.rho:.4g}), in {rounds}"
        yield f"          {spent.any_member:.4g}, to tell any data of this member from any other"
        yield f"left      {_rounds(member.rounds_left)}"
    if (example := spent.example) is not None:
        steps = f"{example.steps} local steps"
        yield f"spent     epsilon {example.epsilon:.4g} of {example.budget:g}, of one example, in {steps}"
        yield f"left      {_rounds(example.rounds_left)}"


def privacy_values(charter: Charter, spent: Spendings | None) -> dict[str, Any]:
    """Return as plain values what `describe_noise` and `describe_spent` say."""
    noise, budget, examples = noise_of(charter), charter.budget, charter.example_budget
    terms = None if charter.privacy is None else charter.privacy.examples
    of_members = of_examples = None
    if noise is not None and budget is not None:
        of_members = {
            "noise": noise.multiplier,
            "clip": noise.clip,
            "deviation": noise.deviation,
            "colluders": charter.averaging.colluders,
            "survivors": least_survivors(charter),
            "epsilon": budget.epsilon,
            "delta": budget.delta,
            "bears": budget.rounds,
        }
    if terms is not None and examples is not None:
        of_examples = {
            "noise": terms.noise,
            "clip": terms.clip,
            "rate": examples.rate,
            "steps": examples.steps,
            "epsilon": examples.epsilon,
            "delta": examples.delta,
            "bears": examples.rounds,
        }
    return {
        "federation": charter.name,
        "version": charter.version,
        "hash": charter.hash().hex(),
        "agreed": charter.training.rounds,
        "rounds": charter.rounds,
        "members": of_members,
        "examples": of_examples,
        "spent": None if spent is None else asdict(spent),
    }
