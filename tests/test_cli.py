"""The commands as a person types them: what they say, what they end with, and one line for whatever is wrong."""

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer.main
from rich.text import Text

from p2pfl import __version__, cli
from p2pfl.core.charter import Charter
from p2pfl.core.config import PeerConfig
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.ids import Round
from p2pfl.core.ledger import Stepped, Uploading
from p2pfl.core.trace import PeerFinished
from p2pfl.node.checkpoints import Checkpoints
from p2pfl.node.federation import INITIAL_FILE, load_charter, open_home, save_charter
from p2pfl.node.launcher import create_federation, free_ports
from p2pfl.node.peer import STATE_FOLDER
from p2pfl.node.tracefile import TRACE_FILE, read_trace
from p2pfl.simulation.runs import ROUNDS_FILE, SUMMARY_FILE
from tests.node.homes import NAMES, OWN_TASK, Folders, make_folders

COMMANDS = [
    [],
    ["init"],
    ["charter"],
    *(["charter", name] for name in ("new", "next", "from", "model", "join", "sign", "show", "diff", "check")),
    ["data"],
    ["data", "check"],
    ["scenario"],
    *(["scenario", name] for name in ("list", "explain")),
    *([name] for name in ("simulate", "sweep", "compare")),
    *(
        [name]
        for name in (
            "peer",
            "demo",
            "report",
            "evaluate",
            "predict",
            "export",
            "suites",
            "verify-wire",
            "replay",
            "privacy",
        )
    ),
    ["status"],
    ["doctor"],
    ["topology"],
]


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    error: str

    def line(self) -> str:
        """Return the one line that a failed command leaves, without its beginning."""
        assert self.error.startswith("error: ")
        assert self.error.endswith("\n")
        assert len(self.error.splitlines()) == 1, self.error
        assert "Traceback" not in self.out + self.error
        return self.error.removeprefix("error: ").rstrip("\n")


class Commands:
    """Runs commands in this process."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured = captured

    def __call__(self, *arguments: str | Path) -> Ended:
        with pytest.raises(SystemExit) as raised:
            cli.main([str(argument) for argument in arguments])
        out, error = self._captured.readouterr()
        assert isinstance(raised.value.code, int)
        return Ended(raised.value.code, out, error)

    def well(self, *arguments: str | Path) -> str:
        """Run a command that succeeds; return what it says."""
        ended = self(*arguments)
        assert (ended.code, ended.error) == (0, "")
        return ended.out

    def fault(self, *arguments: str | Path, code: int = 2) -> str:
        """Run a command that fails; return its line."""
        ended = self(*arguments)
        assert ended.code == code
        return ended.line()


@pytest.fixture
def p2pfl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Commands:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    return Commands(capsys)


@pytest.fixture(scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return make_folders(tmp_path_factory.mktemp("cli") / "f", OWN_TASK)


@pytest.fixture
def own(_made: Folders, tmp_path: Path) -> Folders:
    return _made.copy_to(tmp_path / "f")


def process(*arguments: str | Path, folder: Path) -> Ended:
    """Run a command in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-m", "p2pfl.cli", *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return Ended(ended.returncode, ended.stdout, ended.stderr)


# What needs no federation


def test_the_version_is_the_packages(p2pfl: Commands) -> None:
    assert p2pfl.well("--version") == f"p2pfl {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_and_says_what_comes_next(p2pfl: Commands, command: list[str]) -> None:
    text = " ".join(p2pfl.well(*command, "--help").split())
    assert f"Usage: p2pfl {' '.join(command)}".rstrip() in text
    match command:
        case []:
            for word in (
                "p2pfl demo",
                "p2pfl init",
                "charter new | join | sign | show | check | diff | next",
                "--debug",
            ):
                assert word in text
        case ["charter"]:
            assert "what all members agree on before round 0" in text
        case ["scenario"]:
            assert "convergence lab" in text
        case _:
            assert "Next" in text


def test_the_list_of_commands_here_is_whole_and_all_are_described() -> None:
    """And the help has no word in brackets that the markup would take for a style of its own."""
    seen: list[list[str]] = []

    def walk(command: object, words: list[str]) -> None:
        seen.append(words)
        assert getattr(command, "help", None), words
        parameters = getattr(command, "params", [])
        for text in [getattr(command, "help", ""), *(parameter.help or "" for parameter in parameters)]:
            assert Text.from_markup(text).plain == text, words
        for parameter in parameters:
            assert parameter.help or parameter.name == "help", (words, parameter.name)
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, [*words, name])

    walk(typer.main.get_command(cli.app), [])
    assert sorted(seen) == sorted(COMMANDS)


