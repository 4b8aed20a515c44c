"""Four banks set up a federation: the afternoon of four operators, as they would type it.

    python examples/four-banks/rehearsal.py [--run FOLDER] [--seed N] [--loopback]

Each bank has a folder that stands for its machine, and where the system allows it a network namespace of its own: its
only way to the others is a cable to a common bridge. Elsewhere all four listen on ports of this machine, and the first
line says so. Every command is printed behind the name of the bank that runs it, with what it answers; the script plays
the people: who mails a folder, edits a file, pulls a plug. It stops where a command ends otherwise than expected.

The tables are made up (`p2pfl.learning.credit`, nothing in them is anybody's): nine tenths of a bank's past customers
are of one kind of four, by age and income, and the rest of the others. Next year's applicants, on whom all models are
measured, are of all kinds at every bank, and each bank has its own. README.md has the figures.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tomlkit
import torch
from safetensors.numpy import load_file

from p2pfl.learning.baselines import Training, alone
from p2pfl.learning.credit import SEGMENTS, draw_credits
from p2pfl.learning.task import make_model, read_data
from p2pfl.learning.vector import flatten, load_model
from p2pfl.node.federation import open_federation, open_home

ROWS = {"bank-a": 1200, "bank-b": 800, "bank-c": 1600, "bank-d": 1000}
"""Past credits of each bank; guesses at small banks' books."""
APPLICANTS = 2000
"""Of next year, at each bank: so many that an AUC is known to about 0.01."""
OWN_KIND = 0.9
"""Of a bank's past customers."""
ROUNDS = 10
TERMS = {"training.local_steps": 200, "training.batch_size": 256, "task.table.hidden": [128]}
"""Ten rounds must do, so each has many steps; and enough work that one takes about half a second, while a peer that was
killed takes seconds to start. README.md says what comes of it."""
KILLED, STOPPED, KILLED_IN_ROUND = "bank-c", "bank-b", 2
PATIENCE = 300
"""Seconds that any command may take: many times what it does on two slow cores."""
WIDER = {
    "age": (18.0, 100.0), "income": (0.0, 500_000.0), "amount": (0.0, 200_000.0), "months": (1.0, 120.0),
    "late_payments": (0.0, 50.0),
}  # fmt: skip
"""What any bank's customers may have, as the four agree on the telephone."""


