"""Peers on machines of their own, as far as they can tell: each in a network namespace, with a long and lossy cable.

Run as a process of its own (`python -m tests.network.lab RUN`): it makes its namespaces without a name, in itself and
its children, so the system removes all of them with the last process, however that ends. Nothing outside is touched.

Two ways to lay the cables. `netem`: a bridge, a veth pair for each peer, and `tc netem`. `tun`: where the kernel has no
netem, a TUN device for each peer, and a switch in this process that delays, drops and paces packets itself.

Commands come on stdin, one a line, and each is answered with a line: `kill N`, `start N`, `cut N`, `mend N`. When stdin
ends, everything does.
"""

import array
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Protocol

DELAY, LOSS, RATE = 0.05, 0.02, 20_000_000
"""One way in seconds, of all packets, bits a second."""
PEERS = 8
_CLONE_NEWNET, _CLONE_NEWUSER = 0x40000000, 0x10000000
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PR_SET_PDEATHSIG = 1
_MTU = 1500


def address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def enter_namespace() -> None:
    """Put this process into a network of its own; without privileges, where the system allows that.

    Raises:
        OSError: it does not.
    """
    uid, gid = os.getuid(), os.getgid()
    try:
        _unshare(_CLONE_NEWNET)
    except PermissionError:
        _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")


