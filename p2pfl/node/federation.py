"""A member's folder on disk: the charter beside its task file and initial model, this peer's settings and key.

Everything a peer must check before it may start is checked here, against the charter's hashes and signatures.
"""

import os
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import networkx as nx
import tomlkit
from multiaddr import Multiaddr
from multiaddr.exceptions import Error as MultiaddrError

from p2pfl.core.charter import Charter, Member, ModelTerms, TableTerms, TaskTerms
from p2pfl.core.config import PeerConfig
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import parse_toml, validate
from p2pfl.crypto.beacon import commitment_to
from p2pfl.crypto.identity import Identity, Signer, charter_faults, has_revealed, public_key, salt_of
from p2pfl.crypto.suite import SUITES
from p2pfl.gossip.grouping import averaging_faults, privacy_faults, scaling_faults
from p2pfl.gossip.topology import TOPOLOGIES, overlay_of
from p2pfl.learning.chartered import algorithm_of, verify_task
from p2pfl.learning.private_trainer import verify_model
from p2pfl.learning.task import LoadedTask, load_task, make_model
from p2pfl.learning.tasks import BUILT_IN
from p2pfl.learning.vector import assign, initial, layout, load_model, save_model
from p2pfl.node.store import (
    ask_passphrase,
    create_identity,
    create_sm2_key,
    is_under_passphrase,
    load_identity,
    load_sm2_key,
    read_text,
    sha256_of,
    write_atomic,
)

CONFIG_FILE, CHARTER_FILE, INITIAL_FILE = "peer.toml", "charter.toml", "initial.safetensors"
MODEL_FILE, HISTORY_FILE = "model.safetensors", "history.f32"
"""What a peer leaves in its run folder beside the trace: its last model, and raw float32 copies of earlier ones."""
STATE_FOLDER, FINISHED_FILE = "state", "finished"
"""In the run folder: what a peer that starts again goes on from; and that there is nothing left to go on with."""


_WRITE_ADDRESS = "write /ip4/192.0.2.1/tcp/4001 or /dns4/peer.example.org/tcp/4001"


@dataclass(frozen=True)
class Home:
    """A member's folder: its `peer.toml`, and where that says the rest is."""

    path: Path
    config: PeerConfig
    file: str = CONFIG_FILE

    @property
    def charter_path(self) -> Path:
        """The charter's file."""
        return self.path / self.config.charter

    @property
    def run_path(self) -> Path:
        """The folder of this peer's trace and model."""
        return self.path / self.config.run

    @property
    def identity_path(self) -> Path:
        """The file of the identity's key."""
        return self.path / self.config.identity

    @property
    def sm2_key_path(self) -> Path:
        """The file of the SM2 key, beside the identity's: `identity-sm2.pem` beside `identity.pem`."""
        path = self.identity_path
        return path.with_name(f"{path.stem}-sm2{path.suffix}")

    @property
    def data(self) -> dict[str, Any]:
        """The `[data]` table as the task gets it: files under `path` and `test_path` are relative to this folder."""
        data = self.config.data
        named = {key: data[key] for key in ("path", "test_path") if isinstance(data.get(key), str)}
        files = {key: str(self.path.absolute() / name) for key, name in named.items() if "://" not in name}
        return {**data, **files}

    def identity(self) -> Identity:
        """Read the key.

        Raises:
            InvalidConfig: see `p2pfl.node.store.load_identity`.
        """
        return load_identity(self.identity_path, self._passphrase())

    def signer(self, suite: str) -> Signer:
        """Read all keys that this member signs with under a suite; a passphrase is asked once.

        Raises:
            InvalidConfig: see `p2pfl.node.store.load_identity` and `load_sm2_key`.
        """
        passphrase = self._passphrase()
        identity = load_identity(self.identity_path, passphrase)
        if not SUITES[suite].sm2_signatures:
            return Signer(identity)
        if not self.sm2_key_path.exists():
            raise InvalidConfig(
                f"{self.sm2_key_path}: this member's SM2 key is not there; restore it from your backup, "
                "or run `p2pfl charter join`, which makes one"
            )
        return Signer(identity, load_sm2_key(self.sm2_key_path, passphrase))

    def member(self, charter: Charter, salt: bytes | None = None) -> Member:
        """Return this member's entry in a charter; makes the SM2 key if the suite asks for one.

        Args:
            charter: a draft of it.
            salt: what the entry commits to; by default one that follows from the key.

        Raises:
            InvalidConfig: a key cannot be read or made, or `announce` is empty.
        """
        passphrase = self._passphrase()
        identity = load_identity(self.identity_path, passphrase)
        values: dict[str, Any] = {"name": self.config.name, "peer_id": identity.peer_id}
        salt = salt_of(identity, charter.name, charter.version) if salt is None else salt
        values["salt_commitment"] = commitment_to(salt, charter.name, charter.version, identity.peer_id)
        if SUITES[charter.security.suite].sm2_signatures:
            if self.sm2_key_path.exists():
                key = load_sm2_key(self.sm2_key_path, passphrase)
            else:
                sealed = is_under_passphrase(self.identity_path)
                key = create_sm2_key(self.sm2_key_path, passphrase() if sealed else None)
            values["sm2_public_key"] = key.public.hex()
        return validate(Member, {**values, "addresses": self.config.announce}, str(self.path / self.file))

    def _passphrase(self) -> Callable[[], bytes]:
        file = self.path / self.config.passphrase_file if self.config.passphrase_file else None
        return cache(lambda: ask_passphrase(file, self.identity_path))


