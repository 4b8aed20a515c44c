"""The commands: each reads its arguments, calls one function of the layers below, and says what comes next."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from p2pfl import __version__
from p2pfl.core.errors import InvalidConfig, P2pflError

HELP = """Peer-to-peer, decentralised federated learning: one model from data that never leaves its premises, no server.

See it run:           p2pfl demo

Set up a member:      p2pfl init bank-a

Agree on a charter:   p2pfl charter new | join | sign | show | check

Check your table:     p2pfl data check

Weigh topologies:     p2pfl topology

Take part:            p2pfl peer --config bank-a/peer.toml

What noise hides:     p2pfl privacy

Use the model:        p2pfl report | evaluate | predict | export

Rehearse and compare: p2pfl scenario list | explain, p2pfl simulate | sweep | compare

Every command explains itself with --help; --debug after any command shows the traceback of an error.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
charter_app = typer.Typer(
    help="Draw up, join, sign, show and check a charter: what all members agree on before round 0.",
    no_args_is_help=True,
)
app.add_typer(charter_app, name="charter")
scenario_app = typer.Typer(help="List and explain scenarios of the convergence lab.", no_args_is_help=True)
app.add_typer(scenario_app, name="scenario")
data_app = typer.Typer(
    help="Check a member's table before it takes part.",
    no_args_is_help=True,
    epilog="Next: p2pfl data check CHARTER FILE.",
)
app.add_typer(data_app, name="data")

CharterFile = Annotated[Path, typer.Argument(help="The charter's file.")]
ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", help="This member's peer.toml, or the folder it is in.", show_default=True)
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one member's.")]
ScenarioName = Annotated[str, typer.Argument(metavar="SCENARIO", help="A file, or a name: p2pfl scenario list.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. training.rounds=100. Repeatable."),
]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Where the runs' folders go.")]
Device = Annotated[str, typer.Option(help="Where torch computes: cpu, or cuda.")]


def _say(text: str) -> None:
    Console(highlight=False, soft_wrap=True).print(text, markup=False)