def _unshare(flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def run(*command: str) -> None:
    """Run a command that is to succeed.

    Raises:
        OSError: it does not; the message is the command's own.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")


def remove_link(name: str) -> None:
    """Remove a device of this namespace, if there is one of that name."""
    with suppress(OSError):
        run("ip", "link", "del", name)


def has_netem() -> bool:
    """Whether this namespace, with nothing in it, can delay packets."""
    try:
        run("ip", "link", "add", "probe", "type", "veth", "peer", "name", "other")
        run("tc", "qdisc", "add", "dev", "probe", "root", "netem", "delay", "1ms")
    except OSError:
        return False
    finally:
        remove_link("probe")
    return True


def missing() -> str:
    """Say why no such network can be made here; nothing if it can. In a process of its own: it enters a namespace."""
    if not sys.platform.startswith("linux"):
        return "network namespaces are Linux's"
    absent = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if absent:
        return f"there is no {' and no '.join(absent)}; they come with iproute2"
    try:
        enter_namespace()
        run("ip", "link", "set", "lo", "up")
        if not has_netem():
            os.close(open_tun())
    except OSError as error:
        return f"no network of its own can be made here: {error}"
    return ""


def open_tun() -> int:
    """Make the device `eth0` of this namespace, whose packets are read and written here."""
    tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"eth0", _IFF_TUN | _IFF_NO_PI))
    return tun


class Cables(Protocol):
    """How peers are joined."""

    def plug(self, number: int, pid: int, told: socket.socket) -> None:
        """Join a peer's new namespace to the others."""

    def cut(self, number: int) -> None:
        """Let nothing pass either way, and tell nobody."""

    def mend(self, number: int) -> None:
        """Let everything pass again."""

    def files(self) -> list[int]:
        """Return what is to be read from."""

    def carry(self, ready: list[int]) -> float | None:
        """Carry what came and what is due; return the seconds until there is more to do."""


class Netem:
    """A bridge in this namespace; the kernel does all of it."""

    def __init__(self) -> None:
        run("ip", "link", "add", "bridge", "type", "bridge")
        run("ip", "link", "set", "bridge", "up")

    def plug(self, number: int, pid: int, told: socket.socket) -> None:
        end, mac = f"peer{number}", f"02:00:00:00:00:{number + 1:02x}"
        remove_link(end)  # of a life before, if it is not gone yet
        # The same MAC in each life: the others remember it.
        run("ip", "link", "add", end, "type", "veth", "peer", "name", "eth0", "address", mac, "netns", str(pid))
        run("ip", "link", "set", end, "master", "bridge", "up")
        told.send(b"!")

    def cut(self, number: int) -> None:
        run("ip", "link", "set", f"peer{number}", "down")

    def mend(self, number: int) -> None:
        run("ip", "link", "set", f"peer{number}", "up")

    def files(self) -> list[int]:
        return []

    def carry(self, ready: list[int]) -> float | None:
        return None


@dataclass
class Switch:
    """Carries packets between TUN devices, late, slowly and not all of them."""

    tuns: dict[int, int] = field(default_factory=dict)
    is_cut: set[int] = field(default_factory=set)
    free_at: dict[int, float] = field(default_factory=dict)
    under_way: list[tuple[float, int, int, bytes]] = field(default_factory=list)
    chance: random.Random = field(default_factory=lambda: random.Random(0))  # noqa: S311 - drops packets, nothing secret
    count: int = 0

    def plug(self, number: int, pid: int, told: socket.socket) -> None:
        _, (message,), _, _ = told.recvmsg(1, socket.CMSG_SPACE(4))
        if number in self.tuns:
            os.close(self.tuns[number])
        self.tuns[number] = array.array("i", message[2])[0]

    def cut(self, number: int) -> None:
        self.is_cut.add(number)

    def mend(self, number: int) -> None:
        self.is_cut.discard(number)

    def files(self) -> list[int]:
        return list(self.tuns.values())

    def carry(self, ready: list[int]) -> float | None:
        now = time.monotonic()
        for number, tun in self.tuns.items():
            if tun in ready:
                self._take(number, tun, now)
        while self.under_way and self.under_way[0][0] <= now:
            _, _, target, packet = heapq.heappop(self.under_way)
            if target in self.tuns and target not in self.is_cut:
                try:
                    os.write(self.tuns[target], packet)
                except OSError:
                    continue  # its process is gone, and the device with it
        return max(0.0, self.under_way[0][0] - now) if self.under_way else None

    def _take(self, number: int, tun: int, now: float) -> None:
        for _ in range(64):
            try:
                packet = os.read(tun, 2 * _MTU)
            except OSError:
                return  # nothing more; or its process is gone
            if number in self.is_cut or self.chance.random() < LOSS or packet[0] >> 4 != 4:
                continue
            sent = max(now, self.free_at.get(number, 0.0)) + 8 * len(packet) / RATE
            self.free_at[number] = sent
            self.count += 1
            heapq.heappush(self.under_way, (sent + DELAY, self.count, packet[19] - 1, packet))


def live(number: int, home: str, kind: str, tell: socket.socket) -> None:
    """Run a peer in a namespace of its own; the body of a child process."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _unshare(_CLONE_NEWNET)
    run("ip", "link", "set", "lo", "up")
    if kind == "tun":
        tun = open_tun()
        tell.sendmsg([b"!"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [tun]))])
    else:
        tell.send(b"!")
        tell.recv(1)
        run("tc", "qdisc", "add", "dev", "eth0", "root", "netem", "delay", f"{1000 * DELAY:.0f}ms",
            "loss", f"{100 * LOSS:.0f}%", "rate", str(RATE))  # fmt: skip
    run("ip", "address", "add", f"{address(number)}/24", "dev", "eth0")
    run("ip", "link", "set", "eth0", "up")
    from multiprocessing import Pipe

    from p2pfl.node.launcher import run_process

    _, told = Pipe(duplex=False)
    run_process(home, False, told)


class Lab:
    """The peers' processes, and the cables between them."""

    def __init__(self, homes: list[str], kind: str) -> None:
        self._homes = homes
        self._kind = kind
        self._pids: dict[int, int] = {}
        self._cables: Cables = Netem() if kind == "netem" else Switch()

    def start(self, number: int) -> None:
        ours, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            ours.close()
            code = 1
            try:
                live(number, self._homes[number], self._kind, theirs)
                code = 0
            except SystemExit as error:
                code = int(error.code or 0)
            except BaseException as error:  # noqa: BLE001 - a child must not go on as if it were its parent
                sys.stderr.write(f"peer {number}: {error!r}\n")
            finally:
                os._exit(code)
        theirs.close()
        with ours:
            if self._kind == "netem":
                ours.recv(1)
            self._cables.plug(number, pid, ours)
        self._pids[number] = pid

    def kill(self, number: int) -> None:
        pid = self._pids.pop(number)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)

    def serve(self) -> None:
        """Obey until stdin ends."""
        commands: dict[str, Callable[[int], None]] = {
            "start": self.start, "kill": self.kill, "cut": self._cables.cut, "mend": self._cables.mend,
        }  # fmt: skip
        pause: float | None = None
        while True:
            ready, _, _ = select.select([0, *self._cables.files()], [], [], pause)
            pause = self._cables.carry(ready)
            if 0 in ready:
                line = os.read(0, 64).decode()
                if not line:
                    return
                name, number = line.split()
                commands[name](int(number))
                os.write(1, f"{line.strip()} done\n".encode())

    def end(self) -> None:
        for number in list(self._pids):
            self.kill(number)


def main(homes: list[str]) -> None:
    enter_namespace()
    run("ip", "link", "set", "lo", "up")
    kind = "netem" if has_netem() else "tun"
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    from p2pfl.node.launcher import PRELOADED

    for name in PRELOADED:
        import_module(name)
    lab = Lab(homes, kind)
    try:
        for number in range(len(homes)):
            lab.start(number)
        os.write(1, f"cables: {kind}\n".encode())
        lab.serve()
    finally:
        lab.end()


if __name__ == "__main__":
    if sys.argv[1:] == ["--missing"]:
        sys.stdout.write(missing())
    else:
        main(sys.argv[1:])