@dataclass(frozen=True)
class Bank:
    """An organisation: its folder, where it is reached, and what puts a command into its network.

    Attributes:
        inside: the words before a command; none where all share this machine's network.
        listen: what `p2pfl init` is told of addresses, beside `announce`.
        running: what was started and has not been waited for; ended with the script.
    """

    name: str
    folder: Path
    inside: tuple[str, ...]
    listen: tuple[str, ...]
    announce: str
    running: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """Where its peer keeps trace and model."""
        return self.folder / self.name / "run"

    def start(self, *words: str, log: str | None = None) -> subprocess.Popen[str]:
        """Type a command, and do not wait for its end; its words go to a file, or are kept for `answer`."""
        print(f"{self.name}$ {shlex.join(words)}" + (f" >> {log} 2>&1 &" if log else ""), flush=True)
        program = (str(Path(sys.executable).with_name("p2pfl")), *words[1:])
        with ExitStack() as files:
            output = files.enter_context((self.folder / log).open("a")) if log else subprocess.PIPE
            process = subprocess.Popen(
                (*self.inside, *program), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip
        self.running.append(process)
        return process

    def answer(self, process: subprocess.Popen[str], code: int = 0, *, show: bool = True) -> str:
        """Wait for a command, print what it says, and return that.

        Raises:
            SystemExit: it ended with another code.
        """
        text = process.communicate(timeout=PATIENCE)[0] or ""
        self.running.remove(process)
        if show or process.returncode != code:
            print("".join(f"    {line}\n" for line in text.splitlines()), end="", flush=True)
        if process.returncode != code:
            raise SystemExit(f"{self.name}: ended with {process.returncode}, not {code}: {shlex.join(process.args)}")
        return text

    def types(self, *words: str, code: int = 0) -> str:
        """Type a command, and wait for its end; see `answer`."""
        return self.answer(self.start(*words), code)

    def mails(self, folder: str, *others: "Bank") -> None:
        """Send a folder to others, who put it in place of what they had under that name."""
        print(f"{self.name} mails {folder}/ to {', '.join(other.name for other in others)}")
        for other in others:
            shutil.rmtree(other.folder / folder, ignore_errors=True)
            shutil.copytree(self.folder / folder, other.folder / folder)

    def copies(self, folder: str, kept: str) -> None:
        """Keep a copy of a folder as it is now."""
        print(f"{self.name}$ cp -r {folder} {kept}")
        shutil.copytree(self.folder / folder, self.folder / kept)

    def edits(self, file: str, changes: Mapping[str, Any]) -> None:
        """Change settings in a file, as with an editor."""
        print(f"{self.name} edits {file}:")
        document = tomlkit.parse((self.folder / file).read_text())
        for key, value in changes.items():
            *tables, last = key.split(".")
            table: Any = document
            for name in tables:
                table = table[name]
            print(f"    {key} = {value}" + (f"    # was {table[last]}" if last in table else ""))
            table[last] = value
        (self.folder / file).write_text(tomlkit.dumps(document))


def together(commands: Sequence[tuple[Bank, Sequence[str]]], shown: Sequence[str] = tuple(ROWS)) -> list[str]:
    """Have banks run commands of p2pfl at the same time, and print what those in `shown` answer; return all answers."""
    started = [(bank, bank.start("p2pfl", *words)) for bank, words in commands]
    texts = []
    for bank, process in started:
        if bank.name in shown:
            print(f"{bank.name}:")
        texts.append(bank.answer(process, show=bank.name in shown))
    return texts


# The network


def own_network() -> list[str]:
    """Return the words that put a command into a network of its own, in which others can be made; none if none do."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return []
    probe = "ip link add name probe type bridge && ip link add name one type veth peer name two"
    for words in (["unshare", "--net"], ["unshare", "--user", "--map-root-user", "--net"]):
        if not subprocess.run([*words, "sh", "-c", probe], capture_output=True, check=False).returncode:
            return words
    return []


@contextmanager
def namespaces(run: Path) -> Iterator[list[Bank]]:
    """Give each bank a namespace and a cable to a bridge in this one; they go when this process does."""
    with ExitStack() as stack:
        system("ip", "link", "set", "lo", "up")
        system("ip", "link", "add", "name", "internet", "type", "bridge")
        system("ip", "link", "set", "internet", "up")
        banks = []
        for number, name in enumerate(ROWS, 1):
            # A namespace lasts as long as a process in it: this one until its stdin ends, as it does with ours.
            holder = stack.enter_context(
                subprocess.Popen(
                    ["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
                )
            )
            assert holder.stdout is not None  # noqa: S101 - it is a pipe
            holder.stdout.readline()
            pid, address = str(holder.pid), f"192.0.2.{number}"  # of RFC 5737, for documentation
            system("ip", "link", "add", "name", name, "type", "veth", "peer", "name", "eth0", "netns", pid)
            system("ip", "link", "set", name, "master", "internet", "up")
            inside = ("nsenter", "--target", pid, "--net", "--")
            system(*inside, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            system(*inside, "ip", "link", "set", "eth0", "up")
            system(*inside, "ip", "link", "set", "lo", "up")
            banks.append(Bank(name, run / name, inside, (), f"/ip4/{address}/tcp/4001"))
        yield banks


@contextmanager
def loopback(run: Path) -> Iterator[list[Bank]]:
    """Give each bank a port of this machine that is free now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in ROWS]
        addresses = [f"/ip4/127.0.0.1/tcp/{each.getsockname()[1]}" for each in sockets]
    named = zip(ROWS, addresses, strict=True)
    yield [Bank(name, run / name, (), ("--listen", address), address) for name, address in named]


def system(*command: str) -> None:
    """Run a command of the system that is to succeed."""
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


# The afternoon


def make_tables(banks: Sequence[Bank], seed: int) -> None:
    """Write each bank's past credits, and next year's applicants."""
    random = np.random.RandomState(seed)
    for kind, bank in enumerate(banks):
        shares = np.full(SEGMENTS, (1 - OWN_KIND) / (SEGMENTS - 1))
        shares[kind] = OWN_KIND
        past = draw_credits(random.choice(SEGMENTS, ROWS[bank.name], p=shares).astype(np.int64), random)
        coming = draw_credits(random.randint(SEGMENTS, size=APPLICANTS).astype(np.int64), random)
        past.to_csv(bank.folder / "credits.csv", index=False)
        coming.to_csv(bank.folder / "next-year.csv", index=False)
        bad = (past["default"] == "yes").mean()
        print(f"{bank.name} has credits.csv: {len(past)} rows, mean age {past.age.mean():.0f}, {bad:.0%} defaulted")