@pytest.mark.parametrize("command", [[], ["charter"], ["scenario"]], ids=["p2pfl", "charter", "scenario"])
def test_without_a_command_the_help_is_all_there_is(p2pfl: Commands, command: list[str]) -> None:
    ended = p2pfl(*command)
    assert ended.code == 2
    assert ended.error == ""
    assert "--help" in ended.out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("bogus", "No such command 'bogus'; see p2pfl --help"),
        ("charter bogus", "No such command 'bogus'; see p2pfl charter --help"),
        ("--bogus", "No such option: --bogus; see p2pfl --help"),
        ("peer --bogus", "No such option: --bogus; see p2pfl peer --help"),
        ("charter new x --bogus 5", "No such option: --bogus"),
        ("peer --config", "Option '--config' requires an argument; see p2pfl peer --help"),
        ("init", "Missing argument 'name'; see p2pfl init --help"),
        ("init a b", "Got unexpected extra argument(s) (b); see p2pfl init --help"),
        ("init ../x", "p2pfl init: name: '../x' is no name: up to 63 letters, digits, '.', '_' and '-', "),
        ("init ant --listen here", "p2pfl init: 'here' is not an address; write /ip4/192.0.2.1/tcp/4001 or "),
        ("init ant --announce /ip4/1.2.3.4/udp/5", "p2pfl init: '/ip4/1.2.3.4/udp/5' is not a TCP address; write "),
        ("charter new x --rounds many", "Invalid value for '--rounds': "),
        ("charter new x --rounds -1", "draft: training.rounds: input should be greater than or equal to 0, got -1"),
        ("charter new x --topology star", "draft: averaging.topology: input should be 'groups', "),
        ("charter new x --name a/b", "draft: name: 'a/b' is no name: "),
        (
            "charter new x --task faces",
            "unknown task 'faces'; use one of breast-cancer, cifar10, credit, digits, mnist, quadratics, ",
        ),
        (
            "charter new x --task tabular",
            "--task tabular needs both --data FILE and --target COLUMN; other tasks take ",
        ),
        ("charter new x --data a.csv", "--task tabular needs both --data FILE and --target COLUMN; other tasks take "),
        ("charter new x --task tabular --data gone.csv --target y", "there is no file gone.csv; correct the path"),
        ("data check gone.toml a.csv", "gone.toml: the charter cannot be read: No such file or directory"),
        ("charter new x --task gone.py:Task", "task 'gone.py:Task': there is no file "),
        ("charter show", "charter.toml: the charter cannot be read: No such file or directory"),
        ("charter check gone.toml", "gone.toml: the charter cannot be read: No such file or directory"),
        ("charter sign", "peer.toml: this peer's settings cannot be read: No such file or directory"),
        ("peer", "peer.toml: this peer's settings cannot be read: No such file or directory"),
        ("peer --config /", "/peer.toml: this peer's settings cannot be read: No such file or directory"),
        ("demo --peers 1", "--peers 1: this machine can show 2 to 128 peers"),
        (
            "simulate topologies",
            "topologies has a [sweep] of averaging.topology: run p2pfl sweep topologies, or one value of each by "
            "--set averaging.topology=VALUE",
        ),
        ("simulate topologies --set averaging.topology=graph", "averaging.options: the topology graph needs file"),
        (
            "sweep asynchronous --engine dense",
            "asynchronous with training.algorithm = ad-psgd, cost.slowness = 1.0: ad-psgd",
        ),
    ],
)
def test_a_wrong_command_is_told_in_one_line(p2pfl: Commands, arguments: str, line: str) -> None:
    assert p2pfl.fault(*arguments.split()).startswith(line)


@pytest.mark.parametrize("command", ["report", "evaluate", "export", "predict"])
def test_a_run_that_is_none_is_told_in_one_line(p2pfl: Commands, command: str, tmp_path: Path) -> None:
    more = {"export": ["out"], "predict": ["in.csv"]}.get(command, [])
    for run in (tmp_path / "gone", tmp_path):
        assert str(run) in p2pfl.fault(command, run, *more)
    assert list(tmp_path.iterdir()) == []


def test_simulated_runs_are_told_with_the_command_that_reads_them(p2pfl: Commands, tmp_path: Path) -> None:
    run = tmp_path / "topologies" / "topologies-0"
    run.mkdir(parents=True)
    for name in (SUMMARY_FILE, ROUNDS_FILE):
        (run / name).touch()
    assert "a simulated run, which keeps no models; p2pfl report draws it" in p2pfl.fault("evaluate", run)
    for command in ("report", "evaluate"):
        line = p2pfl.fault(command, run.parent)
        assert f"a folder of simulated runs; p2pfl compare {run.parent} shows them" in line


# The way to a charter in force


def write_credits(path: Path, **columns: list[object]) -> Path:
    """Write a table of 40 rows."""
    rows = {"age": [30, 45, 61, 22] * 10, "job": ["craft", "office"] * 20, "default": ["no", "no", "no", "yes"] * 10}
    pd.DataFrame(rows | columns).to_csv(path, index=False)
    return path


