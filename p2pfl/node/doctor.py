"""Whether a member can take part: a line for each thing that a round needs, on its own side and towards the others.

Nothing is changed, and nothing of the data leaves this machine. The own side comes first and needs nobody; visits to
the other members (`p2pfl.node.visits`) follow if there is a key and a charter or draft to make them under.
"""

import errno
import ipaddress
import os
import platform
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import trio
from multiaddr import Multiaddr

from p2pfl.core.charter import Charter, TableTerms
from p2pfl.core.errors import InvalidConfig, P2pflError
from p2pfl.crypto.identity import Identity, charter_faults, member_faults
from p2pfl.crypto.suite import SUITES, suite
from p2pfl.gossip.grouping import weight_for
from p2pfl.learning.chartered import vectors_of
from p2pfl.learning.private_trainer import Privately, PrivateTrainer
from p2pfl.learning.table import check_table
from p2pfl.learning.task import Data, Task, load_task, read_data
from p2pfl.learning.trainer import Trainer
from p2pfl.learning.vector import flatten, load_model
from p2pfl.node.checkpoints import KEEP
from p2pfl.node.federation import Home, load_charter, open_home, own_membership, terms_faults
from p2pfl.node.findings import Finding, Level, Probe, failed
from p2pfl.node.libp2p import guard
from p2pfl.node.live import size_text
from p2pfl.node.status import STATUS_FILE, is_finished, read_progress, shortest
from p2pfl.node.store import is_held
from p2pfl.node.visits import Visits, visit_findings

SPARE_BYTES = 64 << 20
"""Disk for traces and logs, beside models; a guess: a trace grows by about 500 bytes a round."""
VECTORS_KEPT = 4
"""Of a model's size in a checkpoint: base, update, results, and as much again for the optimiser's state."""


@dataclass(frozen=True)
class Report:
    """What a doctor found, and what comes next."""

    member: str
    findings: tuple[Finding, ...]
    next: str

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(finding.level is not Level.FAIL for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "member": self.member,
            "ok": self.passed,
            "findings": [finding.to_json() for finding in self.findings],
            "next": self.next,
        }


def tell_nobody(line: str) -> None:
    """Drop a line."""
    del line


def examine(
    config: Path,
    probe: Probe | None = None,
    wait: float = 0.0,
    tell: Callable[[str], None] = tell_nobody,
) -> Report:
    """Examine a member, and visit the others.

    Args:
        config: its `peer.toml`, or the folder of it.
        probe: the world to look at; by default this one.
        wait: seconds to go on visiting members that do not answer, and to answer those that visit.
        tell: told whom is waited for.
    """
    world = probe or Probe()
    found = list(_versions(world))
    try:
        home = open_home(config)
    except InvalidConfig as error:
        found.append(failed("settings", error))
        return Report("", tuple(found), f"p2pfl init NAME, or p2pfl doctor FOLDER with its folder: {config} is none")
    found.append(Finding("settings", Level.OK, f"{home.path / home.file}: member {home.config.name}"))
    charter, lines = _charter_of(home)
    found += [*_extras(home, charter, world), *lines]
    identity, lines = _keys(home, charter)
    found += lines
    if charter is not None:
        found += [*_crypto(charter, world), *_standing(home, charter, identity), *_disk(home, charter, world)]
    found += [*_ports(home), *_announced(home, charter)]
    if charter is not None:
        found += _training(home, charter, world)
        # The others of a federation that is over need not be there.
        if identity is not None and _is_member(home, charter, identity) and not is_finished(home, charter):
            found += _visits(home, charter, identity, world, wait, tell)
    return Report(home.config.name, tuple(found), _next(home, charter, found))


# The own side


def _versions(probe: Probe) -> Iterator[Finding]:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("libp2p", "torch", "cryptography"))
    try:
        guard.verify_version()
    except InvalidConfig as error:
        yield failed("versions", error)
    else:
        yield Finding("versions", Level.OK, f"p2pfl {probe.release}, Python {platform.python_version()}, {versions}")


def _charter_of(home: Home) -> tuple[Charter | None, list[Finding]]:
    try:
        return load_charter(home.charter_path), []
    except InvalidConfig as error:
        todo = f"p2pfl charter join CHARTER --config {home.path}, with the draft you were sent"
        return None, [Finding("charter", Level.FAIL, str(error), todo)]


