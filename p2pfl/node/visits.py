"""A doctor's visits to the other members: do they answer, how fast is the path, what do their clocks and versions say.

Dials as a peer does, over the same channel. While no peer of this member runs, it listens where that would, so that
others can dial back and their doctors are answered.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import trio

from p2pfl.core.charter import Charter, Member
from p2pfl.core.errors import RemoteError, TransportError, WrongCharter, WrongVersion
from p2pfl.core.ids import PeerId, Seconds
from p2pfl.core.wire import MAX_ADDRESSES
from p2pfl.crypto.identity import Identity
from p2pfl.learning.chartered import vectors_of
from p2pfl.node.consult import PROTOCOL, Consultation, Desk, Facts, consult
from p2pfl.node.federation import Home
from p2pfl.node.findings import Finding, Level, Probe
from p2pfl.node.libp2p.host import NO_ANSWER, ChannelTerms, Libp2pTransport
from p2pfl.node.live import printable, size_text
from p2pfl.node.transport import IncomingLane, LaneKind

DIAL_TIMEOUT = Seconds(10.0)
"""For each address; what a peer gives all of a member's (`p2pfl.node.links`)."""
MOST_AT_ONCE = 8
"""Members visited at once: more would wait less for each other's silence, and measure more of each other's loads. A
guess."""
RETRY = 2.0
"""Seconds between two visits to a member that is waited for; a guess: people on the telephone do not notice."""
CLOCK_WARN, CLOCK_FAIL = 2.0, 60.0
"""Seconds a clock may be off: beyond the first, records of different members are hard to compare; beyond the second,
a member that moves signs address records that the next ones do not supersede for as long. Guesses."""
ROUND_BYTES = 9.634
"""Bytes a value that a peer sends in a round of groups of four; measured, see the README."""


@dataclass(frozen=True)
class Visit:
    """What became of visiting one member: its addresses that failed, and what it said or why it said nothing."""

    failures: Mapping[str, Exception]
    consultation: Consultation | None = None
    fault: Exception | None = None


class Visits:
    """Visits all other members of a charter or a draft.

    Args:
        home: this member's folder.
        charter: which need not be signed: its hash is the same before.
        identity: this member's.
        probe: the world.
        listens: whether to listen meanwhile.
        peer_runs: whether a peer of this member runs, and listens, meanwhile.
    """

    def __init__(
        self, home: Home, charter: Charter, identity: Identity, probe: Probe, *, listens: bool, peer_runs: bool
    ) -> None:
        self._home, self._charter, self._probe = home, charter, probe
        self._listens, self._peer_runs = listens, peer_runs
        self._others = [member for member in charter.members if member.peer_id != identity.peer_id]
        own = charter.security.channel == "suite"
        terms = ChannelTerms(charter.security.suite, charter.hash()) if own else None
        self._transport = Libp2pTransport(identity.seed(), charter.roster(), terms, relay=home.config.relay)
        addresses = {PeerId(member.peer_id): member.addresses for member in self._others}
        self._desk = Desk(self._facts, addresses, self._transport.probe)
        self._visits: dict[str, Visit] = {}
        self._limit = trio.CapacityLimiter(MOST_AT_ONCE)

    @property
    def results(self) -> Mapping[str, Visit]:
        """What became of each member's last visit, by name."""
        return self._visits

    async def make(self, wait: float, tell: Callable[[str], None]) -> None:
        """Visit everybody once; then, for `wait` seconds at most, whoever did not answer or has not visited us.

        Args:
            wait: seconds; 0 for one visit each.
            tell: told whom is waited for, when that changes.

        Raises:
            TransportError: nothing can be sent at all.
        """
        listen = self._home.config.listen if self._listens else ()
        async with self._transport.run(listen, _hold, _ignore):
            self._transport.answer(PROTOCOL, self._desk.hold)
            async with trio.open_nursery() as nursery:
                if self._listens:
                    nursery.start_soon(self._transport.keep_reachable, self._home.config.announce)
                await self._visit_all(self._others)
                if wait:
                    with trio.move_on_after(wait):
                        await self._wait(tell)
                nursery.cancel_scope.cancel()

    async def _wait(self, tell: Callable[[str], None]) -> None:
        told: list[str] = []
        while awaited := [member.name for member in self._others if not self._is_done(member)]:
            if awaited != told:
                tell(f"waiting for {', '.join(awaited)}")
                told = awaited
            await trio.sleep(RETRY)
            await self._visit_all([each for each in self._others if self._visits[each.name].consultation is None])

    def _is_done(self, member: Member) -> bool:
        consultation = self._visits[member.name].consultation
        # A peer visits nobody; a doctor that waits does, and would find us gone.
        return consultation is not None and (
            consultation.facts.serves == "peer" or PeerId(member.peer_id) in self._desk.consulted
        )

    async def _visit_all(self, members: list[Member]) -> None:
        async with trio.open_nursery() as nursery:
            for member in members:
                nursery.start_soon(self._visit, member)

    async def _visit(self, member: Member) -> None:
        async with self._limit:
            self._visits[member.name] = await self._visited(member)

    async def _visited(self, member: Member) -> Visit:
        peer, failures = PeerId(member.peer_id), {}
        linked = False
        for address in member.addresses[:MAX_ADDRESSES]:
            if linked and self._peer_runs:
                break  # each connection counts at the member, beside those of our running peer
            try:
                await self._transport.probe(peer, address, DIAL_TIMEOUT, keep=not linked)
                linked = True
            except (RemoteError, TransportError) as error:
                failures[address] = error
        if not linked and not self._transport.is_connected(peer):
            return Visit(failures)
        try:
            talk = await self._transport.talk(peer, PROTOCOL)
            try:
                return Visit(failures, await consult(talk, self._probe.now))
            finally:
                await talk.reset()
        except (RemoteError, TransportError) as error:
            return Visit(failures, fault=error)

    def _facts(self) -> Facts:
        probe = self._probe
        return Facts(probe.release, probe.wire, probe.now(), self._charter.hash(), "doctor")