def _show_version(wanted: bool) -> None:
    if wanted:
        _say(f"p2pfl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


@app.command(epilog="Next: p2pfl charter join, with the draft you were sent, or p2pfl charter new.")
def init(
    name: Annotated[str, typer.Argument(help="The member's name in the charter, and of the folder that is made.")],
    listen: Annotated[
        list[str] | None, typer.Option(help="Where this peer listens, e.g. /ip4/0.0.0.0/tcp/4001. Repeatable.")
    ] = None,
    announce: Annotated[
        list[str] | None,
        typer.Option(help="Where the others reach it, e.g. /dns4/peer.bank-a.example/tcp/4001. Repeatable."),
    ] = None,
    folder: Annotated[Path, typer.Option(help="Where to make the member's folder.")] = Path(),
    passphrase: Annotated[
        bool, typer.Option("--passphrase", help="Put the key under a passphrase, and ask for it.")
    ] = False,
    passphrase_file: Annotated[
        Path | None, typer.Option(help="Put the key under the passphrase in this file (mode 0600).")
    ] = None,
) -> None:
    """Make a member's folder: its identity key (mode 0600, if wanted under a passphrase) and its peer.toml."""
    from p2pfl.core.config import PeerConfig
    from p2pfl.core.settings import validate
    from p2pfl.node.federation import CONFIG_FILE, check_address, create_home
    from p2pfl.node.store import ask_passphrase

    values: dict[str, Any] = {"name": name}
    if listen:
        values["listen"] = listen
    if announce:
        values["announce"] = announce
    if passphrase_file is not None:
        values["passphrase_file"] = str(passphrase_file.resolve())
    config = validate(PeerConfig, values, "p2pfl init")
    for address in (*config.listen, *config.announce):
        check_address(address, "p2pfl init")
    secret: bytes | None = None
    if passphrase_file is not None:
        secret = ask_passphrase(passphrase_file, folder / name)
    elif passphrase:
        secret = str(typer.prompt("passphrase", hide_input=True, confirmation_prompt=True)).encode()
    home, identity = create_home(folder / name, config, secret)
    _say(f"{name} is {identity.peer_id}")
    _say(
        f"its key and settings are in {home.path}{'' if announce else '; write into'}",
    )
    if not announce:
        _say(f'  {home.path / CONFIG_FILE}: announce = ["/dns4/YOUR-HOST/tcp/4001"], where the others reach this peer')
    _say(f"next: p2pfl charter join CHARTER --config {home.path}, with the draft you were sent;")
    _say("      or draw one up: p2pfl charter new FOLDER --task digits")


@charter_app.command("new", epilog="Next: every member runs p2pfl charter join.")
def charter_new(
    folder: Annotated[Path, typer.Argument(help="Where charter.toml and initial.safetensors are put.")],
    name: Annotated[str, typer.Option(help="The federation's name.")] = "federation",
    task: Annotated[str, typer.Option(help="A built-in task, or file.py:ClassName in that folder.")] = "digits",
    topology: Annotated[
        str,
        typer.Option(
            help="groups, drawn anew each round; exponential, ring, complete, random-regular, torus, hypercube, path; "
            "or a file of members' names: GraphML, or two names a line."
        ),
    ] = "groups",
    regroup: Annotated[str, typer.Option(help="each-round; or never: members travel in fixed cohorts.")] = "each-round",
    masks: Annotated[
        bool, typer.Option("--masks/--no-masks", help="Hide single updates: only sums are revealed.")
    ] = True,
    rounds: Annotated[int, typer.Option(help="Rounds of local training and averaging.")] = 60,
    suite: Annotated[str, typer.Option(help="The cipher suite: aes, sm4 or gm.")] = "aes",
    seed: Annotated[int, typer.Option(help="Draws the initial model.")] = 0,
    data: Annotated[
        Path | None, typer.Option(help="For --task tabular: a CSV or Parquet file that the columns are drafted from.")
    ] = None,
    target: Annotated[str | None, typer.Option(help="For --task tabular: the column to be learned.")] = None,
) -> None:
    """Draw up a charter without members: the task, the initial model and the terms."""
    from p2pfl.learning.table_draft import draft_table
    from p2pfl.node.federation import CHARTER_FILE, draft_charter, save_charter, topology_terms

    path = folder / CHARTER_FILE
    if path.exists():
        raise InvalidConfig(f"{path}: exists already; name another folder")
    if (data is None) != (target is None) or (task == "tabular" and data is None):
        raise InvalidConfig("--task tabular needs both --data FILE and --target COLUMN; other tasks take neither")
    drafted = None if data is None or target is None else draft_table(data, target)
    averaging = {**topology_terms(topology), "regroup": regroup, **({} if masks else {"masks": "off"})}
    terms = {"training": {"rounds": rounds}, "averaging": averaging, "security": {"suite": suite}}
    charter = draft_charter(folder, name, task, terms, seed, drafted.terms if drafted is not None else None)
    save_charter(path, charter)
    _say(f"{path}: a draft of {charter.name}: {task}, {charter.model.parameters} parameters, no members yet")
    if drafted is not None:
        for line in drafted.review:
            _say(f"- {line}")
        _say("ranges are rounded outwards and rare values left out, but what is there comes from your file: review it,")
        _say("widen it to what any member may have, and run p2pfl charter model after changing columns")
    _say("edit its terms now: nobody can change them once members have signed")
    _say(f"next: every member runs p2pfl charter join {path} --config THEIR-FOLDER, and passes the folder on")


@charter_app.command("from", epilog="Next: p2pfl charter show, then every member runs p2pfl charter join.")
def charter_from(
    scenario: ScenarioName,
    folder: Annotated[Path, typer.Argument(help="Where charter.toml and initial.safetensors are put.")],
    changes: Changes = None,
    seed: Annotated[int, typer.Option(help="Draws the initial model.")] = 0,
) -> None:
    """Turn a scenario, the rehearsal of a federation, into a charter's draft. Masks are on unless it says otherwise."""
    from p2pfl.node.federation import CHARTER_FILE, draft_charter, save_charter
    from p2pfl.simulation.charter_terms import draft_terms
    from p2pfl.simulation.scenario import load

    chosen, path = load(scenario, changes or ()), folder / CHARTER_FILE
    if path.exists():
        raise InvalidConfig(f"{path}: exists already; name another folder")
    terms, left_out = draft_terms(chosen)
    charter = draft_charter(folder, chosen.name, chosen.data.task, terms, seed)
    save_charter(path, charter)
    _say(f"{path}: a draft of {charter.name}: {charter.task.source}, {charter.model.parameters} parameters, no members")
    for line in left_out:
        _say(f"- left out: {line}")
    _say("edit its terms now: nobody can change them once members have signed")
    _say(f"next: p2pfl charter show {path}; then every member runs p2pfl charter join {path} --config THEIR-FOLDER")


@charter_app.command("model", epilog="Next: every member runs p2pfl charter join, and p2pfl charter sign.")
def charter_model(
    charter: CharterFile = Path("charter.toml"),
    seed: Annotated[int, typer.Option(help="Draws the initial model.")] = 0,
) -> None:
    """Draw the initial model again, after the columns of the task's table were edited. Signatures become void."""
    from p2pfl.node.federation import load_charter, redraw_model, save_charter

    draft = load_charter(charter)
    drawn = redraw_model(charter, draft, seed)
    save_charter(charter, drawn)
    _say(f"{charter.parent / drawn.model.file}: {drawn.model.parameters} parameters")
    if draft.signatures and not drawn.signatures:
        _say(f"the signatures of {', '.join(draft.signatures)} were for the draft as it was; they must sign again")


@charter_app.command("join", epilog="Next, when all have joined: every member runs p2pfl charter sign.")
def charter_join(charter: CharterFile = Path("charter.toml"), config: ConfigFile = Path("peer.toml")) -> None:
    """Add this member to a draft, or update its addresses there. Signatures given so far become void."""
    from p2pfl.node.federation import join_charter, load_charter, open_home, remember_charter, save_charter

    home = open_home(config)
    if not home.config.announce:
        example = 'announce = ["/dns4/peer.example.org/tcp/4001"]'
        raise InvalidConfig(f"{config}: announce: empty; write where the others reach this peer, e.g. {example}")
    draft = load_charter(charter)
    had_key = home.sm2_key_path.exists()
    member = home.member(draft)
    joined = join_charter(draft, member)
    save_charter(charter, joined)
    if remember_charter(home, charter):
        _say(f"{home.path / home.file}: charter is now {charter}")
    if home.sm2_key_path.exists() and not had_key:
        _say(f"{home.sm2_key_path}: made this member's SM2 key, for its signatures; back it up with the identity's")
    _say(f"{charter}: {member.name} has joined; members: {', '.join(known.name for known in joined.members)}")
    if draft.signatures and not joined.signatures:
        _say(f"the signatures of {', '.join(draft.signatures)} were for the draft as it was; they must sign again")
    _say(f"next: when all have joined, every member runs p2pfl charter sign {charter} --config THEIR-FOLDER")


@charter_app.command("sign", epilog="Next, when all have signed: every member runs p2pfl peer.")
def charter_sign(charter: CharterFile = Path("charter.toml"), config: ConfigFile = Path("peer.toml")) -> None:
    """Sign the charter as this member, after checking its task file and its initial model."""
    from p2pfl.crypto.identity import charter_faults, sign_charter
    from p2pfl.node.federation import load_charter, open_home, remember_charter, save_charter, terms_faults

    home = open_home(config)
    draft = load_charter(charter)
    for fault in terms_faults(charter, draft):
        raise InvalidConfig(f"not signed: {fault}")
    signer = home.signer(draft.security.suite)
    signed = sign_charter(draft, home.config.name, signer.identity, signer.sm2_key)
    save_charter(charter, signed)
    if remember_charter(home, charter):
        _say(f"{home.path / home.file}: charter is now {charter}")
    _say(f"{charter}: {home.config.name} has signed {signed.hash().hex()[:16]}")
    faults = charter_faults(signed)
    if faults:
        _say(f"missing: {'; '.join(faults)}")
        _say("next: pass the folder on to them")
    else:
        _say(f"all {len(signed.members)} members have signed: the charter is in force")
        _say(f"next: everyone takes a copy of {charter.parent or '.'}, and runs p2pfl peer --config THEIR-FOLDER")


@charter_app.command("show", epilog="Next: p2pfl charter sign, if you agree; p2pfl charter check, to see who has.")
def charter_show(charter: CharterFile = Path("charter.toml")) -> None:
    """Print what a charter says, in words."""
    from p2pfl.node.federation import load_charter
    from p2pfl.simulation.charter_text import describe_charter

    for line in describe_charter(load_charter(charter)):
        _say(line)


@charter_app.command("check", epilog="Next, when nothing is missing: every member runs p2pfl peer.")
def charter_check(charter: CharterFile = Path("charter.toml")) -> None:
    """Check signatures, task file and initial model; name who or what is missing or wrong (exit code 2)."""
    from p2pfl.crypto.identity import charter_faults
    from p2pfl.node.federation import load_charter, terms_faults
    from p2pfl.node.live import UNMASKED
    from p2pfl.simulation.charter_text import describe_sums
    from p2pfl.simulation.privacy_text import describe_noise

    known = load_charter(charter)
    faults = [*terms_faults(charter, known), *charter_faults(known)]
    for fault in faults:
        _say(f"- {fault}")
    if faults:
        raise InvalidConfig(
            f"{charter}: not in force: {len(faults)} thing{'s' if len(faults) > 1 else ''} missing or wrong"
        )
    if known.averaging.masks == "off":
        _say(UNMASKED)
    for line in describe_sums(known) if known.averaging.masks == "on" else ():
        _say(line)
    for line in describe_noise(known):
        _say(line)
    _say(f"{charter}: in force: {known.name}, {len(known.members)} members, {known.hash().hex()[:16]}")


@data_app.command("check", epilog="Next: p2pfl charter sign, or p2pfl peer.")
def data_check(
    charter: CharterFile,
    data: Annotated[Path, typer.Argument(help="The CSV or Parquet file to check; nothing of it is sent anywhere.")],
) -> None:
    """Check a table against the charter's columns; a line for each fault, and exit code 2 if there is any."""
    from p2pfl.learning.table import check_table
    from p2pfl.node.federation import load_charter

    table = load_charter(charter).task.table
    if table is None:
        raise InvalidConfig(f"{charter}: has no task.table to check a file against; its task reads data in its own way")
    found = check_table(data, table)
    for fault in found.faults:
        _say(f"- {fault}")
    if found.unread:
        _say(f"not read, as the charter does not name them: {', '.join(map(repr, found.unread))}")
    if found.faults:
        count = len(found.faults)
        raise InvalidConfig(f"{data}: does not fit: {count} thing{'s' if count > 1 else ''} missing or wrong")
    _say(f"{data}: fits: {found.rows} rows")


@app.command(epilog="Next: p2pfl evaluate, p2pfl predict and p2pfl export, with the folder of peer.toml.")
def peer(config: ConfigFile = Path("peer.toml")) -> None:
    """Run this member's peer until the federation's last round. Ctrl-C leaves at the end of a round."""
    from p2pfl.node.federation import open_home
    from p2pfl.node.live import LiveView, following
    from p2pfl.node.peer import Peer
    from p2pfl.node.tracefile import TRACE_FILE, TraceReader

    home = open_home(config)
    prepared = Peer.prepare(home)
    charter = prepared.federation.charter
    console = Console(highlight=False)
    masked = charter.averaging.masks == "on"
    name, reader = home.config.name, TraceReader(home.run_path / TRACE_FILE, skip=True)
    with (
        LiveView([name], charter.rounds, console, str(home.run_path), masked=masked) as view,
        following(reader, name, view),
    ):
        prepared.run()
    _say(f"the model is in {home.run_path / 'model.safetensors'}")
    _say(f"next: p2pfl evaluate {home.path}")


@app.command(epilog="Next: p2pfl charter sign, if you agree; docs/privacy.md says what the numbers mean.")
def privacy(
    charter: Annotated[
        Path | None, typer.Argument(help="A charter or draft; without it this member's own, and what is spent.")
    ] = None,
    config: ConfigFile = Path("peer.toml"),
) -> None:
    """Say what noise a charter adds, how many rounds its budget bears, and what this member has spent of it."""
    from p2pfl.core.ids import PeerId
    from p2pfl.node.checkpoints import spent_rho
    from p2pfl.node.federation import load_charter, open_home
    from p2pfl.node.peer import STATE_FOLDER
    from p2pfl.simulation.privacy_text import NO_NOISE, describe_noise, describe_spent

    home = open_home(config) if charter is None else None
    known = load_charter(home.charter_path if home is not None else charter or Path())
    if known.privacy is None:
        _say(NO_NOISE)
        return
    for line in describe_noise(known):
        _say(line)
    member = None if home is None else known.member(home.config.name)
    if home is not None and member is not None:
        rho = spent_rho(home.run_path / STATE_FOLDER, known.hash(), PeerId(member.peer_id))
        for line in describe_spent(known, rho):
            _say(line)


@app.command(epilog="Next: p2pfl evaluate and p2pfl export with its folder, or your own task: docs/own-task.md.")
def demo(
    peers: Annotated[int, typer.Option(help="How many peers, each a process of its own.")] = 8,
    topology: Annotated[
        str,
        typer.Option(
            help="groups, drawn anew each round; exponential, ring, complete, random-regular, torus, hypercube, path."
        ),
    ] = "groups",
    group_size: Annotated[int, typer.Option(help="Members wanted in a group.")] = 4,
    rounds: Annotated[int, typer.Option(help="Rounds of local training and averaging.")] = 60,
    task: Annotated[
        str, typer.Option(help="digits, breast-cancer, tabular (on made-up credits), or file.py:ClassName.")
    ] = "digits",
    alpha: Annotated[float, typer.Option(help="How alike the peers' data is: Dirichlet; smaller is less alike.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Draws the shares of data, the initial model and all orders.")] = 0,
    suite: Annotated[str, typer.Option(help="The channels' cipher suite: aes, sm4 or gm.")] = "aes",
    masks: Annotated[
        bool, typer.Option("--masks/--no-masks", help="Hide single updates: only sums are revealed.")
    ] = True,
    bits: Annotated[
        int, typer.Option(help="Of masked words: 32, or 16 for changes where members share a base (--group-size 8).")
    ] = 32,
    noise: Annotated[
        float, typer.Option(help="Add noise to sums: its deviation, in multiples of the largest update's norm.")
    ] = 0.0,
    epsilon: Annotated[
        float, typer.Option(help="Or: add as much as it takes that all rounds cost no more than this.")
    ] = 0.0,
    chaos: Annotated[
        bool, typer.Option("--chaos", help="Kill, freeze and cut off peers meanwhile, and see them come back.")
    ] = False,
    run: Annotated[Path | None, typer.Option(help="The run's folder; by default a new one in runs/.")] = None,
) -> None:
    """Let a federation of real peers train on this machine, and see what it gained."""
    from p2pfl.node.launcher import interrupted_by_signals, preload

    path = run or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    numbered = run is None
    with interrupted_by_signals():
        # Peers load torch and libp2p while the charter is drawn up here.
        preload()
        _demo(
            path,
            numbered,
            peers=peers,
            topology=topology,
            group_size=group_size,
            rounds=rounds,
            task=task,
            alpha=alpha,
            seed=seed,
            suite=suite,
            masks=masks,
            bits=bits,
            noise=noise,
            epsilon=epsilon,
            chaos=chaos,
        )


def _demo(path: Path, numbered: bool, **settings: Any) -> None:
    from p2pfl.core.errors import RoundFailed
    from p2pfl.node.launcher import describe
    from p2pfl.node.live import LiveView
    from p2pfl.simulation.demo import DemoSettings, prepare_demo, run_demo
    from p2pfl.simulation.report import report as make_report

    chosen = DemoSettings(**settings)
    federation = prepare_demo(path, chosen, numbered)
    path = federation.path
    console = Console(highlight=False)
    masked = chosen.masks
    names = [home.config.name for home in federation.homes]
    with LiveView(names, chosen.rounds, console, str(path), masked=masked) as view:
        failures = run_demo(federation, view, debug=_debug, chaos=chosen.chaos)
    console.print(make_report(path))
    killed = {name: failure for name, failure in failures.items() if failure.killed}
    if killed:
        _say(f"{describe(killed, chosen.peers)}: the others went on")
    _say_next(path)
    failed = {name: failure for name, failure in failures.items() if not failure.killed}
    if failed:
        raise RoundFailed(describe(failed, chosen.peers))


def _say_next(path: Path) -> None:
    _say(f"plots, traces and models are in {path}")
    _say(f"next: p2pfl evaluate {path}, p2pfl export {path} model.safetensors, or your own task: docs/own-task.md")


@app.command("verify-wire", epilog="Next: open the pcap file in Wireshark, or p2pfl suites.")
def verify_wire_command(
    suite: Annotated[str, typer.Option(help="The channels' cipher suite: aes, sm4 or gm.")] = "aes",
    rounds: Annotated[int, typer.Option(help="Training rounds of the two peers.")] = 5,
    pcap: Annotated[
        Path | None, typer.Option(help="Write what crossed the wire as a file that Wireshark opens.")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The runs' folder; by default a new one in runs/.")] = None,
) -> None:
    """Record what two peers send each other, and search it for what they know. Exit code 1 if anything is found.

    The same search over a channel without encryption must find everything, or it proves nothing.
    """
    from p2pfl.simulation.verify_wire import verify_wire

    path = run or Path("runs") / time.strftime("wire-%Y%m%d-%H%M%S")
    found = verify_wire(path, pcap, rounds=rounds, terms={"security": {"suite": suite}})
    Console(highlight=False).print(found)
    if not found.passed:
        raise typer.Exit(1)


@app.command(epilog="Next: p2pfl charter new --suite sm4, or p2pfl demo --suite sm4.")
def suites() -> None:
    """Show each cipher suite's algorithms, the library that serves each here, and how fast it is."""
    from p2pfl.simulation.suites_text import render_suites

    Console(highlight=False).print(render_suites())


@app.command(
    epilog="Next: p2pfl charter new --topology NAME, with one that bears the colluders you fear. More: docs/leakage.md."
)
def topology(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME|FILE",
            help="A topology; or a graph's file: GraphML (.graphml), or a line with two names for each link. "
            "Without: the list of names.",
        ),
    ] = None,
    peers: Annotated[int | None, typer.Option(help="How many peers; 20 unless said. A file says so itself.")] = None,
    seed: Annotated[int, typer.Option(help="Draws random graphs, and groups.")] = 0,
    group_size: Annotated[int, typer.Option(help="Members wanted in a group, as in the charter.")] = 8,
    colluders: Annotated[int, typer.Option(help="How many members may work together, as in the charter.")] = 1,
    alpha_min: Annotated[
        float,
        typer.Option(help="The smallest weight of a contribution to a sum, relative to the largest; 1: all equal."),
    ] = 1.0,
    parameters: Annotated[
        int | None, typer.Option(help="The model's parameters, to give bytes instead of |x|.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the graph, and who isolates whom, to this PNG file.")] = None,
) -> None:
    """Say what a topology costs, how fast it mixes, and how many colluders isolate one peer's update on it.

    |x| is the length of the model. "Isolated by 3": three peers at the right places, who follow the protocol and put
    together what they read, compute a fourth one's update exactly; "5 to 9": at least 5, and 9 suffice. The cosine is
    that of the best estimate that c colluders make, and the update: 1 is the update itself, 0 is nothing.
    """
    from p2pfl.simulation.topology_report import analyse, topologies

    if name is None:
        for known, what in topologies():
            _say(f"{known:<16}{what}")
        return
    found = analyse(name, peers, seed=seed, group_size=group_size, colluders=colluders, alpha_min=alpha_min,
                    parameters=parameters)  # fmt: skip
    if plot is not None:
        from p2pfl.simulation.plots import png

        plot.write_bytes(png(found.figure()))
    if as_json:
        typer.echo(found.to_json())
    else:
        Console(highlight=False).print(found)