def test_a_table_is_drafted_reviewed_checked_and_its_model_drawn_again(p2pfl: Commands, tmp_path: Path) -> None:
    own = write_credits(tmp_path / "own.csv", client=list(range(7000, 7040)))
    said = p2pfl.well("charter", "new", "f", "--task", "tabular", "--data", own, "--target", "default")
    assert "- default: the target, 2 classes; AUC and KS rank class 1, 'yes'" in said
    assert "rounded outwards" in said
    charter = tmp_path / "f" / "charter.toml"
    told = p2pfl.well("charter", "show", charter)
    assert "target    default: 0 'no', 1 'yes'" in told
    assert "column    age: 20.0 to 70.0" in told
    assert "column    job: 'craft', 'office'" in told
    assert "scaling   from round 0, in which all members' moments are averaged; hidden layers of 32" in told
    assert f"{own}: fits: 40 rows\nnext: " in p2pfl.well("data", "check", charter, own)

    other = write_credits(tmp_path / "other.csv", age=[300, *[30] * 39], job=["sailor"] * 40)
    ended = p2pfl("data", "check", charter, other)
    assert ended.code == 2
    assert len([line for line in ended.out.splitlines() if line.startswith(f"- {other}: column ")]) == 2
    assert ended.line() == f"{other}: does not fit: 2 things missing or wrong"

    charter.write_text(charter.read_text().replace('"craft", "office"', '"craft", "office", "sailor"'))
    ended = p2pfl("charter", "check", charter)
    assert f"If its columns were edited, p2pfl charter model {charter} draws it again" in ended.out
    said = p2pfl.well("charter", "model", charter)
    assert "parameters" in said
    assert "initial.safetensors" not in p2pfl("charter", "check", charter).out


def test_a_draft_without_a_table_has_nothing_to_check_a_file_against(p2pfl: Commands, tmp_path: Path) -> None:
    p2pfl.well("charter", "new", "f")
    line = p2pfl.fault("data", "check", "f/charter.toml", write_credits(tmp_path / "a.csv"))
    assert line.startswith("f/charter.toml: has no task.table to check a file against")


def test_lines_added_to_a_new_peer_toml_are_about_the_data(p2pfl: Commands, tmp_path: Path) -> None:
    # As README and the handbook have members do it.
    p2pfl.well("init", "ant")
    with (tmp_path / "ant" / "peer.toml").open("a") as file:
        file.write("peers = 3\nindex = 0\n")
    assert open_home(tmp_path / "ant").data == {"peers": 3, "index": 0}


def test_the_way_from_init_to_a_charter_in_force(p2pfl: Commands, tmp_path: Path) -> None:
    for port, name in enumerate(NAMES, 4001):
        said = p2pfl.well("init", name, "--announce", f"/dns4/{name}.net/tcp/{port}", "--folder", "homes")
        home = open_home(tmp_path / "homes" / name)
        assert said.startswith(f"{name} is {home.identity().peer_id}\n")
        assert "next: p2pfl charter join" in said
    assert p2pfl.fault("init", "ant", "--folder", "homes").endswith("exists already; choose another name")

    said = p2pfl.well("charter", "new", "agreed", "--name", "meadow", "--rounds", "3", "--topology", "ring")
    assert "agreed/charter.toml: a draft of meadow: digits, 4810 parameters, no members yet\n" in said
    assert "next: every member runs p2pfl charter join agreed/charter.toml" in said
    assert p2pfl.fault("charter", "new", "agreed").endswith("exists already; name another folder")
    draft = "agreed/charter.toml"
    assert p2pfl.fault("charter", "check", draft).endswith("not in force: 1 thing missing or wrong")

    for name in NAMES:
        said = p2pfl.well("charter", "join", draft, "--config", f"homes/{name}")
        assert f"{draft}: {name} has joined; members: {', '.join(NAMES[: NAMES.index(name) + 1])}\n" in said
        assert "next: when all have joined" in said
    for name in NAMES[:2]:
        said = p2pfl.well("charter", "sign", draft, "--config", f"homes/{name}/peer.toml")
        assert f"{name} has signed" in said
        assert "missing: " in said
        assert "cat.example has not signed" in said

    ended = p2pfl("charter", "check", draft)
    assert ended.code == 2
    assert ended.out == "- cat.example has not signed\n"
    assert ended.line() == f"{draft}: not in force: 1 thing missing or wrong"
    fault = p2pfl.fault("peer", "--config", "homes/ant")
    assert fault.endswith("not in force: cat.example has not signed; `p2pfl charter check` lists what is missing")

    said = p2pfl.well("charter", "sign", draft, "--config", "homes/cat.example")
    assert "all 3 members have signed: the charter is in force" in said
    assert "next: everyone takes" in said
    charter = load_charter(tmp_path / draft)
    in_force = (
        f"{draft}: in force: meadow, 3 members, {charter.hash().hex()[:16]}\nnext: every member runs p2pfl doctor"
    )
    said = p2pfl.well("charter", "check", draft)
    assert in_force in said
    assert said.startswith("in a star of 3: one absence costs the round; 1 may work together and learn nothing\n")

    shown = p2pfl.well("charter", "show", draft)
    for words in (
        charter.hash().hex(),
        "3 rounds of d-psgd",
        "masks     on: only sums are revealed",
        "ring: 2 neighbors each",
        "state     in force",
    ):
        assert words in shown
    for member in charter.members:
        assert f"{member.name}  {member.peer_id}  {member.addresses[0]}  signed" in shown

    assert "sign again" not in p2pfl.well("charter", "join", draft, "--config", "homes/bee"), "nothing has changed"
    settings = Path("homes/bee/peer.toml")
    settings.write_text(settings.read_text().replace("/tcp/", "/tcp/1"))
    said = p2pfl.well("charter", "join", draft, "--config", "homes/bee")
    assert "the signatures of ant, bee, cat.example were for the draft as it was; they must sign again" in said
    assert "state     not in force: ant has not signed; " in p2pfl.well("charter", "show", draft)