def set_up(banks: Sequence[Bank]) -> None:
    """Make keys, settings, and a draft whose columns fit everybody's table."""
    first, last = banks[0], banks[-1]
    together([(bank, ("init", bank.name, *bank.listen, "--announce", bank.announce)) for bank in banks])
    for bank in banks:
        bank.edits(f"{bank.name}/peer.toml", {"data.path": "../credits.csv", "data.test_path": "../next-year.csv"})
    chapter("A draft, from one bank's table")
    words = ("--task", "tabular", "--data", "credits.csv", "--target", "default", "--rounds", str(ROUNDS))
    first.types("p2pfl", "charter", "new", "federation", "--name", "four-banks", *words)
    first.mails("federation", *banks[1:])
    print(f"{last.name} has older and richer customers than {first.name}, and its table does not fit:")
    last.types("p2pfl", "data", "check", "federation/charter.toml", "credits.csv", code=2)
    print("they telephone, and agree on what any bank's customers may have:")
    columns = tomlkit.parse((first.folder / "federation/charter.toml").read_text()).unwrap()["task"]["table"]["columns"]
    ranges = {
        f"task.table.columns.{name}.{end}": value
        for name, both in WIDER.items()
        for end, value in zip(("low", "high"), both, strict=True)
        if columns[name][end] != value
    }
    first.edits("federation/charter.toml", {**TERMS, **ranges})
    first.types("p2pfl", "charter", "model", "federation/charter.toml")
    first.mails("federation", last)
    last.types("p2pfl", "data", "check", "federation/charter.toml", "credits.csv")


def agree(banks: Sequence[Bank]) -> None:
    """Pass the draft around twice: all join, then all sign."""
    first, last = banks[0], banks[-1]
    chapter("The draft goes around: all join")
    for bank, following in zip(banks, [*banks[1:], None], strict=True):
        bank.types("p2pfl", "charter", "join", "federation/charter.toml", "--config", bank.name)
        bank.mails("federation", *([following] if following else banks[:-1]))
    print(f"{first.name}'s doctor, before anybody has signed, and with nobody there:")
    first.types("p2pfl", "doctor", first.name, code=1)

    chapter("It goes around again: all sign")
    first.types("p2pfl", "charter", "show", "federation/charter.toml")
    for bank, following in zip(banks, [*banks[1:], None], strict=True):
        bank.types("p2pfl", "charter", "sign", "federation/charter.toml", "--config", bank.name)
        if bank is first:
            first.copies("federation", "signed-by-us")
        bank.mails("federation", *([following] if following else banks[:-1]))
    print(f"is it still what {first.name} signed?")
    first.types("p2pfl", "charter", "diff", "signed-by-us/charter.toml", "federation/charter.toml")
    last.types("p2pfl", "charter", "check", "federation/charter.toml")
    print(f"{last.name}'s security officer tries what becomes of a charter that somebody changes now:")
    last.copies("federation", "forged")
    last.edits("forged/charter.toml", {"averaging.masks": "off"})
    last.types("p2pfl", "charter", "check", "forged/charter.toml", code=2)


def train(banks: Sequence[Bank]) -> None:
    """Run all peers to the end; one is killed in the middle of a round, another stopped, and both started again."""
    first, names = banks[0], {bank.name: bank for bank in banks}
    killed, stopped = names[KILLED], names[STOPPED]
    chapter("The peers")
    peers = {bank.name: bank.start("p2pfl", "peer", "--config", bank.name, log="peer.log") for bank in banks}
    wait_until(killed, peers[KILLED], lambda line: line["event"] == "state" and line["state"] == "averaging")
    print(f"{KILLED} loses its power in the middle of a round: kill -9 {peers[KILLED].pid}")
    peers[KILLED].send_signal(signal.SIGKILL)
    killed.answer(peers[KILLED], code=-signal.SIGKILL)
    wait_until(stopped, peers[STOPPED], lambda line: line["event"] == "round")
    print(f"{STOPPED} changes a disk, and asks its peer to leave at the round's end: kill -TERM {peers[STOPPED].pid}")
    peers[STOPPED].send_signal(signal.SIGTERM)
    stopped.answer(peers[STOPPED])
    print("two of four are too few for a sum that hides anything, so they wait:")
    first.types("p2pfl", "status", first.name)
    for bank in (killed, stopped):
        peers[bank.name] = bank.start("p2pfl", "peer", "--config", bank.name, log="peer.log")
    for bank in banks:
        bank.answer(peers[bank.name])
        last = (bank.folder / "peer.log").read_text().splitlines()[-3:]
        print(f"{bank.name}$ tail -3 peer.log", *(f"    {line}" for line in last), sep="\n")


def wait_until(bank: Bank, peer: subprocess.Popen[str], seen: Callable[[dict[str, Any]], bool]) -> None:
    """Wait until a bank's peer has a line in its trace about the round of the crash, or a later one.

    Raises:
        SystemExit: it ended before.
    """
    trace, until = bank.run / "trace.jsonl", time.monotonic() + PATIENCE
    while peer.poll() is None and time.monotonic() < until:
        lines = trace.read_text().splitlines() if trace.exists() else []
        events = [json.loads(line) for line in lines if line.endswith("}")]  # not one that is being written
        if any(event.get("round", 0) >= KILLED_IN_ROUND and seen(event) for event in events):
            return
        time.sleep(0.01)
    raise SystemExit(f"{bank.name}: its peer never came to round {KILLED_IN_ROUND}; see {bank.folder / 'peer.log'}")


