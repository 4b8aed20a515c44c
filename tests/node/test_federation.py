"""A member's folder: from init to a charter in force, and every fault told in one line that names who and what."""

import base64
import os
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.core.charter import Charter, Member, ModelTerms, SecurityTerms, TaskTerms
from p2pfl.core.config import PeerConfig
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import parse_toml, validate
from p2pfl.crypto import sm2
from p2pfl.crypto.beacon import beacon_of
from p2pfl.crypto.identity import Identity, charter_faults, sign_charter
from p2pfl.learning.task import load_task, make_model
from p2pfl.learning.vector import flatten, initial, load_model, save_model
from p2pfl.node import federation
from p2pfl.node.federation import (
    INITIAL_FILE,
    Home,
    check_address,
    create_home,
    draft_charter,
    join_charter,
    load_charter,
    open_federation,
    open_home,
    own_membership,
    redraw_model,
    remember_charter,
    render_charter,
    render_config,
    save_charter,
    terms_faults,
    topology_terms,
)
from p2pfl.node.store import PASSPHRASE_VARIABLE, sha256_of
from tests.core.charters import charter_values
from tests.node.homes import NAMES, OWN_TASK, TASK, Folders, make_folders


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("digits") / "f")


@pytest.fixture(scope="module")
def _own(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("own") / "f", OWN_TASK)


@pytest.fixture
def own(_own: Folders, tmp_path: Path) -> Folders:
    """A federation with a task of its users' own, to break."""
    return _own.copy_to(tmp_path / "f")


def fault(function: Callable[[], object]) -> str:
    with pytest.raises(InvalidConfig) as raised:
        function()
    text = str(raised.value)
    assert text.isprintable(), "one line"
    return text


def changed(charter: Charter, **tables: dict[str, Any]) -> Charter:
    values = charter.model_dump()
    for table, change in tables.items():
        values[table] |= change
    return validate(Charter, values, "x")


# The way there


def test_three_members_come_to_a_charter_in_force(digits: Folders) -> None:
    federation = open_federation(digits.charter_path)
    charter = federation.charter
    assert charter_faults(charter) == terms_faults(digits.charter_path, charter) == []
    assert [member.name for member in charter.members] == list(NAMES)
    assert charter.training.rounds == 2
    assert charter.model.parameters == 4810
    model = make_model(federation.task.task)
    load_model(federation.model_path, model)
    assert (flatten(model) == initial(federation.task.task, 0)).all()
    for name, home in digits.homes.items():
        opened = open_home(home.path)
        assert opened == open_home(home.path / "peer.toml")
        assert opened.config == home.config
        identity = opened.identity()
        assert own_membership(opened, charter, identity).peer_id == identity.peer_id
        assert opened.run_path == home.path / "run"
        assert (home.path / "identity.pem").stat().st_mode & 0o777 == 0o600
        assert charter.member(name) == own_membership(home, charter, identity)


def test_a_task_of_ones_own_opens_too(own: Folders) -> None:
    assert open_federation(own.charter_path).charter.model.parameters == 8
    assert (own.path / INITIAL_FILE).exists()


def test_joining_voids_signatures_and_joining_again_updates(digits: Folders) -> None:
    charter = digits.charter()
    assert len(charter.signatures) == 3
    bee = charter.members[1]
    moved = join_charter(charter, bee.model_copy(update={"addresses": ("/ip4/192.0.2.7/tcp/9",), "name": "wasp"}))
    assert moved.signatures == {}
    assert {member.name for member in moved.members} == {"ant", "wasp", "cat.example"}
    assert moved.hash() != charter.hash()
    stranger = Member(name="bee", peer_id=Identity(bytes(32)).peer_id, addresses=bee.addresses)
    assert fault(lambda: join_charter(charter, stranger)).startswith("bee is in this draft with another key")
    taken = bee.model_copy(update={"name": "ant"})
    assert fault(lambda: join_charter(charter, taken)).startswith("ant is in this draft with another key")