async def _hold(kind: LaneKind, lane: IncomingLane) -> None:
    """Leave a peer's lanes unread: what it says to a member that takes part is not for a doctor."""
    del kind, lane
    await trio.sleep_forever()


def _ignore(who: str, reason: str) -> None:
    """Say nothing of who was refused: a visit that failed for it says so itself."""
    del who, reason


# What visits mean


def visit_findings(
    charter: Charter, visits: Mapping[str, Visit], probe: Probe, in_force: bool, dialled: bool = True
) -> list[Finding]:
    """Return what visits found, a line for each thing, in the order of the members' names.

    Args:
        charter: or draft.
        visits: by member.
        probe: the world.
        in_force: whether all have signed: before, members that do not answer are only waited for.
        dialled: whether anything listened here that could be dialled back.
    """
    found: list[Finding] = []
    for name in sorted(visits):
        visit = visits[name]
        found += _reach_findings(name, visit, in_force)
        if visit.consultation is not None:
            found += _link_findings(charter, name, visit.consultation)
            found += _version_findings(charter, name, visit.consultation.facts, probe)
            found += _firewall_findings(name, visit.consultation) if dialled else []
    return [*found, *_clock_findings(visits)]


def _reach_findings(name: str, visit: Visit, in_force: bool) -> list[Finding]:
    objections = [error for error in visit.failures.values() if isinstance(error, RemoteError)]
    for error in objections:
        if isinstance(error, WrongCharter):
            todo = "compare: p2pfl charter diff with the copy of that member"
            return [Finding("charter", Level.FAIL, printable(error.reason), todo, name)]
    told = [f"{address}: {printable(_reason(error))}" for address, error in visit.failures.items()]
    if visit.consultation is None and visit.fault is None:
        ask = "ask that member to run p2pfl peer, or p2pfl doctor --wait 600"
        if visit.failures and all(str(error).startswith(NO_ANSWER) for error in visit.failures.values()):
            ask = f"a firewall may drop it on the way: have its port opened, and {ask}"
        what = f"does not answer: {'; '.join(told)}"
        if objections:
            return [Finding("reach", Level.FAIL, what, "compare its address and its key with the charter", name)]
        return [Finding("reach", Level.FAIL if in_force else Level.WARN, what, ask, name)]
    warned = [
        Finding("reach", Level.WARN, f"does not answer at {line}", "another of its addresses does", name)
        for line in told
    ]
    if visit.fault is not None:
        what = f"is there, but does not answer a doctor: {printable(_reason(visit.fault))}"
        return [*warned, Finding("reach", Level.WARN, what, "its p2pfl may be older: compare p2pfl --version", name)]
    serves = "its peer runs" if visit.consultation and visit.consultation.facts.serves == "peer" else "its doctor waits"
    return [*warned, Finding("reach", Level.OK, f"answers: {serves}", member=name)]


def _reason(error: Exception) -> str:
    return error.reason if isinstance(error, RemoteError) else str(error)