def open_home(config_path: Path) -> Home:
    """Read a `peer.toml`.

    Raises:
        InvalidConfig: it is missing, or something in it is wrong.
    """
    if config_path.is_dir():
        config_path = config_path / CONFIG_FILE
    values = parse_toml(read_text(config_path, "this peer's settings"), str(config_path))
    config = validate(PeerConfig, values, str(config_path))
    for address in (*config.listen, *config.announce):
        check_address(address, str(config_path))
    return Home(config_path.parent, config, config_path.name)


def create_home(path: Path, config: PeerConfig, passphrase: bytes | None = None) -> tuple[Home, Identity]:
    """Make a member's folder with a fresh key, under a passphrase if one is given, and its `peer.toml`.

    Raises:
        InvalidConfig: there is one already.
    """
    if (path / CONFIG_FILE).exists():
        raise InvalidConfig(f"{path / CONFIG_FILE}: exists already; choose another name")
    path.mkdir(parents=True, exist_ok=True)
    identity = create_identity(path / config.identity, passphrase)
    write_atomic(path / CONFIG_FILE, render_config(config).encode())
    return Home(path, config), identity


def remember_charter(home: Home, charter: Path) -> bool:
    """Write into `peer.toml` where the charter is that this member joined or signed; the rest of the file stays.

    Returns:
        Whether anything had to be written.

    Raises:
        InvalidConfig: the file cannot be written.
    """
    if home.charter_path.resolve() == charter.resolve():
        return False
    path = home.path / home.file
    document = tomlkit.parse(read_text(path, "this peer's settings"))
    document["charter"] = os.path.relpath(charter.resolve(), home.path.resolve())
    write_atomic(path, tomlkit.dumps(document).encode())
    return True


def render_config(config: PeerConfig) -> str:
    """Write `peer.toml` as a person wants to find it."""
    document = tomlkit.document()
    document.add(tomlkit.comment("What this peer keeps for itself; paths are relative to this folder."))
    values = config.model_dump(mode="json")
    notes = {
        "listen": "where this peer listens",
        "announce": "where the others reach it; `p2pfl charter join` puts these into the charter",
        "threads": "of local steps; as many as this machine has cores to give, for large models",
        "evaluate_every": "rounds",
        "history_every": "rounds between copies of the model for plots; 0: none",
        "seed": "draws the order of the training examples",
        "stop_seconds": "for a round to end in, once the peer was asked to stop",
        "logging": "level is off, error, warning, info or debug; no file: stderr",
        "metrics": "port 0: nothing listens",
    }
    for key, value in values.items():
        item = tomlkit.item(value)
        if key in notes:
            item.comment(notes[key])
        document.add(key, item)
    return tomlkit.dumps(document)


