"""`p2pfl charter`: draw up, join, sign, show, compare and check what all members agree on before round 0."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from p2pfl.commands.say import AsJson, CharterFile, ConfigFile, emit, say
from p2pfl.core.errors import InvalidConfig

if TYPE_CHECKING:
    from p2pfl.core.charter import Charter

charter_app = typer.Typer(
    help="Draw up, join, sign, show, compare and check a charter: what all members agree on before round 0.",
    no_args_is_help=True,
)

_IN_FORCE = "every member runs p2pfl doctor FOLDER, then p2pfl peer --config FOLDER"


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
    say(f"{path}: a draft of {charter.name}: {task}, {charter.model.parameters} parameters, no members yet")
    if drafted is not None:
        for line in drafted.review:
            say(f"- {line}")
        say("ranges are rounded outwards and rare values left out, but what is there comes from your file: review it,")
        say("widen it to what any member may have, and run p2pfl charter model after changing columns")
    say("edit its terms now: nobody can change them once members have signed")
    say(f"next: every member runs p2pfl charter join {path} --config THEIR-FOLDER, and passes the folder on")


@charter_app.command("from", epilog="Next: p2pfl charter show, then every member runs p2pfl charter join.")
def charter_from(
    scenario: Annotated[str, typer.Argument(metavar="SCENARIO", help="A file, or a name: p2pfl scenario list.")],
    folder: Annotated[Path, typer.Argument(help="Where charter.toml and initial.safetensors are put.")],
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. training.rounds=100. Repeatable."),
    ] = None,
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
    say(f"{path}: a draft of {charter.name}: {charter.task.source}, {charter.model.parameters} parameters, no members")
    for line in left_out:
        say(f"- left out: {line}")
    say("edit its terms now: nobody can change them once members have signed")
    say(f"next: p2pfl charter show {path}; then every member runs p2pfl charter join {path} --config THEIR-FOLDER")


@charter_app.command("next", epilog="Next: p2pfl charter show, then every member runs p2pfl charter join, and sign.")
def charter_next(
    folder: Annotated[Path, typer.Argument(help="Where the next charter.toml and its initial model are put.")],
    config: ConfigFile = Path("peer.toml"),
    without: Annotated[list[str] | None, typer.Option(help="A member that leaves. Repeatable.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of the next version, if others.")] = None,
) -> None:
    """Draw up the charter's next version, which goes on from the model that this member has ended with.

    Terms and members are those of the version before, unsigned: edit them. New members join, and all others join again.
    """
    from p2pfl.node.federation import (
        CHARTER_FILE,
        complete_draft,
        next_version,
        open_federation,
        open_home,
        save_charter,
    )
    from p2pfl.simulation.outcome import export_run

    path, home = folder / CHARTER_FILE, open_home(config)
    if path.exists():
        raise InvalidConfig(f"{path}: exists already; name another folder")
    known = open_federation(home.charter_path)
    draft = next_version(known.charter, without or (), rounds)
    folder.mkdir(parents=True, exist_ok=True)
    _, agreed = export_run(home.path, folder / draft.model.file, None)
    save_charter(path, complete_draft(folder, draft, known.task))
    say(f"{path}: a draft of {draft.name}, version {draft.version}, which begins with this member's model")
    if not agreed:
        say("the peers did not average down to the charter's tolerance: other members' models differ from this one")
    if draft.privacy is not None:
        say("its budget of privacy is a new one: what the version before has spent of the same data adds to it")
    say("edit its terms now: nobody can change them once members have signed")
    say(f"next: every member, also those of before, runs p2pfl charter join {path} --config THEIR-FOLDER, and signs;")
    say(f'      and sets run = "run-{draft.version}" in its peer.toml, a folder for the new charter')


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
    say(f"{charter.parent / drawn.model.file}: {drawn.model.parameters} parameters")
    if draft.signatures and not drawn.signatures:
        say(f"the signatures of {', '.join(draft.signatures)} were for the draft as it was; they must sign again")
    say(f"next: every member runs p2pfl charter join {charter} --config THEIR-FOLDER, and then p2pfl charter sign")


@charter_app.command("join", epilog="Next, when all have joined: every member runs p2pfl charter sign.")
def charter_join(
    charter: CharterFile = Path("charter.toml"),
    config: ConfigFile = Path("peer.toml"),
    as_json: AsJson = False,
) -> None:
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
    moved = remember_charter(home, charter)
    made_key = home.sm2_key_path.exists() and not had_key
    void = sorted(draft.signatures) if not joined.signatures else []
    following = f"when all have joined, every member runs p2pfl charter sign {charter} --config THEIR-FOLDER"
    if as_json:
        emit(
            {
                **_named(charter, joined),
                "member": member.name,
                "members": joined.names(),
                "void_signatures": void,
                "remembered": moved,
                "made_sm2_key": made_key,
                "next": following,
            }
        )
        return
    if moved:
        say(f"{home.path / home.file}: charter is now {charter}")
    if made_key:
        say(f"{home.sm2_key_path}: made this member's SM2 key, for its signatures; back it up with the identity's")
    say(f"{charter}: {member.name} has joined; members: {', '.join(known.name for known in joined.members)}")
    if void:
        say(f"the signatures of {', '.join(void)} were for the draft as it was; they must sign again")
    say(f"next: {following}")


@charter_app.command("sign", epilog="Next, when all have signed: every member runs p2pfl doctor and p2pfl peer.")
def charter_sign(
    charter: CharterFile = Path("charter.toml"),
    config: ConfigFile = Path("peer.toml"),
    as_json: AsJson = False,
) -> None:
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
    moved = remember_charter(home, charter)
    faults = charter_faults(signed)
    following = "pass the folder on to them"
    if not faults:
        following = (
            f"everyone takes a copy of {charter.parent or '.'}, and runs p2pfl doctor THEIR-FOLDER, "
            "then p2pfl peer --config THEIR-FOLDER"
        )
    if as_json:
        emit(
            {
                **_named(charter, signed),
                "member": home.config.name,
                "in_force": not faults,
                "faults": faults,
                "remembered": moved,
                "next": following,
            }
        )
        return
    if moved:
        say(f"{home.path / home.file}: charter is now {charter}")
    say(f"{charter}: {home.config.name} has signed {signed.hash().hex()[:16]}")
    if faults:
        say(f"missing: {'; '.join(faults)}")
    else:
        say(f"all {len(signed.members)} members have signed: the charter is in force")
    say(f"next: {following}")


@charter_app.command("show", epilog="Next: p2pfl charter sign, if you agree; p2pfl charter check, to see who has.")
def charter_show(charter: CharterFile = Path("charter.toml"), as_json: AsJson = False) -> None:
    """Print what a charter says, in words."""
    from p2pfl.node.federation import load_charter
    from p2pfl.node.status import charter_status
    from p2pfl.simulation.charter_text import describe_charter

    known = load_charter(charter)
    stands = charter_status(charter, known)
    following = f"p2pfl charter sign {charter}, if you agree; p2pfl charter check {charter} says what is missing"
    if stands.in_force:
        following = _IN_FORCE
    if as_json:
        signed = {"signed": stands.signed, "unsigned": stands.unsigned}
        faults = {"in_force": stands.in_force, "faults": stands.faults}
        emit({**_named(charter, known), **faults, **signed, "terms": known.terms(), "next": following})
        return
    for line in describe_charter(known):
        say(line)
    say(f"next: {following}")


@charter_app.command("diff", epilog="Next: agree on one of them; every member joins and signs that one.")
def charter_diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A charter's file, such as what you signed.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another, such as what you were sent.")],
    as_json: AsJson = False,
) -> None:
    """Say what differs from A to B: terms, members, and who signed which. Exit code 1 if terms or members differ."""
    from p2pfl.crypto.charter_diff import compare
    from p2pfl.crypto.identity import member_faults
    from p2pfl.node.federation import load_charter

    known = load_charter(second)
    found = compare(load_charter(first), known)
    if not found.is_same:
        following = "agree on one of them; every member joins and signs that one"
    elif member_faults(known):
        following = f"who has not signed {second} signs it too: p2pfl charter sign {second} --config FOLDER"
    else:
        following = f"p2pfl charter check {second}"
    if as_json:
        emit({"first": str(first), "second": str(second), **found.to_json(), "next": following})
    else:
        for line in found.lines():
            say(line)
        short = [digest[:16] for digest in found.hashes]
        say(f"the same terms: {short[0]}" if found.is_same else f"other terms: {short[0]} -> {short[1]}")
        say(f"next: {following}")
    if not found.is_same:
        raise typer.Exit(1)


@charter_app.command("check", epilog="Next, when nothing is missing: every member runs p2pfl doctor and p2pfl peer.")
def charter_check(charter: CharterFile = Path("charter.toml"), as_json: AsJson = False) -> None:
    """Check signatures, task file and initial model; name who or what is missing or wrong (exit code 2)."""
    from p2pfl.crypto.identity import charter_faults
    from p2pfl.node.federation import load_charter, terms_faults
    from p2pfl.node.live import UNMASKED
    from p2pfl.simulation.charter_text import describe_sums
    from p2pfl.simulation.privacy_text import describe_noise

    known = load_charter(charter)
    faults = [*terms_faults(charter, known), *charter_faults(known)]
    following = "whoever is named mends that: p2pfl charter join, p2pfl charter sign" if faults else _IN_FORCE
    if as_json:
        emit({**_named(charter, known), "in_force": not faults, "faults": faults, "next": following})
    else:
        for fault in faults:
            say(f"- {fault}")
    if faults:
        raise InvalidConfig(
            f"{charter}: not in force: {len(faults)} thing{'s' if len(faults) > 1 else ''} missing or wrong"
        )
    if as_json:
        return
    if known.averaging.masks == "off":
        say(UNMASKED)
    for line in describe_sums(known) if known.averaging.masks == "on" else ():
        say(line)
    for line in describe_noise(known):
        say(line)
    say(f"{charter}: in force: {known.name}, {len(known.members)} members, {known.hash().hex()[:16]}")
    say(f"next: {following}")


def _named(path: Path, charter: "Charter") -> dict[str, object]:
    """Return what every command about a charter says of it."""
    digest = charter.hash().hex()
    return {"charter": str(path), "federation": charter.name, "version": charter.version, "hash": digest}
