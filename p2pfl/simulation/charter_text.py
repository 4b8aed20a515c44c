"""A charter in words, for the people who are to sign it."""

from collections.abc import Iterator

from p2pfl.core.charter import Charter
from p2pfl.crypto.identity import charter_faults
from p2pfl.crypto.suite import SUITES
from p2pfl.gossip.grouping import bearable_colluders, threshold
from p2pfl.gossip.mixing import metropolis_hastings, spectral_gap
from p2pfl.gossip.peer_machine import overlay_of
from p2pfl.gossip.topology import diameter
from p2pfl.node.live import size_text


def describe_charter(charter: Charter) -> Iterator[str]:
    """Give the charter's terms, what they mean for this many members, and who has signed, line by line."""
    training, averaging, deadlines = charter.training, charter.averaging, charter.deadlines
    yield f"{charter.name}, version {charter.version}, {charter.hash().hex()}"
    yield f"task      {charter.task.source} ({charter.task.sha256[:16]}…)"
    yield f"model     {charter.model.parameters} parameters from {charter.model.file} ({charter.model.sha256[:16]}…)"
    clip = f", updates clipped to norm {training.clip_norm:g}" if training.clip_norm else ", updates not clipped"
    yield (
        f"training  {training.rounds} rounds of {training.algorithm}: {training.local_steps} local steps of "
        f"{training.batch_size} examples{clip}"
    )
    sm2 = "; members sign with SM2 beside Ed25519" if SUITES[charter.security.suite].sm2_signatures else ""
    yield f"suite     {charter.security.suite}: `p2pfl suites` says what that is{sm2}"
    if averaging.masks == "on":
        yield f"masks     on: only sums are revealed; values up to {averaging.clip:g}"
    else:
        yield "masks     off: UNMASKED, neighbors see each other's updates"
    if averaging.samples_max is not None:
        least = f"at least {averaging.alpha_min:g}"
        yield f"weights   by samples: 1 for {averaging.samples_max} of them, which is the most, {least} for fewer"
    yield f"topology  {averaging.topology}{_facts(charter)}"
    if averaging.topology == "groups":
        yield "end       all average once more, and have one model"
    else:
        yield (
            f"end       average until the consensus distance is at most {averaging.tolerance:g}, "
            f"or {averaging.settle_rounds} rounds"
        )
    yield (
        f"deadlines {deadlines.start:g} s to start, {deadlines.round:g} s a round, "
        f"a heartbeat each {deadlines.heartbeat:g} s, gone after {deadlines.silence:g} s of silence"
    )
    for member in sorted(charter.members, key=lambda member: member.name):
        signed = "signed" if member.name in charter.signatures else "not signed"
        yield f"member    {member.name}  {member.peer_id}  {', '.join(member.addresses)}  {signed}"
        if member.sm2_public_key is not None:
            yield f"          {member.name}  SM2 {member.sm2_public_key}"
    faults = charter_faults(charter)
    yield "state     in force" if not faults else f"state     not in force: {'; '.join(faults)}"


def _facts(charter: Charter) -> str:
    members = len(charter.members)
    if members < 2:
        return ""
    if charter.averaging.topology == "groups":
        return _group_facts(members, charter.averaging.group_size)
    graph = overlay_of(charter)
    degrees = sorted(degree for _, degree in graph.degree)
    low, high = degrees[0], degrees[-1]
    neighbors = f"{low} to {high} neighbors" if low != high else f"{low} neighbor{'s' if low > 1 else ''} each"
    gap = spectral_gap(metropolis_hastings(graph))
    sent = max(degrees) * 4 * charter.model.parameters
    return (
        f": {neighbors}, diameter {diameter(graph)}, spectral gap {gap:.3f}, "
        f"{size_text(sent)} sent a round by each peer"
    )


def _group_facts(members: int, size: int) -> str:
    """Say what the smallest of the groups that are drawn can lose."""
    count = max(1, members // min(size, members))
    least = members // count
    spare = least - threshold(least)
    lose = f"{spare} of {least} may drop out of a round" if spare else f"one of {least} that drops out costs the round"
    groups = f"{count} groups drawn anew each round" if count > 1 else "one group of all"
    return f": {groups}; {lose}, {bearable_colluders(least)} may work together"