def test_a_folder_is_made_once(tmp_path: Path, digits: Folders) -> None:
    home = digits.homes["ant"]
    before = {path: path.read_bytes() for path in home.path.iterdir()}
    assert "exists already" in fault(lambda: create_home(home.path, home.config))
    (tmp_path / "identity.pem").write_bytes(b"precious")
    assert "a key is never overwritten" in fault(lambda: create_home(tmp_path, home.config))
    assert (tmp_path / "identity.pem").read_bytes() == b"precious"
    assert before == {path: path.read_bytes() for path in home.path.iterdir()}


def test_equal_seeds_draw_equal_models_and_others_others(tmp_path: Path) -> None:
    hashes = []
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        folder.mkdir()
        hashes.append(draft_charter(folder, "x", "digits", {}, seed).model.sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_drawing_the_model_again_voids_signatures_only_if_it_is_another(own: Folders) -> None:
    charter = load_charter(own.charter_path)
    assert redraw_model(own.charter_path, charter, seed=0).signatures == charter.signatures
    other = redraw_model(own.charter_path, charter, seed=1)
    assert other.signatures == {}
    save_charter(own.charter_path, other)
    assert not [fault for fault in terms_faults(own.charter_path, other) if "initial" in fault]


def test_data_files_lie_where_the_settings_are(tmp_path: Path) -> None:
    data = {"path": "a.csv", "test_path": "/srv/b.csv", "index": 3, "other": "c.csv"}
    home = Home(tmp_path, PeerConfig(name="ant", data=data))
    assert home.data == {**data, "path": str(tmp_path / "a.csv")}
    elsewhere = Home(tmp_path, PeerConfig(name="ant", data={"path": "s3://bucket/a.csv"}))
    assert elsewhere.data == {"path": "s3://bucket/a.csv"}
    assert Home(tmp_path, PeerConfig(name="ant", data={"path": 7})).data == {"path": 7}


def test_a_draft_with_an_unusable_term_is_refused(tmp_path: Path) -> None:
    text = fault(lambda: draft_charter(tmp_path, "x", "digits", {"averaging": {"topology": "star"}}))
    assert text.startswith("draft: averaging.topology: ")
    assert fault(lambda: draft_charter(tmp_path, "../x", "digits", {})).startswith("draft: name: '../x'")
    assert "unknown task" in fault(lambda: draft_charter(tmp_path, "x", "faces", {}))


# What keeps a charter from being acted on


def test_who_has_not_signed_is_named(own: Folders) -> None:
    charter = own.charter()
    save_charter(own.charter_path, charter.model_copy(update={"signatures": {}}))
    own.sign("ant")
    text = fault(lambda: open_federation(own.charter_path))
    assert text.startswith(f"{own.charter_path}: not in force: bee has not signed (and 1 more); ")


def test_whose_signature_is_void_is_named(own: Folders) -> None:
    text = own.charter_path.read_text()
    own.charter_path.write_text(text.replace("rounds = 2", "rounds = 3"))
    assert "not in force: ant's signature is not for this charter: it was changed after signing" in fault(
        lambda: open_federation(own.charter_path)
    )


def terms_fault(own: Folders) -> str:
    """Return what opening says, which is what checking and signing say too."""
    opening = fault(lambda: open_federation(own.charter_path))
    assert terms_faults(own.charter_path, own.charter()) == [opening]
    return opening


def test_a_task_file_that_was_edited_is_not_executed(own: Folders) -> None:
    own.task_path.write_text("raise SystemExit('executed')")
    text = terms_fault(own)
    assert text.startswith("größe.py has SHA-256 ")
    assert own.charter().task.sha256[:12] in text
    assert "executed" not in text


def test_a_task_file_that_is_missing_or_raises_is_named(own: Folders) -> None:
    own.task_path.write_text("import torch\n\n1 / 0\n")
    charter = changed(own.charter(), task={"sha256": sha256_of(own.task_path, "the task")})
    save_charter(own.charter_path, charter)
    own.sign()
    assert terms_fault(own).startswith("größe.py:3: ZeroDivisionError: division by zero")
    own.task_path.unlink()
    assert "there is no file" in terms_fault(own)


def test_a_model_file_that_is_missing_or_another_is_named(own: Folders) -> None:
    path = own.path / INITIAL_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    text = terms_fault(own)
    assert text.startswith(f"{path}: has SHA-256 ")
    assert own.charter().model.sha256[:12] in text
    path.unlink()
    assert terms_fault(own) == f"{path}: the initial model cannot be read: No such file or directory"


def sign_model(own: Folders, **terms: Any) -> None:
    sha256 = sha256_of(own.path / INITIAL_FILE, "the initial model")
    save_charter(own.charter_path, changed(own.charter(), model={"sha256": sha256, **terms}))
    own.sign()


def test_a_signed_model_of_another_shape_is_refused_before_anyone_signs_it(own: Folders) -> None:
    save_model(own.path / INITIAL_FILE, torch.nn.Linear(4, 2), {})
    sign_model(own)
    assert terms_fault(own).startswith(f"{own.path / INITIAL_FILE}: tensor 'weight' has shape [2, 4], ")
    (own.path / INITIAL_FILE).write_bytes(b"hello")
    sign_model(own)
    assert "not a readable safetensors file" in terms_fault(own)


def test_a_signed_count_of_parameters_that_is_not_the_models_is_refused(own: Folders) -> None:
    sign_model(own, parameters=9)
    assert terms_fault(own) == (
        f"{own.charter_path}: model.parameters is 9, but the task's model has 8; "
        f"draw it again: p2pfl charter model {own.charter_path}"
    )


def test_faults_of_the_task_and_the_model_are_both_told(own: Folders) -> None:
    own.task_path.unlink()
    (own.path / INITIAL_FILE).unlink()
    assert len(terms_faults(own.charter_path, own.charter())) == 2


def test_a_task_whose_code_changed_its_model_is_refused(own: Folders) -> None:
    own.task_path.write_text(TASK.format(inputs=4))
    save_charter(own.charter_path, changed(own.charter(), task={"sha256": load_task(OWN_TASK, own.path).sha256}))
    own.sign()
    assert "tensor 'weight' has shape [2, 3], the model needs [2, 4]" in terms_fault(own)


def test_a_key_or_a_name_that_is_not_the_charters_is_refused(own: Folders) -> None:
    charter = own.charter()
    ant, bee = own.homes["ant"], own.homes["bee"]
    text = fault(lambda: own_membership(ant, charter, bee.identity()))
    assert "ant has peer id" in text
    assert bee.identity().peer_id in text
    assert "bee stands in the charter" not in text
    assert "ant stands in the charter" in fault(lambda: sign_charter(charter, "ant", bee.identity()))
    stranger = Home(ant.path, ant.config.model_copy(update={"name": "dog"}))
    text = fault(lambda: own_membership(stranger, charter, ant.identity()))
    assert text.endswith("dog is not a member; there are ant, bee, cat.example")


def test_a_folder_without_its_files_says_which(own: Folders) -> None:
    home = own.homes["ant"]
    (home.path / "identity.pem").chmod(0o640)
    assert "chmod 600" in fault(home.identity)
    (home.path / "identity.pem").unlink()
    assert "the private key cannot be read" in fault(home.identity)
    (home.path / "peer.toml").unlink()
    assert fault(lambda: open_home(home.path)) == (
        f"{home.path / 'peer.toml'}: this peer's settings cannot be read: No such file or directory"
    )
    assert "the charter cannot be read" in fault(lambda: load_charter(own.path / "other.toml"))


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("rounds = 5", "rounds: unknown setting; the known ones here are name, charter, "),
        ('seed = "x"', "seed: input should be a valid integer, got 'x'"),
        ('listen = ["0.0.0.0:4001"]', "'0.0.0.0:4001' is not an address; write /ip4/192.0.2.1/tcp/4001 or "),
        ('announce = ["/ip4/1.2.3.4/udp/1"]', "'/ip4/1.2.3.4/udp/1' is not a TCP address; write "),
        ("name = 'again'", "not TOML: "),
    ],
)
def test_a_fault_in_peer_toml_names_the_key(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "peer.toml"
    path.write_text(f'name = "ant"\n{line}\n')
    text = fault(lambda: open_home(tmp_path))
    assert text.startswith(f"{path}: ")
    assert what in text


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("rounds = 2", "round = 2", "training.round: unknown setting; the known ones here are algorithm, options, "),
        ("rounds = 2", 'rounds = "2"', "training.rounds: input should be a valid integer, got '2'"),
        ("/dns4/localhost/tcp/4002", "localhost:4002", "members.bee.addresses: 'localhost:4002' is not an address"),
        ('name = "bee"', 'name = "ant"', "two members have the name ant"),
        ('peer_id = "12D3', 'peer_id = "12D', "members.ant.peer_id: "),
    ],
)
def test_a_fault_in_the_charter_names_the_key(own: Folders, old: str, new: str, what: str) -> None:
    text = own.charter_path.read_text()
    assert old in text
    own.charter_path.write_text(text.replace(old, new))
    told = fault(lambda: open_federation(own.charter_path))
    assert told.startswith(f"{own.charter_path}: ")
    assert what in told