def test_under_gm_members_sign_with_sm2_too(p2pfl: Commands, tmp_path: Path) -> None:
    for name in ("fastecdsa", "gmssl_pyx"):
        pytest.importorskip(name, reason="the extra [gm] is not installed", exc_type=ImportError)
    draft = "agreed/charter.toml"
    p2pfl.well("charter", "new", "agreed", "--suite", "gm", "--no-masks")
    for port, name in enumerate(("ant", "bee"), 4001):
        p2pfl.well("init", name, "--announce", f"/ip4/127.0.0.1/tcp/{port}")
        said = p2pfl.well("charter", "join", draft, "--config", name)
        assert f"{name}/identity-sm2.pem: made this member's SM2 key, for its signatures; back it up" in said
        assert "made" not in p2pfl.well("charter", "join", draft, "--config", name), "it is there now"
    kept = Path("bee/identity-sm2.pem").read_bytes()
    p2pfl.well("charter", "sign", draft, "--config", "ant")
    Path("bee/identity-sm2.pem").unlink()
    assert (
        "this member's SM2 key is not there; restore it from your backup, or run `p2pfl charter join`"
        in p2pfl.fault("charter", "sign", draft, "--config", "bee")
    )
    Path("bee/identity-sm2.pem").write_bytes(Path("ant/identity-sm2.pem").read_bytes())
    Path("bee/identity-sm2.pem").chmod(0o600)
    assert "bee stands in the charter with another SM2 key than this one" in p2pfl.fault(
        "charter", "sign", draft, "--config", "bee"
    )
    Path("bee/identity-sm2.pem").write_bytes(kept)
    assert "the charter is in force" in p2pfl.well("charter", "sign", draft, "--config", "bee")
    assert f"{draft}: in force: federation, 2 members" in p2pfl.well("charter", "check", draft)
    charter = load_charter(tmp_path / draft)
    for member in charter.members:
        assert f"SM2 {member.sm2_public_key}" in p2pfl.well("charter", "show", draft)

    # A signature without its SM2 half is none, for those who check and for those who run.
    half = base64.b64encode(base64.b64decode(charter.signatures["bee"])[:64]).decode()
    path = tmp_path / draft
    path.write_text(path.read_text().replace(charter.signatures["bee"], half))
    line = (
        "bee's signature is not for this charter: it was changed after signing; sign again (a signature of 64 bytes; "
    )
    ended = p2pfl("charter", "check", draft)
    assert (ended.code, line in ended.out) == (2, True)
    assert f"not in force: {line}" in p2pfl.fault("peer", "--config", "ant")

    # A suite without SM2 has no use for the keys; who joins again leaves them out.
    path.write_text(path.read_text().replace('suite = "gm"', 'suite = "sm4"'))
    assert "ant: has an SM2 key, which the suite sm4 does not use" in p2pfl("charter", "check", draft).out
    for name in ("ant", "bee"):
        p2pfl.well("charter", "join", draft, "--config", name)
    assert "sm2_public_key" not in path.read_text()
    assert p2pfl("charter", "check", draft).out == "- ant has not signed\n- bee has not signed\n"