def check_address(address: str, where: str) -> None:
    """Check that a peer can be dialled, directly or over a relay, or listen, at `address`.

    Raises:
        InvalidConfig: it is not a TCP multiaddress.
    """
    try:
        protocols = [protocol.name for protocol in Multiaddr(address).protocols()]
    except (MultiaddrError, ValueError) as error:
        raise InvalidConfig(f"{where}: {address!r} is not an address; {_WRITE_ADDRESS}") from error
    over_relay = ["p2p", "p2p-circuit"]
    kinds = (["tcp"], ["tcp", *over_relay], ["tcp", *over_relay, "p2p"])
    host, *rest = protocols or [""]
    if host not in ("ip4", "ip6", "dns", "dns4", "dns6") or rest not in kinds:
        raise InvalidConfig(f"{where}: {address!r} is not a TCP address; {_WRITE_ADDRESS}")


# The charter's file


def load_charter(path: Path) -> Charter:
    """Read a charter or a draft; the signatures are not checked.

    Raises:
        InvalidConfig: something in it is wrong.
    """
    where = str(path)
    charter = validate(Charter, parse_toml(read_text(path, "the charter"), where), where)
    for member in charter.members:
        _check_peer_id(member, where)
        for address in member.addresses:
            check_address(address, f"{where}: members.{member.name}.addresses")
    return charter


def _check_peer_id(member: Member, where: str) -> None:
    try:
        public_key(member.peer_id)  # type: ignore[arg-type]
    except InvalidConfig as error:
        raise InvalidConfig(f"{where}: members.{member.name}.peer_id: {error}") from error


def save_charter(path: Path, charter: Charter) -> None:
    """Write a charter where `load_charter` reads it.

    Raises:
        InvalidConfig: it cannot be written.
    """
    write_atomic(path, render_charter(charter).encode())


def render_charter(charter: Charter) -> str:
    """Write a charter as TOML."""
    document = tomlkit.document()
    document.add(
        tomlkit.comment("A federation's charter: what all members agree on. `p2pfl charter show` explains it.")
    )
    values = charter.model_dump(mode="json", exclude_none=True)
    members, signatures, salts = values.pop("members"), values.pop("signatures"), values.pop("salts")
    for key, value in values.items():
        document.add(key, tomlkit.item(value))
    tables = tomlkit.aot()
    for member in members:
        tables.append(tomlkit.item(member))
    if members:
        document.add("members", tables)
    if signatures:
        document.add("signatures", tomlkit.item(signatures))
    if salts:
        document.add("salts", tomlkit.item(salts))
    text = tomlkit.dumps(document)
    # What peers read must be what was meant: a library's surprise would surface here, not at a member's site.
    if tomllib.loads(text).get("members", []) != members:
        raise InvalidConfig("this charter cannot be written as TOML")
    return text


def draft_charter(
    folder: Path,
    name: str,
    task_source: str,
    terms: Mapping[str, Any],
    seed: int = 0,
    table: TableTerms | None = None,
) -> Charter:
    """Draw up a charter without members in `folder`: load the task, make the initial model, note both hashes.

    Args:
        folder: where the charter will stand; a task file is looked for here.
        name: the federation's.
        task_source: a built-in task or `file.py:ClassName`.
        terms: tables to add, such as `training`.
        seed: draws the initial model.
        table: what every member's table holds, for a task that takes one.

    Raises:
        InvalidConfig: the task or a term cannot be used.
    """
    loaded = load_task(task_source, folder, table=table)
    values = {
        "name": name,
        "task": TaskTerms(source=task_source, sha256=loaded.sha256, table=table).model_dump(),
        "model": ModelTerms(file=INITIAL_FILE, sha256="0" * 64, parameters=1).model_dump(),
        **terms,
    }
    # Terms that cannot be used leave nothing behind.
    draft = validate(Charter, values, "draft")
    verify_task(algorithm_of(draft.training, draft.averaging), loaded.task)
    return _with_model(folder, draft, loaded, seed)