# Files come back as they were


printable = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,8}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(
    names, printable, st.lists(names, min_size=3, max_size=3, unique=True), st.floats(1e-300, 1e300),
    st.dictionaries(st.integers(0, 2), printable),
)  # fmt: skip
def test_every_charter_comes_back(
    name: str, source: str, members: list[str], tolerance: float, signatures: dict[int, str]
) -> None:
    values = charter_values() | {"name": name}
    values["task"]["source"] = source.replace(":", ";")
    values["averaging"]["tolerance"] = tolerance
    for member, given_name in zip(values["members"], members, strict=True):
        member["name"] = given_name
    values["signatures"] = {members[index]: text for index, text in signatures.items()}
    charter = validate(Charter, values, "x")
    again = validate(Charter, parse_toml(render_charter(charter), "x"), "x")
    assert again == charter
    assert again.hash() == charter.hash()


def test_a_charter_without_members_comes_back(tmp_path: Path) -> None:
    draft = Charter(
        name="x",
        task=TaskTerms(source=OWN_TASK, sha256="0" * 64),
        model=ModelTerms(file="Modell größer.safetensors", sha256="0" * 64, parameters=1),
    )
    save_charter(tmp_path / "c.toml", draft)
    assert load_charter(tmp_path / "c.toml") == draft
    assert "members" not in tomllib.loads((tmp_path / "c.toml").read_text())
    assert charter_faults(draft) == ["a federation needs at least two members"]