def test_a_key_under_a_passphrase_serves_the_commands(p2pfl: Commands, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("open sesame\n")
    secret.chmod(0o600)
    p2pfl.well("init", "ant", "--announce", "/ip4/127.0.0.1/tcp/4001", "--passphrase-file", secret)
    assert b"UNDER PASSPHRASE" in Path("ant/identity.pem").read_bytes()
    p2pfl.well("charter", "new", "agreed", "--task", "digits", "--no-masks")
    assert "ant has joined" in p2pfl.well("charter", "join", "agreed/charter.toml", "--config", "ant")
    secret.write_text("open barley\n")
    line = p2pfl.fault("charter", "sign", "agreed/charter.toml", "--config", "ant")
    assert line == "ant/identity.pem: the passphrase is wrong, or the file is damaged"


def test_joining_without_an_address_says_where_to_write_one(p2pfl: Commands) -> None:
    said = p2pfl.well("init", "ant")
    assert 'ant/peer.toml: announce = ["/dns4/YOUR-HOST/tcp/4001"]' in said
    p2pfl.well("charter", "new", "agreed", "--no-masks")
    assert "announce: empty; write where the others reach this peer" in p2pfl.fault(
        "charter", "join", "agreed/charter.toml", "--config", "ant"
    )


def documented_keys() -> dict[str, list[str]]:
    """Return the keys that the operator's page gives for each command's JSON."""
    page = (Path(__file__).parent.parent / "docs" / "operator.md").read_text()
    rows = [line.split("|")[1:3] for line in page.split("| command | keys |")[1].splitlines() if line.startswith("| `")]
    return {command.strip().strip("`"): keys.replace("`", "").strip().split(", ") for command, keys in rows}


def test_each_command_of_the_way_answers_programs_too(p2pfl: Commands, tmp_path: Path) -> None:
    documented = documented_keys()

    def told(*arguments: str, code: int = 0) -> dict[str, Any]:
        ended = p2pfl(*arguments, "--json")
        assert ended.code == code
        found = json.loads(ended.out)
        command = " ".join(arguments[: 2 if arguments[0] == "charter" else 1])
        assert list(found) == documented[command], "docs/operator.md says so"
        assert found["next"].isprintable()
        assert found["next"]
        return dict(found)

    for port, name in enumerate(("ant", "bee"), 4001):
        made = told("init", name, "--announce", f"/ip4/127.0.0.1/tcp/{port}")
        assert made["peer_id"] == open_home(tmp_path / name).identity().peer_id
        assert (made["member"], made["folder"], made["announce"]) == (name, name, [f"/ip4/127.0.0.1/tcp/{port}"])
    draft = "agreed/charter.toml"
    p2pfl.well("charter", "new", "agreed", "--no-masks")
    joined = told("charter", "join", draft, "--config", "ant")
    assert (joined["members"], joined["void_signatures"], joined["remembered"]) == (["ant"], [], True)
    Path("early").mkdir()
    Path("early/charter.toml").write_bytes(Path(draft).read_bytes())
    told("charter", "join", draft, "--config", "bee")
    signed = told("charter", "sign", draft, "--config", "ant")
    assert (signed["in_force"], signed["faults"]) == (False, ["bee has not signed"])
    assert p2pfl("charter", "check", draft, "--json").line().endswith("not in force: 1 thing missing or wrong")
    assert told("charter", "check", draft, code=2)["faults"] == ["bee has not signed"]
    assert told("status", "bee")["next"].startswith("p2pfl charter sign agreed/charter.toml --config bee")
    shown = told("charter", "show", draft)
    assert (shown["signed"], shown["unsigned"], shown["terms"]["training"]["rounds"]) == (["ant"], ["bee"], 60)
    Path("half").mkdir()
    Path("half/charter.toml").write_bytes(Path(draft).read_bytes())
    half = told("charter", "diff", draft, "half/charter.toml")
    assert half["next"].startswith("who has not signed half/charter.toml signs it too")
    assert told("charter", "sign", draft, "--config", "bee")["in_force"] is True
    assert told("charter", "diff", "half/charter.toml", draft)["next"] == f"p2pfl charter check {draft}"
    checked = told("charter", "check", draft)
    digest = load_charter(tmp_path / draft).hash().hex()
    assert (checked["in_force"], checked["hash"], checked["federation"]) == (True, digest, "federation")

    differing = told("charter", "diff", "early/charter.toml", draft, code=1)
    assert differing["same"] is False
    assert {each["key"].rpartition(".")[0] for each in differing["terms"]} == {"members.bee"}
    assert told("charter", "diff", draft, draft)["same"] is True
    said = p2pfl("charter", "diff", "early/charter.toml", draft)
    assert (said.code, "members.bee.peer_id: not there -> " in said.out) == (1, True)
    assert said.out.splitlines()[-1] == "next: agree on one of them; every member joins and signs that one"

    where = told("status", "ant")
    assert (where["running"], where["charter"]["in_force"], where["members"]) == (False, True, {"bee": "unknown"})
    assert where["next"] == "p2pfl doctor ant, then p2pfl peer --config ant"
    assert "next: p2pfl doctor ant, then p2pfl peer --config ant\n" in p2pfl.well("status", "ant")
    assert "p2pfl init NAME" in told("doctor", "agreed", code=1)["next"]
    assert p2pfl.fault("status", "agreed").startswith("agreed/peer.toml: this peer's settings cannot be read")


# Noise


def test_what_noise_costs_and_what_is_spent_of_it_is_told(p2pfl: Commands, own: Folders) -> None:
    assert p2pfl.well("privacy", own.charter_path).startswith("no [privacy]: sums are exact")
    values = own.charter().model_dump(exclude_none=True) | {"signatures": {}}
    values["averaging"] |= {"topology": "groups", "masks": "on"}
    values["training"] |= {"rounds": 40, "clip_norm": 1.0}
    values["privacy"] = {"noise": 2.0, "epsilon": 5.0}
    charter = Charter.model_validate(values)
    save_charter(own.charter_path, charter)
    home = own.homes["ant"]
    drafted = p2pfl.well("privacy", own.charter_path)
    assert "noise     2 times the clip of 1, by the 2 honest of at least 3 survivors" in drafted
    assert f"bears {charter.rounds} rounds of 40" in drafted
    assert "spent" not in drafted
    own.sign()
    assert f"bears {charter.rounds} rounds of 40" in p2pfl.well("charter", "check", own.charter_path)
    assert "spent     epsilon 0 of 5 (rho 0), in 0 rounds" in p2pfl.well("privacy", "--config", home.path)
    budget, state = charter.budget, home.run_path / STATE_FOLDER
    assert budget is not None
    store = Checkpoints.open(state, charter.hash(), home.identity().peer_id, np.zeros(8, np.float32)).checkpoints
    store.persist(Uploading(Round(0), bytes(32), budget.rho))
    told = p2pfl.well("privacy", "--config", home.path)  # while the peer runs
    store.close()
    assert f"spent     epsilon {budget.spent(budget.rho):.4g} of 5 (rho 0.125), in 1 round\n" in told
    assert f"left      {charter.rounds - 1} rounds" in told


def test_noise_of_both_kinds_is_told_to_programs_too(p2pfl: Commands, own: Folders) -> None:
    values = own.charter().model_dump(exclude_none=True) | {"signatures": {}}
    values["averaging"] |= {"topology": "groups", "masks": "on"}
    values["training"] |= {"rounds": 10, "local_steps": 2, "batch_size": 4, "clip_norm": 1.0}
    examples = {"noise": 3.0, "clip": 1.0, "epsilon": 6.0, "samples_min": 40}
    values["privacy"] = {"noise": 5.0, "epsilon": 5.0, "examples": examples}
    charter = Charter.model_validate(values)
    save_charter(own.charter_path, charter)
    own.sign()
    home, sums, budget = own.homes["ant"], charter.budget, charter.example_budget
    assert sums is not None
    assert budget is not None

    def told(*arguments: object) -> dict[str, Any]:
        ended = p2pfl(*arguments, "--json")
        assert ended.code == 0, ended.err
        return dict(json.loads(ended.out))

    drafted = told("privacy", own.charter_path)
    assert list(drafted) == documented_keys()["privacy"], "docs/operator.md says so"
    assert (drafted["spent"], drafted["examples"]["rate"], drafted["rounds"]) == (None, 0.1, charter.rounds)
    state, peer = home.run_path / STATE_FOLDER, home.identity().peer_id
    store = Checkpoints.open(state, charter.hash(), peer, np.zeros(8, np.float32)).checkpoints
    store.persist(Stepped(Round(0), 2))
    store.persist(Uploading(Round(0), bytes(32), sums.rho))
    store.close()
    spent = told("privacy", "--config", home.path)["spent"]
    assert spent["example"] == {
        "budget": 6.0, "delta": 1e-5, "epsilon": budget.spent(2), "steps": 2, "rounds_left": charter.rounds - 1,
    }  # fmt: skip
    assert (spent["member"]["epsilon"], spent["rho"]) == (sums.spent(sums.rho), sums.rho)
    assert told("status", home.path)["privacy"] == spent
    said = p2pfl.well("privacy", "--config", home.path)
    assert f"spent     epsilon {budget.spent(2):.4g} of 6, of one example, in 2 local steps" in said
    assert f"privacy   epsilon {budget.spent(2):.4g} of 6 spent, of one example" in p2pfl.well("status", home.path)


def test_a_model_that_noise_cannot_train_is_refused_by_check_and_peer(
    p2pfl: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "normed.py").write_text(NORMED)
    terms = {"privacy": {"examples": {"noise": 3.0, "clip": 1.0, "epsilon": 60.0, "samples_min": 8}}}
    pytest.importorskip("opacus", reason="noise for examples needs it: pip install 'p2pfl-mesh[opacus]'")
    made = create_federation(tmp_path, "normed.py:Normed", terms, [{}, {}, {}, {}], seed=0)
    told = "privacy.examples cannot train 0: BatchNorm cannot support training with differential privacy"
    assert told in p2pfl("charter", "check", made.path / "charter.toml").out
    assert told in p2pfl.fault("peer", "--config", made.homes[0].path)
    assert told in p2pfl("doctor", made.homes[0].path).out
    monkeypatch.setitem(sys.modules, "opacus.validators", None)
    told = "privacy.examples needs Opacus, which is not installed; pip install 'p2pfl-mesh[opacus]'"
    assert told in p2pfl("charter", "check", made.path / "charter.toml").out
    assert told in p2pfl.fault("peer", "--config", made.homes[0].path)


NORMED = """
import torch
from p2pfl.learning.task import Data, Examples, Task

class Normed(Task):
    def model(self):
        return torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2))

    def data(self, settings):
        examples = Examples(torch.randn(8, 3), torch.zeros(8, dtype=torch.int64))
        return Data(examples, examples)
"""


def test_a_charter_whose_groups_are_too_small_for_its_noise_is_not_in_force(p2pfl: Commands, own: Folders) -> None:
    values = own.charter().model_dump(exclude_none=True) | {"signatures": {}}
    values["averaging"] |= {"topology": "groups", "masks": "on"}
    values["training"] |= {"clip_norm": 1.0}
    values["privacy"] = {"noise": 2.0, "epsilon": 5.0, "survivors": 4}
    save_charter(own.charter_path, Charter.model_validate(values))
    own.sign()
    told = "privacy.survivors is 4, and there are groups or stars of 3, which never are so many"
    assert told in p2pfl("charter", "check", own.charter_path).out
    assert told in p2pfl.fault("peer", "--config", own.homes["ant"].path)


# What stops a peer


def peer_fault(p2pfl: Commands, own: Folders) -> str:
    """Return what keeps the peer from running, which keeps the charter from being checked and signed again too."""
    line = p2pfl.fault("peer", "--config", own.homes["ant"].path).replace("/ant/..", "")
    ended = p2pfl("charter", "check", own.charter_path)
    assert ended.code == 2
    assert f"- {line}\n" in ended.out
    assert p2pfl.fault("charter", "sign", own.charter_path, "-c", own.homes["ant"].path) == f"not signed: {line}"
    return line


def test_a_task_that_was_edited_is_told(p2pfl: Commands, own: Folders) -> None:
    own.task_path.write_text("print('executed')")
    assert peer_fault(p2pfl, own).startswith("größe.py has SHA-256 ")


def test_a_missing_task_and_a_missing_model_are_told(p2pfl: Commands, own: Folders) -> None:
    content = own.task_path.read_bytes()
    own.task_path.unlink()
    assert "there is no file" in peer_fault(p2pfl, own)
    own.task_path.write_bytes(content)
    (own.path / INITIAL_FILE).unlink()
    assert "the initial model cannot be read" in peer_fault(p2pfl, own)


def test_a_task_that_raises_is_told(p2pfl: Commands, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import p2pfl\n\nraise ValueError('first\\nsecond')\n")
    line = p2pfl.fault("charter", "new", ".", "--task", "mine.py:Mine")
    assert line == "mine.py:3: ValueError: first second; correct the file"
    assert not (tmp_path / "charter.toml").exists()


def test_an_unknown_setting_is_told_with_those_that_are_known(p2pfl: Commands, own: Folders) -> None:
    path = own.homes["ant"].path / "peer.toml"
    good = path.read_text()
    path.write_text(good.replace("seed = 0", "sede = 0"))
    for command in (["peer"], ["charter", "join", own.charter_path], ["charter", "sign", own.charter_path]):
        line = p2pfl.fault(*command, "--config", path)
        assert line.startswith(
            f"{path}: sede: unknown setting; the known ones here are name, charter, identity, passphrase_file, run, "
        )
    path.write_text(good.replace("seed = 0", 'seed = "0"'))
    assert p2pfl.fault("peer", "--config", path) == f"{path}: seed: input should be a valid integer, got '0'"
    path.write_text(good)

    charter = own.charter_path.read_text()
    own.charter_path.write_text(charter.replace("local_steps", "local_stpes"))
    for command in (
        ["peer", "-c", path],
        ["charter", "show", own.charter_path],
        ["charter", "check", own.charter_path],
    ):
        line = p2pfl.fault(*command)
        assert (
            "charter.toml: training.local_stpes: unknown setting; the known ones here are algorithm, options, " in line
        )
    own.charter_path.write_text(charter.replace("rounds = 2", "rounds = 2.5"))
    assert "training.rounds: input should be a valid integer, got 2.5" in p2pfl.fault("peer", "-c", path)
    own.charter_path.write_text("name = ")
    assert "not TOML: " in p2pfl.fault("peer", "-c", path)


def test_a_key_that_others_may_read_is_told(p2pfl: Commands, own: Folders) -> None:
    path = own.homes["ant"].path / "identity.pem"
    path.chmod(0o644)
    line = p2pfl.fault("peer", "-c", own.homes["ant"].path)
    assert line == f"{path}: others may read this private key; run `chmod 600 {path}`"


def test_another_members_key_is_told(p2pfl: Commands, own: Folders) -> None:
    ant, bee = (own.homes[name].path / "identity.pem" for name in ("ant", "bee"))
    ant.write_bytes(bee.read_bytes())
    assert "ant has peer id 12D3" in p2pfl.fault("peer", "-c", ant.parent)


# The last line of defence


def test_a_fault_of_our_own_is_one_line_and_with_debug_a_traceback(
    p2pfl: Commands, own: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr("p2pfl.node.federation.load_charter", broken)
    line = p2pfl.fault("charter", "show", own.charter_path, code=1)
    assert line == "a fault in p2pfl: RuntimeError: first second; run again with --debug and report it"
    with pytest.raises(RuntimeError):
        cli.main(["charter", "show", str(own.charter_path), "--debug"])
    with pytest.raises(InvalidConfig):
        cli.main(["peer", "--debug", "--config", str(own.path)])


@pytest.mark.parametrize(("raised", "code"), [(KeyboardInterrupt(), 130), (PermissionError(13, "no", "/x"), 1)])
def test_an_interrupt_and_the_systems_errors_have_their_codes(
    p2pfl: Commands, monkeypatch: pytest.MonkeyPatch, raised: BaseException, code: int
) -> None:
    def broken(*_: object) -> None:
        raise raised

    monkeypatch.setattr("p2pfl.node.federation.load_charter", broken)
    ended = p2pfl("charter", "show")
    assert ended.code == code
    assert ended.error == ("stopped\n" if code == 130 else "error: /x: no\n")


# In processes of their own


@pytest.mark.slow
def test_help_loads_neither_torch_nor_libp2p(tmp_path: Path) -> None:
    program = """
import sys, p2pfl.cli
try:
    p2pfl.cli.main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "libp2p", "trio", "numpy", "pandas", "sklearn", "matplotlib", "pydantic"} & set(sys.modules)
sys.exit(f"loaded {heavy}" if heavy else 0)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_a_process_ends_with_the_same_codes_and_lines(tmp_path: Path, own: Folders) -> None:
    assert process("--version", folder=tmp_path) == Ended(0, f"p2pfl {__version__}\n", "")
    assert process("bogus", folder=tmp_path) == Ended(2, "", "error: No such command 'bogus'; see p2pfl --help\n")
    own.task_path.write_text("")
    ended = process("charter", "check", own.charter_path, folder=tmp_path)
    assert ended.code == 2
    assert "SHA-256" in ended.out
    assert ended.line().endswith("not in force: 1 thing missing or wrong")


@pytest.mark.slow
def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    folders = make_folders(tmp_path / "f", OWN_TASK, port)
    with socket.create_server(("127.0.0.1", port)):
        ended = process("peer", "--config", folders.homes["ant"].path, folder=tmp_path)
    assert ended.code == 1
    assert f"/ip4/127.0.0.1/tcp/{port}" in ended.line()


@pytest.mark.slow
def test_a_peer_whose_neighbors_do_not_come_fails_with_their_names(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    folders = make_folders(tmp_path / "f", OWN_TASK, port)
    text = folders.charter_path.read_text()
    folders.charter_path.write_text(text.replace("start = 300.0", "start = 0.5"))
    folders.sign()
    ended = process("peer", "--config", folders.homes["ant"].path, folder=tmp_path)
    assert ended.code == 1
    assert "bee, cat.example" in ended.line()
    finished = read_trace(folders.homes["ant"].run_path / TRACE_FILE)[-1].event
    assert finished == PeerFinished("failed", 0, agreed=False, reason=ended.line())


@pytest.mark.slow
def test_ctrl_c_while_a_peer_waits_ends_it_in_one_line_at_most(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    folders = make_folders(tmp_path / "f", OWN_TASK, port)
    waiting = subprocess.Popen(
        [sys.executable, "-u", "-m", "p2pfl.cli", "peer", "--config", str(folders.homes["ant"].path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    trace = folders.homes["ant"].run_path / TRACE_FILE
    assert waiting.stdout is not None
    while '"linking"' not in (trace.read_text() if trace.exists() else ""):
        assert waiting.stdout.readline(), "it ended before it waited"
    waiting.send_signal(signal.SIGINT)
    out, error = waiting.communicate(timeout=30)
    assert "Traceback" not in out + error
    assert len(error.splitlines()) <= 1


def test_the_defaults_that_help_shows_are_the_settings_own() -> None:
    assert PeerConfig(name="x").listen == ("/ip4/0.0.0.0/tcp/4001",)


# Topologies


def test_without_a_name_the_topologies_are_listed(p2pfl: Commands) -> None:
    listed = p2pfl.well("topology").splitlines()
    assert [line.split()[0] for line in listed][:3] == ["groups", "exponential", "ring"]


def test_a_topology_is_told_drawn_and_given_as_json(p2pfl: Commands, tmp_path: Path) -> None:
    picture = tmp_path / "ring.png"
    assert "spectral gap" in p2pfl.well("topology", "ring", "--peers", "6", "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert json.loads(p2pfl.well("topology", "ring", "--peers", "6", "--json"))["diameter"] == 3
    assert "is neither a file nor one of groups" in p2pfl("topology", "moebius").line()
    assert "until exact   3 rounds" in p2pfl.well("topology", "base", "--peers", "8", "--plot", picture)
    assert json.loads(p2pfl.well("topology", "base", "--peers", "8", "--json"))["period"] == 3
    assert "weights       optimal" in p2pfl.well("topology", "ring", "--peers", "6", "--weights", "optimal")
    assert "--weights: base makes its own" in p2pfl("topology", "base", "--weights", "optimal").line()
