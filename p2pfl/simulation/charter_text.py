"""A charter in words, for the people who are to sign it."""

from collections.abc import Iterator

from p2pfl.core.charter import Charter, TableTerms
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round
from p2pfl.crypto.identity import charter_faults
from p2pfl.crypto.suite import SUITES
from p2pfl.gossip.group_machine import GroupPlan
from p2pfl.gossip.grouping import (
    LEAST_MASKED,
    bearable_colluders,
    bears,
    cohort_size,
    group_sizes,
    threshold,
)
from p2pfl.gossip.mixing import metropolis_hastings, spectral_gap
from p2pfl.gossip.topology import diameter, overlay_of
from p2pfl.learning.algorithms.made import options_of
from p2pfl.learning.chartered import algorithm_of, vectors_of
from p2pfl.node.live import UNMASKED, size_text
from p2pfl.simulation.privacy_text import describe_noise


def describe_charter(charter: Charter) -> Iterator[str]:
    """Give the charter's terms, what they mean for this many members, and who has signed, line by line."""
    training, averaging, deadlines = charter.training, charter.averaging, charter.deadlines
    if averaging.masks == "off":
        yield UNMASKED
    yield f"{charter.name}, version {charter.version}, {charter.hash().hex()}"
    yield f"task      {charter.task.source} ({charter.task.sha256[:16]}…)"
    if charter.task.table is not None:
        yield from _describe_table(charter.task.table)
    yield f"model     {charter.model.parameters} parameters from {charter.model.file} ({charter.model.sha256[:16]}…)"
    clip = f", updates clipped to norm {training.clip_norm:g}" if training.clip_norm else ", updates not clipped"
    yield (
        f"training  {training.rounds} rounds of {training.algorithm}: {training.local_steps} local steps of "
        f"{training.batch_size} examples{clip}"
    )
    yield from _describe_algorithm(charter)
    sm2 = "; members sign with SM2 beside Ed25519" if SUITES[charter.security.suite].sm2_signatures else ""
    yield f"suite     {charter.security.suite}: `p2pfl suites` says what that is{sm2}"
    if averaging.masks == "on":
        yield f"masks     on: only sums are revealed; values up to {averaging.clip:g}"
        if (most := averaging.most_change) is not None:
            yield f"          where members share a base, of changes in words of 16 bits; up to {most:g}"
        checked = "checked before" if averaging.audit == "full" else "NOT CHECKED when"
        yield f"audit     {averaging.audit}: sums are {checked} they are adopted"
    else:
        yield f"masks     off: {UNMASKED}"
    yield from describe_noise(charter)
    if averaging.samples_max is not None:
        least = f"at least {averaging.alpha_min:g}"
        yield f"weights   by samples: 1 for {averaging.samples_max} of them, which is the most, {least} for fewer"
    yield f"topology  {averaging.topology}{_facts(charter)}"
    if averaging.masks == "on":
        yield from (f"sums      {line}" for line in describe_sums(charter))
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


def _describe_algorithm(charter: Charter) -> Iterator[str]:
    """Say what an algorithm beside d-psgd is, with all its options, and what it makes peers send."""
    try:
        algorithm = algorithm_of(charter.training, charter.averaging)
    except InvalidConfig as error:
        yield f"          {error}"
        return
    if algorithm is None:
        return
    options = ", ".join(f"{name} {_said(value)}" for name, value in options_of(algorithm).items())
    yield f"          {algorithm.name}{f': {options}' if options else ''}"
    if algorithm.vectors > 1:
        yield f"          {algorithm.vectors} vectors of the model's size are averaged in each round"
    if algorithm.plain:
        yield "          it computes with the learning rate: the task's optimizer has to be plain SGD"


def _said(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else ", ".join(value) if isinstance(value, tuple) else str(value)


def _describe_table(table: TableTerms) -> Iterator[str]:
    target = table.target
    what = f"a number from {target.low} to {target.high}"
    if target.classes is not None:
        what = ", ".join(f"{place} {value!r}" for place, value in enumerate(target.classes))
    yield f"target    {target.column}: {what}"
    for name in sorted(table.columns):
        column = table.columns[name]
        if column.kind == "number":
            holds = f"{column.low} to {column.high}"
        else:
            holds = ", ".join(map(repr, column.values or ())) + (", or other" if column.other else "")
        yield f"column    {name}: {holds}{'; may be missing' if column.missing == 'zero' else ''}"
    agreed = "the charter" if table.scaling == "charter" else "round 0, in which all members' moments are averaged"
    layers = ", ".join(map(str, table.hidden))
    yield f"scaling   from {agreed}; {f'hidden layers of {layers}' if layers else 'a linear model'}"


def _facts(charter: Charter) -> str:
    members = len(charter.members)
    if members < 2:
        return ""
    if charter.averaging.topology == "groups":
        return _group_facts(charter)
    try:
        graph = overlay_of(charter)
    except InvalidConfig as error:
        return f": {error}"
    degrees = sorted(degree for _, degree in graph.degree)
    low, high = degrees[0], degrees[-1]
    neighbors = f"{low} to {high} neighbors" if low != high else f"{low} neighbor{'s' if low > 1 else ''} each"
    gap = spectral_gap(metropolis_hastings(graph))
    sent = max(degrees) * 4 * charter.model.parameters * vectors_of(charter.training, charter.averaging)
    return (
        f": {neighbors}, diameter {diameter(graph)}, spectral gap {gap:.3f}, "
        f"{size_text(sent)} sent a round by each peer"
    )


def _group_facts(charter: Charter) -> str:
    """Say what groups are drawn."""
    averaging = charter.averaging
    count = len(GroupPlan.for_peer(charter, charter.roster()[0]).groups(Round(0)))
    if averaging.regroup == "never":
        together = f", of cohorts of {cohort_size(averaging)} or more that stay together"
    else:
        together = ""
    drawn = f"{count} groups drawn anew each round" if count > 1 else "one group of all"
    return f": {drawn}{together}"


def describe_sums(charter: Charter) -> Iterator[str]:
    """Say what this many members can lose in a round under masks, and how many may work together, line by line."""
    members = len(charter.members)
    if members < LEAST_MASKED:
        return
    if charter.averaging.topology == "groups":
        least, most = group_sizes(members, charter.averaging)
        kind = "group"
    else:
        try:
            graph = overlay_of(charter)
        except InvalidConfig:
            return
        fit = [1 + degree for _, degree in graph.degree if bears(1 + degree, charter.averaging.colluders)]
        if not fit:
            return
        least, most, kind = min(fit), max(fit), "star"
    for size in range(least, most + 1):
        if size in (least, most):
            yield f"in a {kind} of {size}: {_lose(size)}; {_together(size)}"
    if kind == "star":
        yield "in a star the centre's absence costs the round; whoever is in no star sits the round out"


def _lose(size: int) -> str:
    spare = size - threshold(size)
    if not spare:
        return "one absence costs the round"
    return f"{spare} of {size} may drop out after uploading"


def _together(size: int) -> str:
    borne = bearable_colluders(size)
    return f"{borne} may work together and learn nothing" if borne else "none may work together"
