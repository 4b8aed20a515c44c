"""One peer's protocol on a fixed overlay under masks: rounds in stars, then gossip of the averages that came of them.

    rounds     `GroupMachine`: the drawn centres average with their neighbors; each update enters one sum
    settling   `PeerMachine`: neighbors average their bases in the clear, until the members are near to each other

A base is an average that was released before, or the initial model, so settling shows nothing new of anybody. While a
peer settles, the first machine goes on answering whoever lags in the rounds; and what neighbors that are ahead send to
be averaged waits here until this peer has done its rounds.
"""

from dataclasses import replace

from p2pfl.core.ids import PeerId, Round, Seconds
from p2pfl.core.ledger import Checkpoint, Resume
from p2pfl.core.machine import (
    AcceptBulk,
    BulkOffered,
    BulkReceived,
    CancelTimer,
    Compute,
    Computed,
    Effect,
    Emit,
    Input,
    LinkDown,
    LinkUp,
    Persist,
    Persisted,
    Received,
    RefuseBulk,
    SetTimer,
    Started,
    StopRequested,
    TimerFired,
    Vector,
    WorkFailed,
)
from p2pfl.core.wire import Bye, Hello, Ping, Update
from p2pfl.crypto.ring import WEIGHT_ONE
from p2pfl.gossip.group_machine import GroupMachine, GroupPlan
from p2pfl.gossip.peer_machine import PeerMachine, Plan
from p2pfl.gossip.release import Keyring
from p2pfl.gossip.secure_sum import MaskTerms

SETTLING = "settle/"
"""Before the keys of what the settling machine asks for."""
ALONE = "alone"
EARLY_ROUNDS = 2
"""Of a neighbor that settles already, so many rounds' vectors are kept: it gets no further before it gives this peer
up for late."""