@settings(max_examples=60, deadline=None)
@given(
    names, st.lists(printable, max_size=3), st.integers(0, 2**62),
    st.dictionaries(printable, st.recursive(printable | st.integers(-5, 5) | st.booleans(), st.lists, max_leaves=4)),
)  # fmt: skip
def test_every_config_comes_back(name: str, announce: list[str], seed: int, data: dict[str, Any]) -> None:
    config = PeerConfig(name=name, announce=tuple(announce), seed=seed, data=data)
    assert validate(PeerConfig, parse_toml(render_config(config), "x"), "x") == config


def test_a_person_finds_explanations_in_the_files(digits: Folders) -> None:
    config = (digits.homes["ant"].path / "peer.toml").read_text()
    assert "# where the others reach it; `p2pfl charter join` puts these into the charter" in config
    assert "`p2pfl charter show` explains it" in digits.charter_path.read_text()


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "/ip4/192.0.2.1/tcp/4001",
        "/ip4/0.0.0.0/tcp/0",
        "/ip6/::1/tcp/65535",
        "/dns4/peer.bank-a.example/tcp/4001",
        "/dns6/peer.example/tcp/1",
        "/dns/localhost/tcp/4001",
    ],
)
def test_an_address_that_can_be_dialled_is_taken(address: str) -> None:
    check_address(address, "x")


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/",
        "//",
        "localhost:4001",
        "peer.example",
        "http://peer.example",
        "/ip4/192.0.2.1",
        "/ip4/192.0.2.1/tcp",
        "/ip4/192.0.2.1/tcp/65536",
        "/ip4/192.0.2.1/tcp/-1",
        "/ip4/192.0.2.1/tcp/http",
        "/ip4/192.0.2.256/tcp/1",
        "/ip4/peer.example/tcp/1",
        "/ip6/192.0.2.1/tcp/1",
        "/dns4//tcp/1",
        "/dns4/a b/tcp/1",
        "/tcp/1/ip4/192.0.2.1",
        "/ip4/192.0.2.1/udp/1",
        "/ip4/192.0.2.1/udp/1/quic-v1",
        "/ip4/192.0.2.1/tcp/1/ws",
        "/unix/a",
        "/memory/1",
        "\n",
        "\x1b[2J",
        "/dns4/a\x1b[2J/tcp/1",
    ],
    ids=ascii,
)
def test_any_other_address_is_refused_with_an_example(address: str) -> None:
    text = fault(lambda: check_address(address, "x.toml"))
    assert text.startswith("x.toml: ")
    assert text.endswith("write /ip4/192.0.2.1/tcp/4001 or /dns4/peer.example.org/tcp/4001")


