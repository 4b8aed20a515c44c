"""The commands of the operator's handbook, taken out of its text, and four organisations that run them on loopback.

A fenced block says behind its language who runs it: `sh` is one member's, bank-a; `sh in-turn` is everybody's, one
after the other, and the charter's folder goes from each to the next and from the last to all, as by mail; `sh together`
is everybody's at the same time. All other blocks are output, other files, or what no test can do.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

MEMBERS = ("bank-a", "bank-b", "bank-c", "bank-d")
"""The organisations of the handbook; its commands are the first one's."""

WAYS = ("", "in-turn", "together")
"""Who runs a block: the first member; all, one after the other; all at once."""


@dataclass(frozen=True)
class Block:
    """A fenced block: `way` is what stands behind the language, `line` where it begins, from 1."""

    language: str
    way: str
    text: str
    line: int


def blocks_of(text: str) -> Iterator[Block]:
    """Give a page's fenced blocks in their order."""
    for found in re.finditer(r"^```(\S*) ?(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
        yield Block(found[1], found[2], found[3], text.count("\n", 0, found.start()) + 1)


def without_blocks(text: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", text, flags=re.MULTILINE)


def outline_of(text: str) -> list[int]:
    """Return the depth of each heading, in order."""
    return [len(found[1]) for found in re.finditer(r"^(#+) ", without_blocks(text), re.MULTILINE)]


@dataclass(frozen=True)
class Organisation:
    """One member's machine: a folder of its own, and ports that were free, for peers and for monitoring."""

    name: str
    folder: Path
    port: int
    watched: int

    def start(self, block: Block) -> subprocess.Popen[str]:
        """Start a block's commands; the first that fails ends it."""
        script = block.text.replace(MEMBERS[0], self.name)
        for address in (f"/dns4/peer.{self.name}.example/tcp/4001", "/ip4/0.0.0.0/tcp/4001"):
            script = script.replace(address, f"/ip4/127.0.0.1/tcp/{self.port}")
        script = script.replace("9464", str(self.watched))
        command = f'set -e; p2pfl() {{ "{sys.executable}" -m p2pfl.cli "$@"; }}\n{script}'
        return subprocess.Popen(
            ["/bin/bash", "-c", command],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


class Federation:
    """The organisations, and the mail between them."""

    def __init__(self, folder: Path) -> None:
        ports = _ports(2 * len(MEMBERS))
        self.members = [Organisation(name, folder / name, ports.pop(), ports.pop()) for name in MEMBERS]
        for member in self.members:
            member.folder.mkdir()

    def run(self, block: Block) -> dict[str, str]:
        """Run a block as it says, and return what each member's commands printed.

        Raises:
            AssertionError: a command failed.
        """
        if block.way == "together":
            return self._outputs(block, {member: member.start(block) for member in self.members})
        printed: dict[str, str] = {}
        before: Organisation | None = None
        for member in self.members[: None if block.way else 1]:
            if before is not None:
                _mail(before, member)
            printed |= self._outputs(block, {member: member.start(block)})
            before = member
        if before is not None and block.way:
            for member in self.members[:-1]:
                _mail(before, member)
        return printed

    def _outputs(self, block: Block, running: dict[Organisation, subprocess.Popen[str]]) -> dict[str, str]:
        printed = {}
        try:
            for member, process in running.items():
                printed[member.name] = process.communicate()[0]
        finally:
            for process in running.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        failed = {member.name: process.returncode for member, process in running.items() if process.returncode}
        assert not failed, f"line {block.line}: {failed}\n{block.text}\n{printed}"
        return printed


def _mail(sender: Organisation, receiver: Organisation) -> None:
    for folder in sender.folder.glob("federation*"):
        shutil.rmtree(receiver.folder / folder.name, ignore_errors=True)
        shutil.copytree(folder, receiver.folder / folder.name)


def _ports(count: int) -> list[int]:
    # All are open at once, so they differ.
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(server.getsockname()[1]) for server in servers]
    for server in servers:
        server.close()
    return ports