def redraw_model(path: Path, charter: Charter, seed: int = 0) -> Charter:
    """Return the draft with an initial model that fits its task as it is now; no signature survives a change.

    Args:
        path: the charter's file.
        charter: what it says.
        seed: draws the initial model.

    Raises:
        InvalidConfig: the task cannot be used.
    """
    loaded = load_task(charter.task.source, path.parent, charter.task.sha256, charter.task.table)
    drawn = _with_model(path.parent, charter, loaded, seed)
    return charter if drawn.hash() == charter.hash() else drawn.model_copy(update={"signatures": {}})


def _with_model(folder: Path, draft: Charter, loaded: LoadedTask, seed: int) -> Charter:
    """Write an initial model into `folder`; return the draft with its size and hash."""
    model = make_model(loaded.task)
    assign(model, initial(loaded.task, seed))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / draft.model.file
    save_model(path, model, {"task": draft.task.source})
    sha256 = sha256_of(path, "the initial model")
    written = draft.model.model_copy(update={"sha256": sha256, "parameters": layout(model).size})
    return draft.model_copy(update={"model": written})


def next_version(charter: Charter, without: Collection[str] = (), rounds: int | None = None) -> Charter:
    """Return the draft of a charter's next version: the same terms and members, unsigned; each has to join again.

    Args:
        charter: the one before.
        without: names of members that leave.
        rounds: of training, if others.

    Raises:
        InvalidConfig: there is no such member, or the terms do not fit those that are left.
    """
    for name in without:
        if charter.member(name) is None:
            raise InvalidConfig(f"{name} is not a member; there are {', '.join(charter.names())}")
    values = charter.model_dump()
    values["members"] = [member for member in values["members"] if member["name"] not in without]
    values["training"] |= {} if rounds is None else {"rounds": rounds}
    return validate(Charter, {**values, "version": charter.version + 1, "signatures": {}, "salts": {}}, "draft")


def complete_draft(folder: Path, draft: Charter, task: LoadedTask) -> Charter:
    """Put the task's file into a draft's folder, in which its model is; return the draft with that model's hash.

    Raises:
        InvalidConfig: a file cannot be read or written.
    """
    if draft.task.source not in BUILT_IN:
        write_atomic(folder / task.path.name, task.path.read_bytes())
    sha256 = sha256_of(folder / draft.model.file, "the initial model")
    return draft.model_copy(update={"model": draft.model.model_copy(update={"sha256": sha256})})


def topology_terms(topology: str) -> dict[str, Any]:
    """Return what `[averaging]` says of a topology: its name; or the edges in a file, whose nodes are members' names.

    Raises:
        InvalidConfig: the file is no graph.
    """
    path = Path(topology)
    if topology in TOPOLOGIES or not path.is_file():
        return {"topology": topology}
    try:
        read = nx.read_graphml if path.suffix == ".graphml" else nx.read_edgelist
        graph = nx.Graph(read(path))
    except (ValueError, TypeError, IndexError, SyntaxError, nx.NetworkXException) as error:
        raise InvalidConfig(f"{path}: neither GraphML (.graphml) nor two names a line: {error}") from error
    edges = sorted(tuple(sorted(map(str, edge))) for edge in graph.edges if edge[0] != edge[1])
    if not edges:
        raise InvalidConfig(f"{path}: has no edges; write two members' names a line")
    return {"topology": "edges", "edges": edges}


def join_charter(charter: Charter, member: Member) -> Charter:
    """Return the draft with a member added, or changed if its key is there; no signature survives a change.

    Raises:
        InvalidConfig: the name or the key belongs to another member, or salts are known by which this one's could be
            chosen.
    """
    others = [known for known in charter.members if known.peer_id != member.peer_id]
    if any(known.name == member.name for known in others):
        raise InvalidConfig(
            f"{member.name} is in this draft with another key; choose another name, or remove that entry"
        )
    before = next((known for known in charter.members if known.peer_id == member.peer_id), None)
    revealed = [known.name for known in charter.members if has_revealed(charter, known)]
    if revealed and (before is None or before.salt_commitment != member.salt_commitment):
        raise InvalidConfig(
            f"{member.name} cannot join version {charter.version}: {revealed[0]} has revealed its salt, by which "
            f"another could be chosen; write version = {charter.version + 1} into the draft, and all join again"
        )
    values = charter.model_dump()
    values["members"] = [*(known.model_dump() for known in others), member.model_dump()]
    salts = {known.name: charter.salts[known.name] for known in others if has_revealed(charter, known)}
    joined = validate(Charter, {**values, "signatures": {}, "salts": salts}, "draft")
    return charter if joined.hash() == charter.hash() else joined