pieces = st.sampled_from(
    ["", "ip4", "ip6", "dns4", "dns", "tcp", "udp", "p2p", "unix", "onion", "onion3", "garlic64", "certhash", "ip6zone",
     "ipcidr", "http-path", "sni", "x", "1", "4001", "192.0.2.1", "::1", "a.example", "%", "ä", "\0", "=", "9999999"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(pieces, max_size=6).map(lambda parts: "/" + "/".join(parts)) | st.text(max_size=30))
def test_whatever_address_comes_raises_nothing_else(address: str) -> None:
    try:
        check_address(address, "x")
    except InvalidConfig as error:
        assert str(error).isprintable()


def test_a_federation_that_cannot_be_written_leaves_the_old_one(own: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    before = own.charter_path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left on device" in fault(lambda: save_charter(own.charter_path, own.charter()))
    assert own.charter_path.read_bytes() == before


def test_a_member_remembers_where_the_charter_is_and_keeps_its_own_words(own: Folders) -> None:
    home = own.homes["ant"]
    path = home.path / "mine.toml"
    (home.path / "peer.toml").rename(path)
    path.write_text(path.read_text().replace("seed = 0", "seed = 0  # as ever"))
    home = open_home(path)
    assert not remember_charter(home, own.charter_path)
    other = own.path / "other" / "charter.toml"
    other.parent.mkdir()
    other.write_bytes(own.charter_path.read_bytes())
    assert remember_charter(home, other)
    assert sorted(file.name for file in home.path.iterdir()) == ["identity.pem", "mine.toml"]
    assert "# as ever" in path.read_text()
    assert open_home(path).charter_path.resolve() == other.resolve()
    assert open_home(path).config == home.config.model_copy(update={"charter": "../other/charter.toml"})


# Under a suite with SM2 signatures


@pytest.fixture(scope="module")
def _gm() -> None:
    for name in ("fastecdsa", "gmssl_pyx"):
        pytest.importorskip(name, reason="the extra [gm] is not installed", exc_type=ImportError)


def gm_draft(folder: Path, *names: str) -> tuple[Charter, list[Home]]:
    """Return a gm draft that these members have joined, and their folders."""
    charter = draft_charter(folder, "x", "digits", {"security": {"suite": "gm"}, "averaging": {"masks": "off"}})
    homes = []
    for name in names:
        config = PeerConfig(name=name, announce=("/ip4/192.0.2.1/tcp/1",))
        homes.append(create_home(folder / name, config)[0])
        charter = join_charter(charter, homes[-1].member(charter))
    return charter, homes


@pytest.mark.usefixtures("_gm")
def test_members_of_a_gm_charter_sign_with_sm2_too(tmp_path: Path) -> None:
    charter, homes = gm_draft(tmp_path, "ant", "bee")
    for home in homes:
        member = charter.member(home.config.name)
        assert member is not None
        path = home.path / "identity-sm2.pem"
        assert path == home.sm2_key_path
        assert path.stat().st_mode & 0o777 == 0o600
        assert member == home.member(charter), "the key is made once"
        signer = home.signer("gm")
        assert signer.sm2_key is not None
        assert signer.sm2_key.public.hex() == member.sm2_public_key
        charter = sign_charter(charter, member.name, signer.identity, signer.sm2_key)
    path = tmp_path / "charter.toml"
    save_charter(path, charter)
    assert load_charter(path) == charter
    assert open_federation(path).charter.hash() == charter.hash()
    # Another suite has no use for these keys.
    aes = charter.model_copy(update={"security": SecurityTerms(suite="aes")})
    for home in homes:
        assert home.member(aes).sm2_public_key is None
        assert home.signer("sm4").sm2_key is None


@pytest.mark.usefixtures("_gm")
def test_a_gm_charter_that_lacks_an_sm2_signature_is_not_in_force(tmp_path: Path) -> None:
    charter, homes = gm_draft(tmp_path, "ant", "bee")
    for home in homes:
        signer = home.signer("gm")
        charter = sign_charter(charter, home.config.name, signer.identity, signer.sm2_key)
    ed25519_alone = base64.b64encode(base64.b64decode(charter.signatures["bee"])[:64]).decode()
    path = tmp_path / "charter.toml"
    save_charter(path, charter.model_copy(update={"signatures": charter.signatures | {"bee": ed25519_alone}}))
    text = fault(lambda: open_federation(path))
    assert "not in force: bee's signature is not for this charter" in text
    assert "a signature of 64 bytes; under the suite gm it has 128" in text


def test_no_sm2_key_is_made_for_another_suite(digits: Folders) -> None:
    for home in digits.homes.values():
        assert home.member(digits.charter()).peer_id == home.identity().peer_id
        assert not home.sm2_key_path.exists()
    assert "sm2" not in digits.charter_path.read_text()


@pytest.mark.usefixtures("_gm")
def test_an_sm2_key_that_is_gone_is_told_with_what_to_do(tmp_path: Path) -> None:
    _, (home,) = gm_draft(tmp_path, "ant")
    home.sm2_key_path.unlink()
    text = fault(lambda: home.signer("gm"))
    assert text.startswith(f"{home.sm2_key_path}: this member's SM2 key is not there; restore it from your backup, ")


@pytest.mark.usefixtures("_gm")
def test_an_sm2_key_is_under_the_identitys_passphrase_which_is_asked_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, _ = create_home(tmp_path / "ant", PeerConfig(name="ant", announce=("/ip4/192.0.2.1/tcp/1",)), b"open sesame")
    asked: list[Path] = []

    def ask(_: Path | None, path: Path) -> bytes:
        asked.append(path)
        return b"open sesame"

    monkeypatch.setattr(federation, "ask_passphrase", ask)
    charter, _ = gm_draft(tmp_path / "draft")
    member = home.member(charter)
    assert b"UNDER PASSPHRASE" in home.sm2_key_path.read_bytes()
    signer = home.signer("gm")
    assert signer.sm2_key is not None
    assert signer.sm2_key.public.hex() == member.sm2_public_key
    assert asked == [home.identity_path, home.identity_path], "once a command"
    monkeypatch.undo()
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "open barley")
    assert "the passphrase is wrong" in fault(lambda: home.signer("gm"))


def test_without_the_extra_no_sm2_key_is_made_and_the_user_is_told_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(sm2, "import_module", absent)
    home, _ = create_home(tmp_path / "ant", PeerConfig(name="ant", announce=("/ip4/192.0.2.1/tcp/1",)))
    charter, _ = gm_draft(tmp_path / "draft")
    assert fault(lambda: home.member(charter)).endswith("which is not installed: pip install 'p2pfl-mesh[gm]'")
    assert not home.sm2_key_path.exists()


def test_two_members_under_masks_are_no_federation_and_nothing_falls_back_to_the_clear(tmp_path: Path) -> None:
    charter, homes = draft_charter(tmp_path, "x", "digits", {}), []
    for name in ("ant", "bee"):
        config = PeerConfig(name=name, announce=("/ip4/192.0.2.1/tcp/1",))
        homes.append(create_home(tmp_path / name, config)[0])
        charter = join_charter(charter, homes[-1].member(charter))
    assert charter.averaging.masks == "on", "unless somebody says otherwise"
    for home in homes:
        charter = sign_charter(charter, home.config.name, home.identity())
    path = tmp_path / "charter.toml"
    save_charter(path, charter)
    assert "from the average each would learn the other's update" in fault(lambda: open_federation(path))


def test_whoever_could_choose_its_salt_by_the_others_does_not_join(digits: Folders, tmp_path: Path) -> None:
    signed = digits.charter()
    late = create_home(tmp_path / "late", PeerConfig(name="late", announce=("/ip4/192.0.2.1/tcp/1",)))[0]
    text = fault(lambda: join_charter(signed, late.member(signed)))
    assert text.startswith("late cannot join version 1: ant has revealed its salt")
    moved = digits.homes["ant"].member(signed).model_copy(update={"addresses": ("/ip4/192.0.2.9/tcp/1",)})
    joined = join_charter(signed, moved)
    assert not joined.signatures, "an address changes the terms"
    assert beacon_of(joined) != beacon_of(signed), "until ant signs again"
    assert beacon_of(sign_charter(joined, "ant", digits.homes["ant"].identity())) == beacon_of(signed)
    charter = signed.model_copy(update={"version": 2})
    assert "for version 2" in fault(lambda: sign_charter(charter, "bee", digits.homes["bee"].identity()))
    for home in (*digits.homes.values(), late):
        charter = join_charter(charter, home.member(charter))
    for home in (*digits.homes.values(), late):
        charter = sign_charter(charter, home.config.name, home.identity())
    assert charter_faults(charter) == []


def test_edges_are_read_from_a_file_and_survive_the_charter_s(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("bee ant\nbee cat\nant cat\n")
    terms = topology_terms(str(tmp_path / "lines.txt"))
    assert terms == {"topology": "edges", "edges": [("ant", "bee"), ("ant", "cat"), ("bee", "cat")]}
    nx.write_graphml(nx.Graph([("bee", "ant"), ("bee", "cat"), ("ant", "cat")]), tmp_path / "g.graphml")
    assert topology_terms(str(tmp_path / "g.graphml")) == terms
    assert topology_terms("ring") == {"topology": "ring"}
    charter = draft_charter(tmp_path / "agreed", "x", "digits", {"averaging": terms})
    save_charter(tmp_path / "agreed" / "charter.toml", charter)
    assert load_charter(tmp_path / "agreed" / "charter.toml") == charter
    for text in ("", "ant\n"):
        (tmp_path / "bad.txt").write_text(text)
        assert "two" in fault(lambda: topology_terms(str(tmp_path / "bad.txt")))
    (tmp_path / "bad.graphml").write_text("no xml")
    assert "neither GraphML" in fault(lambda: topology_terms(str(tmp_path / "bad.graphml")))
