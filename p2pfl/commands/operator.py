"""A member's own commands, in the order of its path: init, status, doctor, peer."""

import os
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from p2pfl.commands.say import AsJson, ConfigFile, HomeFolder, emit, say

operator_app = typer.Typer()


@operator_app.command(epilog="Next: p2pfl charter join, with the draft you were sent, or p2pfl charter new.")
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
    as_json: AsJson = False,
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
    following = f"p2pfl charter join CHARTER --config {home.path}, with the draft you were sent"
    if as_json:
        made = {"member": name, "peer_id": identity.peer_id, "folder": str(home.path)}
        emit({**made, "listen": config.listen, "announce": config.announce, "next": following})
        return
    say(f"{name} is {identity.peer_id}")
    say(f"its key and settings are in {home.path}{'' if announce else '; write into'}")
    if not announce:
        say(f'  {home.path / CONFIG_FILE}: announce = ["/dns4/YOUR-HOST/tcp/4001"], where the others reach this peer')
    say(f"next: {following};")
    say("      or draw one up: p2pfl charter new FOLDER --task digits")


@operator_app.command(epilog="Next: p2pfl doctor, where something is missing; p2pfl peer.")
def status(folder: HomeFolder = Path(), as_json: AsJson = False) -> None:
    """Say where this member stands: charter, members, round, last record, model, disk, and what comes next.

    A running peer keeps it in its folder, so nothing is asked over the network, and a stopped peer's is there too.
    """
    from p2pfl.node.federation import open_home
    from p2pfl.node.status import status_of
    from p2pfl.simulation.status_text import describe_status

    found = status_of(open_home(folder))
    if as_json:
        emit(found.to_json())
        return
    for line in describe_status(found, time.time()):
        say(line)
    say(f"next: {found.next}")


@operator_app.command(epilog="Next: what each line says behind its semicolon; p2pfl peer once nothing FAILs.")
def doctor(
    folder: HomeFolder = Path(),
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Go on until the other members' doctors have answered.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """Look for all that keeps this member from taking part, and visit the others. Exit code 1 if anything FAILs.

    Other members answer while p2pfl peer runs there, or p2pfl doctor --wait 600, which all start while they telephone.
    Nothing is changed, and nothing of the data leaves this machine.
    """
    from p2pfl.node.doctor import examine

    report = examine(folder, wait=wait, tell=lambda line: typer.echo(line, err=True))
    if as_json:
        emit(report.to_json())
    else:
        for finding in report.findings:
            say(finding.line())
        say(f"next: {report.next}")
    if not report.passed:
        raise typer.Exit(1)


@operator_app.command(epilog="Next: p2pfl evaluate, p2pfl predict and p2pfl export, with the folder of peer.toml.")
def peer(
    config: ConfigFile = Path("peer.toml"),
    quiet: Annotated[bool, typer.Option("--quiet", help="Show nothing beside the log: for service managers.")] = False,
) -> None:
    """Run this member's peer until the federation's last round.

    Ctrl-C or SIGTERM leaves at the end of a round, a second one at once.
    """
    from p2pfl.node.federation import open_home
    from p2pfl.node.live import LiveView, following
    from p2pfl.node.peer import Peer
    from p2pfl.node.tracefile import TRACE_FILE, TraceReader

    home = open_home(config)
    prepared = Peer.prepare(home)
    if quiet:
        _leave(is_training=prepared.run())
        return
    charter = prepared.federation.charter
    console = Console(highlight=False)
    masked = charter.averaging.masks == "on"
    name, reader = home.config.name, TraceReader(home.run_path / TRACE_FILE, skip=True)
    with (
        LiveView([name], charter.rounds, console, str(home.run_path), masked=masked) as view,
        following(reader, name, view),
    ):
        is_training = prepared.run()
    say(f"the model is in {home.run_path / 'model.safetensors'}")
    say(f"next: p2pfl evaluate {home.path}")
    _leave(is_training=is_training)


def _leave(*, is_training: bool) -> None:
    """End the process, if a thread is still in torch's code: torch aborts it where the interpreter ends under that."""
    if is_training:
        sys.stdout.flush()
        os._exit(0)  # all that is to be kept is on disk