def _link_findings(charter: Charter, name: str, found: Consultation) -> list[Finding]:
    speed = found.bytes_per_second
    values = charter.model.parameters * vectors_of(charter.training, charter.averaging)
    seconds = ROUND_BYTES * values / speed
    what = f"round trip {found.round_trip * 1e3:.3g} ms, {size_text(speed)}/s to it: {seconds:.2g} s of each round"
    if seconds > charter.deadlines.round:
        todo = f"deadlines.round is {charter.deadlines.round:g} s: agree on a longer one, or on a smaller model"
        return [Finding("link", Level.WARN, what, todo, name)]
    return [Finding("link", Level.OK, what, member=name)]


def _version_findings(charter: Charter, name: str, facts: Facts, probe: Probe) -> list[Finding]:
    found = []
    if facts.charter != charter.hash():
        what = f"is under charter {facts.charter.hex()[:16]}, ours is {charter.hash().hex()[:16]}"
        todo = "compare: p2pfl charter diff with the copy of that member"
        found.append(Finding("charter", Level.FAIL, what, todo, name))
    else:
        found.append(Finding("charter", Level.OK, f"the same: {facts.charter.hex()[:16]}", member=name))
    release = printable(facts.release)
    try:
        common = probe.wire.common(facts.wire)
    except WrongVersion:
        what = f"runs p2pfl {release}, whose messages are version {facts.wire}; here {probe.release} and {probe.wire}"
        todo = f"{_older(facts.wire.highest < probe.wire.lowest, name)} installs the version of the other"
        return [*found, Finding("versions", Level.FAIL, what, todo, name)]
    if release != probe.release:
        what = f"runs p2pfl {release}, here {probe.release} runs; they talk in messages of version {common}"
        todo = f"{_older(_numbers(release) < _numbers(probe.release), name)} should install the version of the other"
        return [*found, Finding("versions", Level.WARN, what, todo, name)]
    return [*found, Finding("versions", Level.OK, f"runs p2pfl {release}, as here", member=name)]


def _older(is_theirs: bool, name: str) -> str:
    return name if is_theirs else "this member"


def _numbers(release: str) -> list[int]:
    return [int(part) for part in release.split(".") if part.isdecimal() and len(part) < 10]


def _firewall_findings(name: str, found: Consultation) -> list[Finding]:
    failures = [each for each in found.dialled_back if each.reason]
    if not failures:
        return [Finding("firewall", Level.OK, "can dial this member back", member=name)]
    told = "; ".join(f"{printable(each.address)}: {printable(each.reason)}" for each in failures)
    if len(failures) < len(found.dialled_back):
        return [Finding("firewall", Level.WARN, f"cannot dial back {told}", "another address of ours works", name)]
    todo = "open that port towards it, or announce an address over a relay: two that cannot be dialled never meet"
    return [Finding("firewall", Level.WARN, f"cannot dial this member back: {told}", todo, name)]


def _clock_findings(visits: Mapping[str, Visit]) -> list[Finding]:
    """Compare all clocks with the median of them all, ours included; of two nobody knows whose is right."""
    found = {name: visit.consultation for name, visit in visits.items() if visit.consultation is not None}
    if not found:
        return []
    usual = statistics.median([0.0, *(each.ahead for each in found.values())]) if len(found) > 1 else 0.0
    lines = []
    if (level := _clock_level(usual)) is not Level.OK:
        what = f"this machine's is {_off(-usual)} the median of {len(found)} members' and its own"
        lines.append(Finding("clock", level, what, _SET))
    for name, each in sorted(found.items()):
        off = each.ahead - usual
        if (level := _clock_level(max(0.0, abs(off) - each.within))) is not Level.OK:
            what = f"{_off(off)} the median of all clocks" if len(found) > 1 else f"{_off(off)} ours: one is wrong"
            lines.append(Finding("clock", level, what, _SET, name))
    if lines:
        return lines
    most = max(abs(each.ahead) for each in found.values())
    return [Finding("clock", Level.OK, f"within {most:.2g} s of all {len(found)} members' that answered")]


_SET = "set it by NTP: timedatectl set-ntp true"


def _clock_level(off: float) -> Level:
    return Level.FAIL if abs(off) > CLOCK_FAIL else Level.WARN if abs(off) > CLOCK_WARN else Level.OK


def _off(ahead: float) -> str:
    return f"{abs(ahead):.3g} s {'ahead of' if ahead > 0 else 'behind'}"