class StarMachine:
    """The machine of one peer; see the module.

    Args:
        plan: of the rounds.
        settling: of what follows them.
        keyring: signs and checks statements.
        initial: the common initial model, float32 [parameters].
        resume: what is known of this peer's former lives, if it had any.
        masks: how updates are hidden.
        weight: this peer's in every average, in units of 1 / WEIGHT_ONE.
    """

    def __init__(
        self,
        plan: GroupPlan,
        settling: Plan,
        keyring: Keyring,
        initial: Vector,
        resume: Resume | None = None,
        masks: MaskTerms | None = None,
        weight: int = WEIGHT_ONE,
    ) -> None:
        self._plan = settling
        self.weight = weight
        self._rounds = GroupMachine(plan, keyring, initial, resume, masks, weight)
        self._settle: PeerMachine | None = None
        self._handed_over = False
        self._settled = resume if resume is not None and resume.checkpoint.round > plan.rounds else None
        self._linked: list[PeerId] = []
        self._claims: dict[PeerId, Round] = {}
        self._left: dict[PeerId, Round] = {}
        self._early: dict[tuple[PeerId, Round], tuple[Update, bytearray]] = {}

    # What others may ask about

    @property
    def held(self) -> int:
        """How many statements, chunks and early vectors are in memory."""
        return self._rounds.held + len(self._early)

    @property
    def round(self) -> Round:
        """The round this peer is in, while it is in stars."""
        return self._rounds.round

    @property
    def contribution(self) -> Vector | None:
        """What this peer averages in its star, float32 [parameters]."""
        return self._rounds.contribution

    @property
    def changed_from(self) -> Vector | None:
        """The base that `contribution` is the change from; None if it is a whole model."""
        return self._rounds.changed_from

    # Inputs

    def handle(self, input: Input, now: Seconds) -> list[Effect]:
        """Take one input; see `p2pfl.core.machine.Machine`."""
        self._note(input)
        if self._settle is not None:
            return self._while_settling(self._settle, input, now)
        if isinstance(input, BulkOffered) and isinstance(input.message, Update):
            return [self._verdict(input.peer, input.message)]
        if isinstance(input, BulkReceived) and isinstance(input.message, Update):
            self._early[input.peer, input.message.round] = (input.message, input.payload)
            return []
        effects = self._rounds.handle(input, now)
        if isinstance(input, Started) and self._settled is not None:
            self._settle = PeerMachine(self._plan, self._settled.checkpoint.base, self._settled, self.weight)
            return [_marked(each) for each in self._settle.handle(input, now)]
        base = self._rounds.released_base
        return effects if base is None else effects + self._hand_over(base, now)

    def _note(self, input: Input) -> None:
        """Remember what the settling machine will have to know of the neighbors."""
        match input:
            case LinkUp(peer) if peer not in self._linked:
                self._linked.append(peer)
                self._left.pop(peer, None)
            case LinkDown(peer) if peer in self._linked:
                self._linked.remove(peer)
            case Received(peer, Hello(charter, round) | Ping(charter, round)) if charter == self._plan.charter:
                self._claims[peer] = max(self._claims.get(peer, round), round)
            case Received(peer, Bye(charter, round)) if charter == self._plan.charter:
                self._left[peer] = round

    def _verdict(self, peer: PeerId, update: Update) -> Effect:
        """Answer the offer of a vector that is to be averaged once this peer has done its rounds."""
        first = self._plan.rounds
        fits = update.charter == self._plan.charter and update.length == 4 * self._plan.parameters
        early = first <= update.round < first + EARLY_ROUNDS and (peer, update.round) not in self._early
        if fits and early and peer in self._plan.weights:
            return AcceptBulk()
        return RefuseBulk(f"round {update.round}: this peer is in round {self._rounds.round}")

    # Settling

    def _hand_over(self, base: Vector, now: Seconds) -> list[Effect]:
        """Begin to average with the neighbors, as if they had been linked to just now."""
        self._handed_over = True
        self._settle = machine = PeerMachine(
            self._plan, base, Resume(Checkpoint(Round(self._plan.rounds), base, None, mixed=False), -1), self.weight
        )
        effects: list[Effect] = [each for each in machine.handle(Started(), now) if not isinstance(each, Emit)]
        charter = self._plan.charter
        for peer in self._linked:
            claim = Ping(charter, self._claims.get(peer, Round(0)))
            effects += [each for each in machine.handle(LinkUp(peer), now) if not isinstance(each, Emit)]
            effects += machine.handle(Received(peer, claim), now)
            if peer in self._left:
                effects += machine.handle(Received(peer, Bye(charter, self._left[peer])), now)
        gone = all(peer in self._left for peer in self._plan.weights)
        if self._linked or gone:
            effects += machine.begin(now)
        else:  # links also fall for a moment
            effects.append(SetTimer(ALONE, Seconds(now + self._plan.deadlines.round)))
        for (peer, _), (update, payload) in sorted(self._early.items(), key=lambda item: item[0]):
            answers = machine.handle(BulkOffered(peer, update), now)
            wanted = any(isinstance(each, AcceptBulk) for each in answers)
            effects += [each for each in answers if not isinstance(each, AcceptBulk | RefuseBulk)]
            effects += machine.handle(BulkReceived(peer, update, payload), now) if wanted else []
        self._early = {}
        return [_marked(each) for each in effects]

    def _while_settling(self, settle: PeerMachine, input: Input, now: Seconds) -> list[Effect]:
        match input:
            case TimerFired(key) if key == SETTLING + ALONE:
                return [_marked(each) for each in settle.begin(now)]
            case LinkUp() | LinkDown():
                others = (each for each in self._rounds.handle(input, now) if not isinstance(each, Emit))
                own = settle.handle(input, now)
                if isinstance(input, LinkUp) and self._handed_over:
                    own += settle.begin(now)
                return [*map(_marked, own), *others]
            case TimerFired(key) | Computed(key) | Persisted(key):
                if key.startswith(SETTLING):
                    return [_marked(each) for each in settle.handle(replace(input, key=key[len(SETTLING) :]), now)]
                return self._rounds.handle(input, now)
            case Received(_, Hello() | Ping() | Bye()) | BulkOffered(_, Update()) | BulkReceived(_, Update()):
                return [_marked(each) for each in settle.handle(input, now)]
            case StopRequested() | WorkFailed():
                return [_marked(each) for each in settle.handle(input, now)]
            case _:
                return self._rounds.handle(input, now)


def _marked(effect: Effect) -> Effect:
    """Give what the settling machine asks for a key of its own."""
    if isinstance(effect, SetTimer | CancelTimer | Compute | Persist):
        return replace(effect, key=SETTLING + effect.key)
    return effect
