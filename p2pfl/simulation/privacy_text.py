"""What a charter's noise hides and costs, in words and numbers, for those who are to sign it; and what is spent."""

import math
from collections.abc import Iterator

from p2pfl.core.charter import Charter
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.privacy import Budget, epsilon_of, noise_for
from p2pfl.gossip.grouping import group_sizes, least_survivors, noise_of
from p2pfl.gossip.topology import overlay_of

NO_NOISE = "no [privacy]: sums are exact, and what many of them tell of one member is not bounded"


def describe_noise(charter: Charter) -> Iterator[str]:
    """Give what the noise is, whom it protects against, what the budget bears and what it costs, line by line."""
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


def describe_spent(charter: Charter, rho: float) -> Iterator[str]:
    """Give what a member's uploads have cost of its budget, and what is left, line by line.

    Args:
        charter: in force.
        rho: of all of the member's uploads, in zCDP.
    """
    budget = charter.budget
    if budget is None:
        return
    rounds = round(rho / budget.rho)
    left = max(0, charter.rounds - rounds)
    yield f"spent     epsilon {budget.spent(rho):.4g} of {budget.epsilon:g} (rho {rho:.4g}), in {_rounds(rounds)}"
    yield f"          {budget.spent(rho, 4.0):.4g}, to tell any data of this member from any other"
    yield f"left      {_rounds(left)}"