def _extras(home: Home, charter: Charter | None, probe: Probe) -> Iterator[Finding]:
    """Look for libraries that only some members need."""
    needed: dict[str, tuple[str, str]] = {}
    if charter is not None and SUITES[charter.security.suite].sm2_signatures:
        how = "pip install 'p2pfl-mesh[gm]'"
        needed |= dict.fromkeys(("fastecdsa", "gmssl_pyx"), (f"the suite {charter.security.suite}", how))
    if charter is not None and charter.privacy is not None and charter.privacy.examples is not None:
        needed["opacus"] = ("privacy.examples", "pip install 'p2pfl-mesh[opacus]'")
    files = [str(home.data[key]) for key in ("path", "test_path") if key in home.data]
    if any(Path(name).suffix.lower() == ".parquet" for name in files):
        needed["pyarrow"] = ("Parquet files", "pip install pyarrow")
    missing = {name: why for name, why in needed.items() if not probe.can_import(name)}
    for name, (use, how) in missing.items():
        yield Finding("extras", Level.FAIL, f"{name} is not installed, which {use} need{_s(use)}", how)
    if not missing:
        yield Finding("extras", Level.OK, f"{', '.join(needed)} are there" if needed else "none is needed")


def _s(use: str) -> str:
    return "" if use.endswith("s") else "s"


def _keys(home: Home, charter: Charter | None) -> tuple[Identity | None, list[Finding]]:
    try:
        # In one call: a passphrase is asked once.
        identity = home.identity() if charter is None else home.signer(charter.security.suite).identity
    except InvalidConfig as error:
        return None, [failed("keys", error)]
    found = [Finding("keys", Level.OK, f"{home.identity_path}: {identity.peer_id}, for its owner only")]
    for folder in (home.path, home.run_path):
        if folder.exists() and folder.stat().st_mode & 0o002:
            found.append(
                Finding("keys", Level.WARN, f"{folder}: everybody may write there", f"run `chmod o-w {folder}`")
            )
    return identity, found


def _crypto(charter: Charter, probe: Probe) -> Iterator[Finding]:
    name = charter.security.suite
    try:
        chosen = suite(name, clock=probe.stopwatch)
    except InvalidConfig as error:
        yield failed("crypto", error)
        return
    aead, stream = chosen.aead_provider, chosen.keystream_provider
    cipher = chosen.terms.cipher
    what = f"{name}: {cipher}-GCM by {aead.name} {aead.version}, {cipher}-CTR by {stream.name} {stream.version}"
    yield Finding("crypto", Level.OK, what)


def _is_member(home: Home, charter: Charter, identity: Identity) -> bool:
    try:
        own_membership(home, charter, identity)
    except InvalidConfig:
        return False
    return True


def _standing(home: Home, charter: Charter, identity: Identity | None) -> Iterator[Finding]:
    """Look at the charter: is this member in it, do its files fit, who has signed it."""
    path, name = home.charter_path, home.config.name
    shown = shortest(path)
    if identity is not None:
        try:
            own_membership(home, charter, identity)
        except InvalidConfig as error:
            yield Finding("charter", Level.FAIL, str(error), f"p2pfl charter join {shown} --config {home.path}")
            return
    faults = terms_faults(path, charter)
    for fault in faults:
        what, _, todo = fault.partition("; ")
        yield Finding("charter", Level.FAIL, what, todo)
    if not faults:
        digest = charter.hash().hex()[:16]
        yield Finding(
            "charter", Level.OK, f"{shown}: {charter.name} version {charter.version}, {digest}, files as it says"
        )
    yield from _signatures(home, charter, name)


def _signatures(home: Home, charter: Charter, name: str) -> Iterator[Finding]:
    if len(charter.members) < 2:
        yield Finding("signatures", Level.WARN, "nobody else has joined", "pass the charter's folder on")
        return
    faults = member_faults(charter)
    waiting = [each for each in sorted(faults) if each not in charter.signatures and each != name]
    if faults and name not in charter.signatures:
        todo = f"read p2pfl charter show, then p2pfl charter sign {shortest(home.charter_path)} --config {home.path}"
        yield Finding("signatures", Level.FAIL, f"{name} has not signed", todo)
    for each in sorted(set(faults) & set(charter.signatures)):
        what, _, todo = faults[each].partition("; ")
        yield Finding("signatures", Level.FAIL, what, todo)
    if waiting:
        what = f"waits for {', '.join(waiting)}, who {'have' if len(waiting) > 1 else 'has'} not signed"
        yield Finding("signatures", Level.WARN, what, "pass the charter's folder on, and take a copy when all have")
    if not faults:
        what = f"all {len(charter.members)} members have signed: the charter is in force"
        yield Finding("signatures", Level.OK, what)


