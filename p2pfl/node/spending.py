"""What a member has spent of its charter's privacy budgets, as its ledger says."""

from dataclasses import dataclass

from p2pfl.core.charter import Charter
from p2pfl.core.ids import PeerId
from p2pfl.node.checkpoints import Spent, read_spent
from p2pfl.node.federation import STATE_FOLDER, Home


@dataclass(frozen=True)
class Spending:
    """A budget, and what is spent of it.

    Attributes:
        budget: the most that epsilon may become.
        delta: at this.
        epsilon: of all that may have left.
        steps: how many rounds of uploads that is, or how many local steps.
        rounds_left: how many rounds with training the charter has, by all its budgets, less those that are paid for.
    """

    budget: float
    delta: float
    epsilon: float
    steps: int
    rounds_left: int


@dataclass(frozen=True)
class Spendings:
    """Of each budget that the charter has: of all data of a member, and of one example of it.

    Attributes:
        member: None without noise in sums.
        rho: of all uploads, in zCDP; None without.
        any_member: what `member.epsilon` is for telling any data of the member from any other.
        example: None without noise in gradients.
    """

    member: Spending | None = None
    rho: float | None = None
    any_member: float | None = None
    example: Spending | None = None


def spendings(home: Home, charter: Charter) -> Spendings | None:
    """Return what a member has spent; None without budgets, or for nobody's folder.

    Raises:
        InvalidConfig: the ledger is damaged, missing or another's.
    """
    entry = charter.member(home.config.name)
    if entry is None or charter.privacy is None:
        return None
    return spendings_of(charter, read_spent(home.run_path / STATE_FOLDER, charter.hash(), PeerId(entry.peer_id)))


def spendings_of(charter: Charter, spent: Spent) -> Spendings:
    """Return what a ledger's sums come to under a charter."""
    budget, examples = charter.budget, charter.example_budget
    member = example = rho = of_any = None
    if budget is not None:
        uploads = round(spent.rho / budget.rho)
        left = max(0, charter.rounds - uploads)
        member = Spending(budget.epsilon, budget.delta, budget.spent(spent.rho), uploads, left)
        rho, of_any = spent.rho, budget.spent(spent.rho, 4.0)
    if examples is not None:
        rounds = -(-spent.steps // examples.steps)
        left = max(0, charter.rounds - rounds)
        example = Spending(examples.epsilon, examples.delta, examples.spent(spent.steps), spent.steps, left)
    return Spendings(member, rho, of_any, example)
