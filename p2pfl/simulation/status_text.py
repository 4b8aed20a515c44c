"""Where a member stands, in words."""

from collections.abc import Iterator

from p2pfl.node.live import duration_text, printable, size_text
from p2pfl.node.spending import Spending, Spendings
from p2pfl.node.status import LastRound, Progress, Status


def describe_status(status: Status, now: float) -> Iterator[str]:
    """Give it line by line.

    Args:
        status: of a member.
        now: seconds since 1970.
    """
    peer, charter = status.peer, status.charter
    stands = "its peer runs" if status.running else "finished" if status.finished else "its peer does not run"
    yield f"member    {status.member} in {status.folder}: {stands}"
    if charter is None:
        yield f"charter   none: {status.charter_fault}"
    else:
        state = "in force" if charter.in_force else "not in force"
        yield f"charter   {charter.federation}, version {charter.version}, {charter.hash[:16]}: {state}"
        yield f"signed    {', '.join(charter.signed) or 'nobody yet'}"
        if charter.unsigned:
            yield f"missing   {', '.join(charter.unsigned)}"
        if status.charter_fault:
            yield f"status    {status.charter_fault}"
    for standing in dict.fromkeys(sorted(status.members.values())):
        names = [name for name, seems in status.members.items() if seems == standing]
        yield f"members   {standing}: {', '.join(names)}{'' if status.running else ' (the peer does not run)'}"
    if peer is not None:
        yield from _describe_peer(status, peer, now)
    if status.first_round:
        lost = "earlier rounds are no longer in it (logging.trace_bytes), nor in p2pfl report"
        yield f"trace     from round {status.first_round} on; {lost}"
    if status.model is not None:
        after = "" if status.model.rounds is None else f", after {status.model.rounds} rounds"
        yield f"model     {status.model.path}: {size_text(status.model.bytes)}{after}"
    else:
        yield "model     none yet: a peer writes it when it ends"
    for what, spent in () if status.privacy is None else _budgets(status.privacy):
        left = f"{spent.rounds_left} rounds left"
        yield f"privacy   epsilon {spent.epsilon:.4g} of {spent.budget:g} spent, of {what}; {left}"
    yield f"disk      {size_text(status.disk.free_bytes)} free, {size_text(status.disk.run_bytes)} in the run's folder"


def _budgets(privacy: Spendings) -> Iterator[tuple[str, Spending]]:
    for what, spent in (("all data of this member", privacy.member), ("one example", privacy.example)):
        if spent is not None:
            yield what, spent


def _describe_peer(status: Status, peer: Progress, now: float) -> Iterator[str]:
    state = peer.state if status.running else f"{peer.outcome or 'gone without a word'}, last seen {peer.state}"
    ago = duration_text(max(0.0, now - peer.written_at))
    rounds = status.rounds or 0
    further = f" and {peer.rounds - rounds} that only averaged" if peer.rounds > rounds else ""
    yield f"round     {min(peer.rounds, rounds)} of {rounds} ended{further}; {state}; said {ago} ago"
    if peer.reason:
        yield f"failed    {printable(peer.reason)}"
    if peer.last is not None:
        yield f"record    {_record(peer.last)}"
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in peer.metrics.items() if value is not None)
    if metrics:
        yield f"measured  {printable(metrics)} on this member's held-out data"


def _record(last: LastRound) -> str:
    outcome = f" {last.outcome}," if last.outcome else ""
    absent = f", without {', '.join(last.absent)}" if last.absent else ""
    loss = "" if last.loss is None else f", own loss {last.loss:.4g}"
    reason = f"; {printable(last.reason)}" if last.reason else ""
    return f"round {last.round}:{outcome} with {last.heard} others{absent}, {last.seconds:.2g} s{loss}{reason}"