def _disk(home: Home, charter: Charter, probe: Probe) -> Iterator[Finding]:
    model, vectors = 4 * charter.model.parameters, vectors_of(charter.training, charter.averaging)
    every = home.config.history_every
    copies = -(-charter.rounds // every) if every else 0
    # Of a checkpoint that is being written the old ones are still there.
    needed = SPARE_BYTES + model * (vectors * VECTORS_KEPT * (KEEP + 1) + copies)
    free = probe.free(home.run_path)
    what = f"{home.run_path}: {size_text(free)} free, a run takes about {size_text(needed)}"
    if free < needed:
        yield Finding("disk", Level.FAIL, what, "make room, or name another folder as run in peer.toml")
    elif free < 2 * needed:
        yield Finding("disk", Level.WARN, what, "make room before it fills")
    else:
        yield Finding("disk", Level.OK, what)


def peer_runs(home: Home) -> bool:
    """Return whether a peer runs in this folder."""
    return is_held(home.run_path)


def _ports(home: Home) -> Iterator[Finding]:
    progress, runs = None, peer_runs(home)
    with suppress(InvalidConfig):
        progress = read_progress(home.run_path / STATUS_FILE) if runs else None
    for address in home.config.listen:
        fault = _bind_fault(address)
        # A peer that cannot write its status, as on a full disk, still holds its port.
        if fault is not None and runs and (progress is None or address in progress.listen):
            yield Finding("port", Level.OK, f"{address}: this member's own peer listens there")
        elif fault is None:
            yield Finding("port", Level.OK, f"{address}: free")
        else:
            yield Finding("port", Level.FAIL, f"{address}: {fault[0]}", fault[1])


def _bind_fault(address: str) -> tuple[str, str] | None:
    """Try to listen at an address; return why that fails, and what to do."""
    (first, host), (_, port), *_ = Multiaddr(address).items()
    if not first.name.startswith("ip"):
        return "is a name", "listen on an IP address, such as /ip4/0.0.0.0/tcp/4001"
    family = socket.AF_INET6 if first.name == "ip6" else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, int(port)))
            sock.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return "is taken by another process", f"find it with `ss -ltnp 'sport = :{port}'`, or choose another"
            if error.errno == errno.EACCES:
                return "may not be used by this user", "choose a port of 1024 or more"
            return str(error.strerror), "choose an address of this machine; /ip4/0.0.0.0 is all of them"
    return None


def _announced(home: Home, charter: Charter | None) -> Iterator[Finding]:
    announce, file = home.config.announce, home.path / home.file
    if not announce:
        todo = 'write where the others reach this peer, e.g. announce = ["/dns4/peer.example.org/tcp/4001"]'
        yield Finding("announce", Level.FAIL, f"{file}: announce is empty", todo)
        return
    member = None if charter is None else charter.member(home.config.name)
    others = [] if charter is None else [each for each in charter.members if each.name != home.config.name]
    addresses = [address for each in others for address in each.addresses]
    if any(map(_is_loopback, announce)) and not all(map(_is_loopback, addresses)):
        todo = "announce an address that the others can reach"
        yield Finding("announce", Level.FAIL, f"{file}: {', '.join(announce)} leads others to themselves", todo)
    elif member is not None and set(announce) != set(member.addresses):
        what = f"{', '.join(announce)} is not what the charter says: {', '.join(member.addresses)}"
        todo = "while it runs, the peer tells the others where it moved; they find it if one of them is still reached"
        yield Finding("announce", Level.WARN, what, todo)
    else:
        yield Finding("announce", Level.OK, ", ".join(announce))


def _is_loopback(address: str) -> bool:
    (_, host), *_ = Multiaddr(address).items()
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return bool(host == "localhost")


# Data and a step