@app.command(epilog="Next: p2pfl evaluate RUN.")
def report(run: RunFolder) -> None:
    """Draw a run's tables and plots again."""
    from p2pfl.simulation.report import report as make_report
    from p2pfl.simulation.runs import is_complete

    if is_complete(run):
        _report_simulated(run)
        return
    made = make_report(run)
    Console(highlight=False).print(made)
    _say(f"plots are in {made.path}")


@app.command(epilog="Next: p2pfl predict RUN FILE, or p2pfl export RUN FILE.")
def evaluate(
    run: RunFolder,
    member: Annotated[str | None, typer.Option(help="Whose model; by default the first that finished.")] = None,
) -> None:
    """Print accuracy, AUC, KS and the confusion matrix of the model on data that nobody trained on."""
    from p2pfl.simulation.outcome import evaluate_run, render_evaluation

    console = Console(highlight=False)
    console.print(render_evaluation(evaluate_run(run, member)))


@app.command(epilog="Next: p2pfl export RUN FILE, to use the model without p2pfl.")
def predict(
    run: RunFolder,
    data: Annotated[Path, typer.Argument(help="CSV, Parquet or .npy with a row per example, inputs only.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write here instead of printing.")] = None,
    member: Annotated[str | None, typer.Option(help="Whose model; by default the first that finished.")] = None,
) -> None:
    """Classify examples with a run's model: CSV with a label and each class's probability."""
    from p2pfl.simulation.outcome import predict_run

    text = predict_run(run, data, member)
    if output is None:
        typer.echo(text, nl=False)
    else:
        output.write_text(text)
        _say(f"{output}: {text.count(chr(10)) - 1} predictions")