@dataclass(frozen=True)
class Federation:
    """A charter in force, with its task and its initial model, all checked."""

    charter: Charter
    task: LoadedTask
    model_path: Path


def terms_faults(path: Path, charter: Charter) -> list[str]:
    """Return what is wrong with the files a charter speaks of, a line each."""
    faults, task = _averaging_faults(charter), None
    try:
        task = load_task(charter.task.source, path.parent, charter.task.sha256, charter.task.table)
        verify_task(algorithm_of(charter.training, charter.averaging), task.task)
        if charter.privacy is not None and charter.privacy.examples is not None:
            verify_model(make_model(task.task), charter.privacy.examples, charter.task.source)
    except InvalidConfig as error:
        faults.append(str(error))
    try:
        model_path = _check_model_file(path, charter)
        if task is not None:
            _check_model_fits(path, charter, task, model_path)
    except InvalidConfig as error:
        faults.append(str(error))
    return faults


def _averaging_faults(charter: Charter) -> list[str]:
    graph, members = None, len(charter.members)
    if charter.averaging.topology != "groups" and members > 1:
        try:
            graph = overlay_of(charter)
        except InvalidConfig as error:
            return [str(error)]
    faults = averaging_faults(members, charter.averaging, graph) if members > 1 else []
    faults = faults or (privacy_faults(charter, graph) if members > 1 else [])
    return [*faults, *scaling_faults(members, charter.task.whole_rounds)]


def _check_model_file(path: Path, charter: Charter) -> Path:
    model_path = path.parent / charter.model.file
    actual = sha256_of(model_path, "the initial model")
    if actual != charter.model.sha256:
        raise InvalidConfig(
            f"{model_path}: has SHA-256 {actual[:12]}…, the charter says {charter.model.sha256[:12]}…; "
            "get the file that was signed"
        )
    return model_path


def _check_model_fits(path: Path, charter: Charter, task: LoadedTask, model_path: Path) -> None:
    model = make_model(task.task)
    try:
        load_model(model_path, model)
    except InvalidConfig as error:
        raise InvalidConfig(f"{error} If its columns were edited, p2pfl charter model {path} draws it again") from error
    size = layout(model).size
    if size != charter.model.parameters:
        raise InvalidConfig(
            f"{path}: model.parameters is {charter.model.parameters}, but the task's model has {size}; "
            f"draw it again: p2pfl charter model {path}"
        )


def open_federation(path: Path) -> Federation:
    """Read a charter that is to be acted on.

    Raises:
        InvalidConfig: a member has not signed, a hash differs, or the model does not fit the task.
    """
    charter = load_charter(path)
    faults = [*charter_faults(charter), *_averaging_faults(charter)]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InvalidConfig(f"{path}: not in force: {faults[0]}{more}; `p2pfl charter check` lists what is missing")
    task = load_task(charter.task.source, path.parent, charter.task.sha256, charter.task.table)
    model_path = _check_model_file(path, charter)
    _check_model_fits(path, charter, task, model_path)
    return Federation(charter, task, model_path)


def own_membership(home: Home, charter: Charter, identity: Identity) -> Member:
    """Return this peer's entry in the charter.

    Raises:
        InvalidConfig: it has none, or one with another key.
    """
    member = charter.member(home.config.name)
    if member is None:
        names = ", ".join(known.name for known in charter.members)
        raise InvalidConfig(f"{home.charter_path}: {home.config.name} is not a member; there are {names}")
    if member.peer_id != identity.peer_id:
        raise InvalidConfig(
            f"{home.charter_path}: {member.name} has peer id {member.peer_id}, but the key here is {identity.peer_id}"
        )
    return member
