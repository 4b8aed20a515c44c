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
from p2pfl.commands.charter import charter_app
from p2pfl.commands.operator import operator_app
from p2pfl.commands.say import AsJson, CharterFile, ConfigFile, emit, say
from p2pfl.core.errors import InvalidConfig, P2pflError

HELP = """Peer-to-peer, decentralised federated learning: one model from data that never leaves its premises, no server.

See it run:           p2pfl demo

Set up a member:      p2pfl init bank-a

Agree on a charter:   p2pfl charter new | join | sign | show | check | diff | next

Check your table:     p2pfl data check

Weigh topologies:     p2pfl topology

See what is missing:  p2pfl doctor bank-a, p2pfl status bank-a

Take part:            p2pfl peer --config bank-a/peer.toml

What noise hides:     p2pfl privacy

Use the model:        p2pfl report | evaluate | predict | export

Rehearse and compare: p2pfl scenario list | explain, p2pfl simulate | sweep | compare

Every command explains itself with --help; --debug after any command shows the traceback of an error.
"""

app = typer.Typer(help=HELP, no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
app.registered_commands.extend(operator_app.registered_commands)  # before all others in the help
app.add_typer(charter_app, name="charter")
scenario_app = typer.Typer(help="List and explain scenarios of the convergence lab.", no_args_is_help=True)
app.add_typer(scenario_app, name="scenario")
data_app = typer.Typer(
    help="Check a member's table before it takes part.",
    no_args_is_help=True,
    epilog="Next: p2pfl data check CHARTER FILE.",
)
app.add_typer(data_app, name="data")

RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, or one member's.")]
ScenarioName = Annotated[str, typer.Argument(metavar="SCENARIO", help="A file, or a name: p2pfl scenario list.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. training.rounds=100. Repeatable."),
]
RunsFolder = Annotated[Path, typer.Option("--runs", help="Where the runs' folders go.")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Write TensorBoard's event files, too (an extra).")]
Engine = Annotated[
    str | None, typer.Option(help="dense: thousands of peers as stacked tensors; simnet: real peers' machines.")
]
Device = Annotated[str, typer.Option(help="Where torch computes: cpu, or cuda.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        say(f"p2pfl {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version


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
        say(f"- {fault}")
    if found.unread:
        say(f"not read, as the charter does not name them: {', '.join(map(repr, found.unread))}")
    if found.faults:
        count = len(found.faults)
        raise InvalidConfig(f"{data}: does not fit: {count} thing{'s' if count > 1 else ''} missing or wrong")
    say(f"{data}: fits: {found.rows} rows")
    say("next: name it as path under [data] in peer.toml, then p2pfl doctor FOLDER")


@app.command(epilog="Next: p2pfl charter sign, if you agree; docs/privacy.md says what the numbers mean.")
def privacy(
    charter: Annotated[
        Path | None, typer.Argument(help="A charter or draft; without it this member's own, and what is spent.")
    ] = None,
    config: ConfigFile = Path("peer.toml"),
    as_json: AsJson = False,
) -> None:
    """Say what noise a charter adds, how many rounds its budgets bear, and what this member has spent of them."""
    from p2pfl.node.federation import load_charter, open_home
    from p2pfl.node.spending import spendings
    from p2pfl.node.status import shortest
    from p2pfl.simulation.privacy_text import NO_NOISE, describe_noise, describe_spent, privacy_values

    home = open_home(config) if charter is None else None
    path = home.charter_path if home is not None else charter or Path()
    known = load_charter(path)
    spent = None if home is None else spendings(home, known)
    following = f"p2pfl charter sign {path}, if you agree" if home is None else f"p2pfl status {home.path}"
    if as_json:
        emit({"charter": str(shortest(path)), **privacy_values(known, spent), "next": following})
        return
    if known.privacy is None:
        say(NO_NOISE)
        return
    for line in describe_noise(known):
        say(line)
    for line in () if spent is None else describe_spent(spent):
        say(line)


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
        str,
        typer.Option(help="digits, breast-cancer, tabular (on made-up credits), cifar10, mnist, or file.py:ClassName."),
    ] = "digits",
    data: Annotated[
        Path | None, typer.Option(help="A file or folder that the task reads, of which each peer takes a share.")
    ] = None,
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
    example_noise: Annotated[
        float, typer.Option(help="Add noise to each gradient, so that no example shows: in multiples of the clip, 1.")
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
            example_noise=example_noise,
            chaos=chaos,
            data="" if data is None else str(data),
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
        say(f"{describe(killed, chosen.peers)}: the others went on")
    _say_next(path)
    failed = {name: failure for name, failure in failures.items() if not failure.killed}
    if failed:
        raise RoundFailed(describe(failed, chosen.peers))


def _say_next(path: Path) -> None:
    say(f"plots, traces and models are in {path}")
    say(f"next: p2pfl evaluate {path}, p2pfl export {path} model.safetensors, or your own task: docs/own-task.md")


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
    weights: Annotated[
        str | None,
        typer.Option(help="Of a graph's links: metropolis-hastings unless said, max-degree, uniform or optimal."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the topology, e.g. degree=3. Repeatable."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws random graphs, and groups.")] = 0,
    group_size: Annotated[
        int | None, typer.Option(help="Members wanted in a group, as in the charter; 8 unless said.")
    ] = None,
    colluders: Annotated[int, typer.Option(help="How many members may work together, as in the charter.")] = 1,
    alpha_min: Annotated[
        float | None,
        typer.Option(
            help="The smallest weight of a contribution to a sum, relative to the largest; all equal unless said."
        ),
    ] = None,
    parameters: Annotated[
        int | None, typer.Option(help="The model's parameters, to give bytes instead of |x|.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw the graph and who isolates whom, or the first rounds, to this PNG file."),
    ] = None,
) -> None:
    """Say what a topology costs, how fast it mixes, and how many colluders isolate one peer's update on it.

    |x| is the length of the model. "Isolated by 3": three peers at the right places, who follow the protocol and put
    together what they read, compute a fourth one's update exactly; "5 to 9": at least 5, and 9 suffice. The cosine is
    that of the best estimate that c colluders make, and the update: 1 is the update itself, 0 is nothing.

    Of topologies that change from round to round, which the convergence lab has, it says how fast they mix and what
    they cost.
    """
    from p2pfl.core.errors import InvalidConfig
    from p2pfl.simulation.scenario import assigned
    from p2pfl.simulation.schedule_report import CHANGING, ScheduleReport, analyse_schedule
    from p2pfl.simulation.topology_report import TopologyReport, analyse, topologies, verify_weights

    if name is None:
        for known, what in topologies():
            say(f"{known:<22}{what}")
        return
    found: TopologyReport | ScheduleReport
    chosen = dict(map(assigned, options or ()))
    if name in CHANGING:
        if weights is not None:
            verify_weights(name, weights)
        for option, value in (("--group-size", group_size), ("--alpha-min", alpha_min)):
            if value is not None:
                raise InvalidConfig(f"{option}: is of masked groups and stars, and {name} has none here; leave it out")
        found = analyse_schedule(name, peers, seed=seed, colluders=colluders, parameters=parameters,
                                 options=chosen)  # fmt: skip
    else:
        found = analyse(name, peers, seed=seed, group_size=8 if group_size is None else group_size,
                        colluders=colluders, alpha_min=1.0 if alpha_min is None else alpha_min, parameters=parameters,
                        weights=weights, options=chosen)  # fmt: skip
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
    say(f"plots are in {made.path}")


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
    data: Annotated[
        Path, typer.Argument(help="CSV, Parquet or .npy with a row per example, inputs only; what the task reads.")
    ],
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
        say(f"{output}: {text.count(chr(10)) - 1} predictions")


@app.command(epilog="Next: safetensors.torch.load_file(FILE) gives the state dict of the task's model.")
def export(
    run: RunFolder,
    output: Annotated[Path, typer.Argument(help="The safetensors file to write.")],
    member: Annotated[str | None, typer.Option(help="Whose model; by default the first that finished.")] = None,
) -> None:
    """Write a run's model as safetensors, for torch or anything else."""
    from p2pfl.simulation.outcome import export_run

    chosen, agreed = export_run(run, output, member)
    say(f"{output}: the model of {chosen}" + (", within the charter's tolerance of all others" if agreed else ""))
    if not agreed:
        say("the peers did not average down to the charter's tolerance: other members' models differ from this one")


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
        say(f"{save}: {len(lines)} lines")
    else:
        for line in tell(lines, peer, round_, everything=all_):
            say(line)
    if reason:
        raise RoundFailed(f"an invariant was violated: {reason}")


@scenario_app.command("list", epilog="Next: p2pfl simulate NAME, or p2pfl sweep NAME.")
def scenario_list() -> None:
    """List the scenarios that are ready to run."""
    from p2pfl.simulation.scenario import load, names

    for name in names():
        found = load(name)
        say(f"{name}{f' (p2pfl sweep {name})' if found.sweep else ''}")
        say(f"    {found.description}")


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
        say(line)


@app.command(epilog="Next: p2pfl compare RUN RUN, or p2pfl report RUN.")
def simulate(
    scenario: ScenarioName,
    changes: Changes = None,
    runs: RunsFolder = Path("runs"),
    engine: Engine = None,
    device: Device = "cpu",
    again: Annotated[bool, typer.Option("--again", help="Run even if there is a run of the same settings.")] = False,
    tensorboard: TensorBoard = False,
) -> None:
    """Run a scenario: thousands of peers as stacked tensors, without messages; bytes and seconds are modelled.

    With --engine simnet some tens of peers, as real ones run them, over the simulated network.
    """
    from p2pfl.node.memory import keep_freed_blocks
    from p2pfl.simulation.compare import compare as make_comparison
    from p2pfl.simulation.compare import draw_run
    from p2pfl.simulation.events import event_writer
    from p2pfl.simulation.scenario import load
    from p2pfl.simulation.simulate import simulate as run_scenario

    keep_freed_blocks()
    chosen = load(scenario, _with_engine(changes, engine))
    if chosen.sweep:
        ways = " ".join(f"--set {key}=VALUE" for key in chosen.sweep)
        raise InvalidConfig(
            f"{scenario} has a [sweep] of {', '.join(chosen.sweep)}: run p2pfl sweep {scenario}, or one value of each "
            f"by {ways}"
        )
    if tensorboard:
        event_writer()  # before a long run, not after it
    _say_scenario(chosen)
    with _progress("rounds") as watch:
        run = run_scenario(chosen, runs, device=device, watch=watch, again=again)
    files = draw_run(run)
    if tensorboard:
        _write_events([run], files[0].parent)
    Console(highlight=False).print(make_comparison([run]))
    summary = run.summary
    say(f"{summary['seconds']:.1f} s on {summary['device']}, tier {summary['tier']}, {summary['threads']} threads")
    say(f"settings, curves and plots are in {files[0].parent}")


@app.command(epilog="Next: p2pfl sweep NAME again goes on where it was stopped.")
def sweep(
    scenario: ScenarioName,
    changes: Changes = None,
    vary: Annotated[
        list[str] | None, typer.Option(metavar="KEY=[VALUE, VALUE]", help="A list of values for a key. Repeatable.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes; by default one for each processor.")] = None,
    runs: RunsFolder = Path("runs"),
    engine: Engine = None,
    device: Device = "cpu",
    backend: Annotated[str, typer.Option(help="processes, or ray (an extra); results are the same.")] = "processes",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; without, ray is started on this machine.")
    ] = None,
    tensorboard: TensorBoard = False,
) -> None:
    """Run every combination of what a scenario's sweep lists, and compare them. What has been run is not run again."""
    from p2pfl.core.errors import RoundFailed
    from p2pfl.node.memory import keep_freed_blocks
    from p2pfl.simulation.compare import compare as make_comparison
    from p2pfl.simulation.compare import save_comparison
    from p2pfl.simulation.events import event_writer
    from p2pfl.simulation.scenario import load, varied
    from p2pfl.simulation.sweep import sweep as run_sweep

    keep_freed_blocks()
    chosen = varied(load(scenario, _with_engine(changes, engine)), vary or ())
    if tensorboard:
        event_writer()
    _say_scenario(chosen)
    with _progress("runs") as watch:
        found = run_sweep(
            chosen, runs, jobs=jobs, device=device, watch=watch, backend=backend, address=address
        )  # fmt: skip
    if tensorboard:
        _write_events(found.runs, found.folder)
    if found.runs:
        made = make_comparison(found.runs)
        files = save_comparison(made, found.folder)
        Console(highlight=False).print(made)
        say(f"{len(found.runs)} runs, {found.found} of them from before, are in {found.folder}")
        say(f"table and figures: {', '.join(file.name for file in files)}")
    for point, reason in found.failures.items():
        say(f"did not run: {point}: {reason}")
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
    from p2pfl.simulation.runs import open_all

    made = make_comparison(open_all(runs), metric)
    files = save_comparison(made, output)
    Console(highlight=False).print(made)
    say(f"in {output}: {', '.join(file.name for file in files)}")


def _with_engine(changes: Sequence[str] | None, engine: str | None) -> list[str]:
    return [*(changes or ()), *([] if engine is None else [f"engine={engine}"])]


def _write_events(runs: Sequence[Any], folder: Path) -> None:
    from p2pfl.simulation.events import write_events

    for run in runs:
        write_events(run)
    say(f"event files: tensorboard --logdir {folder}")


def _say_scenario(scenario: Any) -> None:
    """Say what is about to run, and whether masks are simulated."""
    averaging, training = scenario.averaging, scenario.training
    say(f"{scenario.name}: {scenario.description or 'no description'}")
    seeds = f"{len(scenario.seeds)} seeds side by side" if len(scenario.seeds) > 1 else f"seed {scenario.seeds[0]}"
    say(f"{scenario.peers} peers, {scenario.data.task}, {training.algorithm} on {averaging.topology}, {seeds}")
    attackers, defence = scenario.attackers, scenario.defence
    if scenario.compression.name != "none":
        say(f"compression by {scenario.compression.name}")
    if attackers.attack != "none" or defence.rule != "none":
        say(f"{attackers.among(scenario.peers)} attackers, by {attackers.attack}; defence: {defence.rule}")
    for key, values in scenario.sweep.items():
        say(f"for each of {key} = {', '.join(map(str, values))}")
    if "averaging.masks" not in scenario.sweep:
        on = averaging.masks == "on"
        say(f"masks are {'on: values go through their fixed point' if on else 'off: UNMASKED'}")


def _report_simulated(path: Path) -> None:
    from p2pfl.simulation.compare import compare as make_comparison
    from p2pfl.simulation.compare import draw_run
    from p2pfl.simulation.runs import open_simulated

    opened = open_simulated(path)
    files = draw_run(opened)
    Console(highlight=False).print(make_comparison([opened]))
    say(f"plots are in {files[0].parent}")


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
        in {
            *("charter", "data", "scenario"),
            *(name for group in (app, charter_app, data_app, scenario_app) for name in _names(group)),
        }
    ]
    return " ".join(["p2pfl", *words])


def _names(group: typer.Typer) -> list[str]:
    return [
        command.name or (command.callback.__name__ if command.callback else "") for command in group.registered_commands
    ]


if __name__ == "__main__":
    main()