@app.command(epilog="Next: safetensors.torch.load_file(FILE) gives the state dict of the task's model.")
def export(
    run: RunFolder,
    output: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    member: Annotated[str | None, typer.Option(help="Whose model; by default the first that finished.")] = None,
) -> None:
    """Write a run's model as safetensors, for torch or anything else."""
    from p2pfl.simulation.outcome import export_run

    chosen, agreed = export_run(run, output, member)
    _say(f"{output}: the model of {chosen}" + (", within the charter's tolerance of all others" if agreed else ""))
    if not agreed:
        _say("the peers did not average down to the charter's tolerance: other members' models differ from this one")


@app.command(epilog="Next: p2pfl replay ... --peer m3 --round 1, to see one peer's part in one round.")
def replay(
    trace: Annotated[
        Path | None,
        typer.Argument(
            help="A trace (p2pfl replay --save, or a peer's run/trace.jsonl), or a case that make soak kept."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Run the simulated network under this seed, and tell that.")] = None,
    mix: Annotated[str, typer.Option(help="With --seed, what goes wrong: none, standard or hostile.")] = "standard",
    peers: Annotated[int, typer.Option(help="With --seed, how many peers.")] = 8,
    topology: Annotated[str, typer.Option(help="With --seed: groups, or an overlay whose stars average.")] = "groups",
    group: Annotated[int, typer.Option(help="With --seed, members wanted in a group.")] = 4,
    masks: Annotated[bool, typer.Option("--masks", help="With --seed, hide updates in the sums.")] = False,
    bits: Annotated[int, typer.Option(help="With --masks, of a word: 32, or 16 for changes.")] = 32,
    weighted: Annotated[bool, typer.Option("--weighted", help="With --seed, members weigh by samples.")] = False,
    matrix: Annotated[int, typer.Option(help="With --seed, the fault matrix's case of that many members instead.")] = 0,
    kill: Annotated[
        str, typer.Option(help="With --matrix, who dies: place/effects/1 if its last record is kept.")
    ] = "",
    lie: Annotated[str, typer.Option(help="With --matrix, how a member lies.")] = "",
    peer: Annotated[str | None, typer.Option(help="Only what this peer sees and does: m0, m1, ...")] = None,
    round_: Annotated[int | None, typer.Option("--round", help="Only what names this round.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Timers, computations and signs of life, too.")] = False,
    save: Annotated[Path | None, typer.Option(help="Write the trace to this file, and say only how it ended.")] = None,
) -> None:
    """Tell a trace of the simulated network in words: when, who, what came in, and what followed.

    A run follows from its seed alone, so --seed 7 tells the same each time. Exit code 1 if an invariant was violated.
    """
    from p2pfl.core.errors import RoundFailed
    from p2pfl.simulation.matrix import plan_of, run_matrix
    from p2pfl.simulation.replay import load, run_mix, tell

    if (trace is None) == (seed is None):
        raise InvalidConfig("replay takes a file or --seed; see p2pfl replay --help")
    if trace is not None:
        lines, reason = load(trace)
    elif matrix:
        lines, reason = run_matrix(plan_of(seed or 0, matrix, kill, lie))
    else:
        network = {"peers": peers, "topology": topology, "group": group, "masked": masks}
        lines, reason = run_mix(seed or 0, mix, **network, bits=bits, weighted=weighted)
    if save is not None:
        save.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        _say(f"{save}: {len(lines)} lines")
    else:
        for line in tell(lines, peer, round_, everything=all_):
            _say(line)
    if reason:
        raise RoundFailed(f"an invariant was violated: {reason}")


@scenario_app.command("list", epilog="Next: p2pfl simulate NAME, or p2pfl sweep NAME.")
def scenario_list() -> None:
    """List the scenarios that are ready to run."""
    from p2pfl.simulation.scenario import load, names

    for name in names():
        found = load(name)
        _say(f"{name}{f' (p2pfl sweep {name})' if found.sweep else ''}")
        _say(f"    {found.description}")


@scenario_app.command("explain", epilog="Next: p2pfl simulate FILE.")
def scenario_explain(
    scenario: Annotated[
        str | None, typer.Argument(metavar="[SCENARIO]", help="A file or a name: shows its values, not the defaults.")
    ] = None,
    changes: Changes = None,
) -> None:
    """Say what each key of a scenario means, its type, bounds and default, and list topologies and algorithms."""
    from p2pfl.simulation.scenario import explain, load

    for line in explain(None if scenario is None else load(scenario, changes or ())):
        _say(line)


@app.command(epilog="Next: p2pfl compare RUN RUN, or p2pfl report RUN.")
def simulate(
    scenario: ScenarioName,
    changes: Changes = None,
    runs: RunsFolder = Path("runs"),
    engine: Annotated[
        str | None, typer.Option(help="dense: thousands of peers as stacked tensors; simnet: real peers' machines.")
    ] = None,
    device: Device = "cpu",
    again: Annotated[bool, typer.Option("--again", help="Run even if there is a run of the same settings.")] = False,
) -> None:
    """Run a scenario: thousands of peers as stacked tensors, without messages; bytes and seconds are modelled.

    With --engine simnet some tens of peers, as real ones run them, over the simulated network.
    """
    from p2pfl.simulation.compare import compare as make_comparison
    from p2pfl.simulation.compare import draw_run
    from p2pfl.simulation.scenario import load
    from p2pfl.simulation.simulate import simulate as run_scenario

    chosen = load(scenario, [*(changes or ()), *([] if engine is None else [f"engine={engine}"])])
    if chosen.sweep:
        raise InvalidConfig(f"{scenario} has a [sweep] of {', '.join(chosen.sweep)}: run p2pfl sweep {scenario}")
    _say_scenario(chosen)
    with _progress("rounds") as watch:
        run = run_scenario(chosen, runs, device=device, watch=watch, again=again)
    files = draw_run(run)
    Console(highlight=False).print(make_comparison([run]))
    summary = run.summary
    _say(f"{summary['seconds']:.1f} s on {summary['device']}, tier {summary['tier']}, {summary['threads']} threads")
    _say(f"settings, curves and plots are in {files[0].parent}")


@app.command(epilog="Next: p2pfl sweep NAME again goes on where it was stopped.")
def sweep(
    scenario: ScenarioName,
    changes: Changes = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=[VALUE, VALUE]", help="A list of values for a key. Repeatable.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; by default one for each processor.")] = None,
    runs: RunsFolder = Path("runs"),
    device: Device = "cpu",
) -> None:
    """Run every combination of a scenario's [sweep], and compare them. What has been run is not run again."""
    from p2pfl.core.errors import RoundFailed
    from p2pfl.simulation.compare import compare as make_comparison
    from p2pfl.simulation.compare import save_comparison
    from p2pfl.simulation.scenario import load, varied
    from p2pfl.simulation.sweep import sweep as run_sweep

    chosen = varied(load(scenario, changes or ()), vary or ())
    _say_scenario(chosen)
    with _progress("runs") as watch:
        found = run_sweep(chosen, runs, jobs=jobs, device=device, watch=watch)
    if found.runs:
        made = make_comparison(found.runs)
        files = save_comparison(made, found.folder)
        Console(highlight=False).print(made)
        _say(f"{len(found.runs)} runs, {found.found} of them from before, are in {found.folder}")
        _say(f"table and figures: {', '.join(file.name for file in files)}")
    for point, reason in found.failures.items():
        _say(f"did not run: {point}: {reason}")
    if found.failures:
        raise RoundFailed(f"{len(found.failures)} of {len(found.failures) + len(found.runs)} runs failed")


@app.command(epilog="Next: p2pfl report RUN draws one of them again.")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Runs' folders, or folders of such.")],
    metric: Annotated[str | None, typer.Option(help="A column of rounds.parquet, such as loss or peer_loss.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the table and the figures go.")] = Path(
        "runs/comparison"
    ),
) -> None:
    """Compare simulated runs: by what they differ, how they end, and how fast they get there."""
    from p2pfl.simulation.compare import compare as make_comparison
    from p2pfl.simulation.compare import save_comparison
    from p2pfl.simulation.runs import find, open_simulated

    made = make_comparison([open_simulated(path) for path in find(runs)], metric)
    files = save_comparison(made, output)
    Console(highlight=False).print(made)
    _say(f"in {output}: {', '.join(file.name for file in files)}")


def _say_scenario(scenario: Any) -> None:
    """Say what is about to run, and whether masks are simulated."""
    averaging, training = scenario.averaging, scenario.training
    _say(f"{scenario.name}: {scenario.description or 'no description'}")
    seeds = f"{len(scenario.seeds)} seeds side by side" if len(scenario.seeds) > 1 else f"seed {scenario.seeds[0]}"
    _say(f"{scenario.peers} peers, {scenario.data.task}, {training.algorithm} on {averaging.topology}, {seeds}")
    attackers, defence = scenario.attackers, scenario.defence
    if scenario.compression.name != "none":
        _say(f"compression by {scenario.compression.name}")
    if attackers.attack != "none" or defence.rule != "none":
        _say(f"{attackers.among(scenario.peers)} attackers, by {attackers.attack}; defence: {defence.rule}")
    for key, values in scenario.sweep.items():
        _say(f"for each of {key} = {', '.join(map(str, values))}")
    if "averaging.masks" not in scenario.sweep:
        on = averaging.masks == "on"
        _say(f"masks are {'on: values go through their fixed point' if on else 'off: UNMASKED'}")


def _report_simulated(path: Path) -> None:
    from p2pfl.simulation.compare import compare as make_comparison
    from p2pfl.simulation.compare import draw_run
    from p2pfl.simulation.runs import open_simulated

    opened = open_simulated(path)
    files = draw_run(opened)
    Console(highlight=False).print(make_comparison([opened]))
    _say(f"plots are in {files[0].parent}")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with the time left, on a terminal only."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn(what), TimeElapsedColumn(), TextColumn("left"))
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


_debug = False
INTERRUPTED = 128 + 2
"""A shell's exit code for what SIGINT ended."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; an error is one line and an exit code: 2 for settings, 1 for a run that failed."""
    global _debug  # noqa: PLW0603 - one flag of one process, set once before anything runs
    given = list(sys.argv[1:] if arguments is None else arguments)
    _debug = "--debug" in given
    try:
        code = app([argument for argument in given if argument != "--debug"], prog_name="p2pfl", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("stopped\n")
        sys.exit(INTERRUPTED)
    except P2pflError as error:
        _end(error, str(error), error.exit_code)
    except OSError as error:
        _end(error, f"{error.filename or 'system'}: {error.strerror}", 1)
    except Exception as error:  # noqa: BLE001 - the last line of defence: one line, and where to look
        # What the command line's library finds wrong with the arguments knows its own exit code.
        usage = getattr(error, "format_message", None)
        if usage is not None:
            if not usage():
                sys.exit(2)  # no command was given, and the help has been printed
            _end(error, f"{usage().rstrip('.')}; see {_command(given)} --help", 2)
        _end(error, f"a fault in p2pfl: {type(error).__name__}: {error}; run again with --debug and report it", 1)
    if code == INTERRUPTED:  # typer makes this of a KeyboardInterrupt
        sys.stderr.write("stopped\n")
    sys.exit(code if isinstance(code, int) else 0)


def _end(error: BaseException, line: str, code: int) -> NoReturn:
    if _debug:
        raise error
    sys.stderr.write(f"error: {' '.join(line.splitlines())}\n")
    sys.exit(code)


def _command(arguments: Sequence[str]) -> str:
    words = [
        word
        for word in arguments[:2]
        if word
        in {"charter", "data", "scenario", *_names(app), *_names(charter_app), *_names(data_app), *_names(scenario_app)}
    ]
    return " ".join(["p2pfl", *words])


def _names(group: typer.Typer) -> list[str]:
    return [
        command.name or (command.callback.__name__ if command.callback else "") for command in group.registered_commands
    ]


if __name__ == "__main__":
    main()