def measure(banks: Sequence[Bank]) -> dict[str, dict[str, float]]:
    """Take the model home, and measure it on each bank's applicants beside what the bank can do alone."""
    killed = next(bank for bank in banks if bank.name == KILLED)
    killed.types("p2pfl", "status", KILLED)
    together([(bank, ("export", bank.name, "model.safetensors")) for bank in banks], shown=[KILLED])
    texts = together([(bank, ("evaluate", bank.name)) for bank in banks], shown=[KILLED])
    found = {}
    for bank, text in zip(banks, texts, strict=True):
        together_auc, together_ks = map(float, re.findall(r"(?:AUC|KS) (\d\.\d+)", text))
        own = train_alone(bank)
        found[bank.name] = {
            "auc_alone": own["auc"], "auc_together": together_auc, "ks_alone": own["ks"], "ks_together": together_ks,
        }  # fmt: skip
    return found


def train_alone(bank: Bank) -> dict[str, float]:
    """Train on this bank's table only, under the charter's terms and from its initial model; return what that gives."""
    home = open_home(bank.folder / bank.name)
    federation = open_federation(home.charter_path)
    charter, task = federation.charter, federation.task.task
    model = make_model(task)
    load_model(federation.model_path, model)
    terms = charter.training
    training = Training(terms.local_steps, terms.batch_size, terms.clip_norm, home.config.seed)
    torch.set_num_threads(1)
    return alone(task, read_data(task, home.data), flatten(model), charter.rounds, training)[-1]


def farthest(banks: Sequence[Bank]) -> float:
    """Return the largest difference between any parameter of any two banks' exported models."""
    models = [load_file(bank.folder / "model.safetensors") for bank in banks]
    return max(float(np.ptp(np.stack([model[key] for model in models]), axis=0).max()) for key in models[0])


def chapter(title: str) -> None:
    """Print what comes now."""
    print(f"\n{title}\n", flush=True)


def afternoon(banks: Sequence[Bank], run: Path, seed: int) -> None:
    """Go from nothing to ten masked rounds, and see what they were worth."""
    chapter("Four tables")
    for bank in banks:
        bank.folder.mkdir(parents=True)
    make_tables(banks, seed)
    chapter("Four keys")
    set_up(banks)
    agree(banks)
    chapter("All four doctors at once")
    together([(bank, ("doctor", bank.name, "--wait", str(PATIENCE))) for bank in banks], shown=[banks[0].name])
    train(banks)
    chapter("What it was worth")
    found = measure(banks)
    chapter("A claim that the security officer checks: what is on the wire")
    banks[0].types("p2pfl", "verify-wire", "--rounds", "2", "--run", "wire")
    chapter("On next year's applicants, each bank alone and together with the others")
    print("bank      rows  AUC alone  together    gain  KS alone  together    gain")
    for name, of in found.items():
        auc, ks = (of[f"{figure}_together"] - of[f"{figure}_alone"] for figure in ("auc", "ks"))
        print(
            f"{name:<8} {ROWS[name]:>5}  {of['auc_alone']:>9.3f} {of['auc_together']:>9.3f}  {auc:>+6.3f}"
            f" {of['ks_alone']:>9.3f} {of['ks_together']:>9.3f}  {ks:>+6.3f}"
        )
    apart = farthest(banks)
    print(f"\nthe four models differ by {apart:g} at most; all is in {run}")
    (run / "report.json").write_text(json.dumps({"banks": found, "apart": apart}, indent=1))


def main() -> None:
    """Read the arguments, make the network, and end what is left of it afterwards."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs") / time.strftime("four-banks-%Y%m%d-%H%M%S"))
    parser.add_argument("--seed", type=int, default=0, help="draws the tables")
    parser.add_argument("--loopback", action="store_true", help="make no network namespaces")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what runs is ended
    if given.run.exists():
        parser.error(f"{given.run} exists already; name another folder")
    words = [] if given.loopback or given.inside else own_network()
    if words:
        command = [*words, sys.executable, __file__, "--inside", "--run", str(given.run), "--seed", str(given.seed)]
        os.execvp(command[0], command)  # noqa: S606 - the same program, in another network
    print(
        "each bank is in a network of its own, with a cable to the others"
        if given.inside
        else "all banks are on this machine's loopback interface"
        + ("" if given.loopback else ": networks of their own take unshare, nsenter, ip, and the right to use them")
    )
    with (namespaces if given.inside else loopback)(given.run.resolve()) as banks:
        try:
            afternoon(banks, given.run, given.seed)
        finally:
            left = [process for bank in banks for process in bank.running]
            for process in left:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