def _training(home: Home, charter: Charter, probe: Probe) -> Iterator[Finding]:
    """Read the data as a peer does, and make one local step with it; the model is thrown away."""
    try:
        task = load_task(charter.task.source, home.charter_path.parent, charter.task.sha256, charter.task.table).task
    except InvalidConfig:
        return  # told with the charter
    table = charter.task.table
    if table is not None and (faults := list(_schema_faults(home, table))):
        yield from faults
        return
    try:
        data = read_data(task, home.data)
        weight_for(charter.averaging, len(data.train))
    except InvalidConfig as error:
        yield failed("data", error)
        return
    fits = "; its columns are the charter's" if table is not None else ""
    what = f"{len(data.train)} examples to train on, {len(data.test)} held out{fits}"
    yield Finding("data", Level.OK, what)
    try:
        yield _step(home, charter, task, data, probe)
    except P2pflError as error:
        yield failed("training", error)


def _schema_faults(home: Home, table: TableTerms) -> Iterator[Finding]:
    for key in ("path", "test_path"):
        file = home.data.get(key)
        if isinstance(file, str):
            for fault in check_table(Path(file), table).faults:
                what, _, todo = fault.partition("; ")
                yield Finding("data", Level.FAIL, what, todo)
        elif key == "path":
            todo = 'write path = "TABLE.csv" under [data]'
            yield Finding("data", Level.FAIL, f"{home.path / home.file}: [data] names no file", todo)


def _step(home: Home, charter: Charter, task: Task, data: Data, probe: Probe) -> Finding:
    terms = charter.training
    threads = home.config.threads
    torch.set_num_threads(threads)
    privately, clip, seed, clock = Privately.of(charter, os.urandom), terms.clip_norm, home.config.seed, probe.stopwatch
    kind = Trainer if privately is None else partial(PrivateTrainer, privately=privately)
    trainer = kind(task, data, local_steps=1, batch_size=terms.batch_size, clip_norm=clip, seed=seed, clock=clock)
    load_model(home.charter_path.parent / charter.model.file, trainer.model)
    trained = trainer.train(flatten(trainer.model), 0)
    if not trained.steps:  # round 0 only measured what all must agree on
        trained = trainer.train(trained.vector, 1)
    started = probe.stopwatch()
    trained = trainer.train(trained.vector, 2)
    seconds = (probe.stopwatch() - started) * terms.local_steps
    what = f"a local step works: loss {trained.loss:.4g}; a round's {terms.local_steps} take about {seconds:.2g} s"
    what += f" on {threads} of {probe.cores()} cores"
    if seconds > charter.deadlines.round:
        todo = (
            f"deadlines.round is {charter.deadlines.round:g} s: raise threads in peer.toml, or agree on a longer one, "
            "or on training.window"
        )
        return Finding("training", Level.WARN, what, todo)
    return Finding("training", Level.OK, what)


# The others


def _visits(
    home: Home, charter: Charter, identity: Identity, probe: Probe, wait: float, tell: Callable[[str], None]
) -> list[Finding]:
    runs = peer_runs(home)
    # A port that is taken has been told; the others are visited all the same, and cannot dial back.
    listens = not runs and all(_bind_fault(address) is None for address in home.config.listen)
    try:
        visits = Visits(home, charter, identity, probe, listens=listens, peer_runs=runs)
        trio.run(visits.make, wait, tell)
    except P2pflError as error:
        return [failed("reach", error)]
    except BaseExceptionGroup as group:
        if group.subgroup(KeyboardInterrupt) is not None:
            raise KeyboardInterrupt from None
        raise
    return visit_findings(charter, visits.results, probe, not charter_faults(charter), dialled=runs or listens)


def _next(home: Home, charter: Charter | None, findings: list[Finding]) -> str:
    faults = [finding for finding in findings if finding.level is Level.FAIL]
    if faults:
        return f"mend what FAILed, {len(faults)} thing{'s' if len(faults) > 1 else ''}, and run this again"
    if charter is None or charter_faults(charter):
        return f"p2pfl status {home.path} says whom the charter waits for"
    if is_finished(home, charter):
        return f"p2pfl evaluate {home.path}"
    return "nothing to do: the peer runs" if peer_runs(home) else f"p2pfl peer --config {home.path}"
