"""TCP gates: each peer of a run listens behind one, so that it can be cut off and connected again without privileges.

A gate carries bytes and knows nothing of what they say. Who is cut off loses the connections through its own gate, and
those that it made through the others', and gets no new ones. Whose connection that is, the system tells by the
process's sockets; where it does not (no /proc), only connections through the peer's own gate are cut.
"""

import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import trio

from p2pfl.core.errors import P2pflError, TransportError
from p2pfl.node.proxy import Link, Proxy, Route

_SOCKETS = Path("/proc/net/tcp")
_START_SECONDS = 30.0


class Gates:
    """The gates of a run, in a thread; a context manager.

    Args:
        routes: by the peer's name, where its gate listens and where the peer does.
        link: what every connection goes through.

    Raises:
        P2pflError: on entering, a gate cannot listen.
    """

    def __init__(self, routes: Mapping[str, Route], link: Link) -> None:
        self._routes = routes
        self._link = link
        self._cut: dict[str, int | None] = {}
        self._gates: dict[str, _Gate] = {}
        self._open = threading.Event()
        self._error: P2pflError | None = None
        self._token: trio.lowlevel.TrioToken | None = None
        self._ended: trio.Event
        self._thread = threading.Thread(target=trio.run, args=(self._serve,), name="gates", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._open.wait(_START_SECONDS):
            raise TransportError("the gates do not listen")
        if self._error is not None:
            raise self._error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._ended.set)
        self._thread.join()

    async def _serve(self) -> None:
        self._ended = trio.Event()
        async with trio.open_nursery() as nursery:
            try:
                for name, route in self._routes.items():
                    self._gates[name] = _Gate(route, self._link, self)
                    await nursery.start(self._gates[name].serve)
            except P2pflError as error:
                self._error = error
            else:
                self._token = trio.lowlevel.current_trio_token()
            self._open.set()
            if self._error is None:
                await self._ended.wait()
            nursery.cancel_scope.cancel()

    def cut(self, name: str, pid: int | None) -> None:
        """Cut a peer off: break its connections, and let none be made until it is connected again.

        Args:
            name: the peer.
            pid: its process.
        """
        self._call(self._begin_cut, name, pid)

    def connect(self, name: str) -> None:
        """Let a peer's connections be made again."""
        self._call(self._cut.pop, name, None)

    def _call(self, function: object, *arguments: object) -> None:
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                trio.from_thread.run_sync(function, *arguments, trio_token=self._token)  # type: ignore[arg-type]

    def _begin_cut(self, name: str, pid: int | None) -> None:
        self._cut[name] = pid
        dialled = ports_of(pid)
        for target, gate in self._gates.items():
            gate.part(None if target == name else dialled)

    def is_cut(self, gate: "_Gate", port: int) -> bool:
        """Return whether a connection from this port through that gate is one of a peer that is cut off."""
        own = any(self._gates.get(name) is gate for name in self._cut)
        return own or any(port in ports_of(pid) for pid in self._cut.values())


class _Gate(Proxy):
    """A proxy whose connections can be broken."""

    def __init__(self, route: Route, link: Link, gates: Gates) -> None:
        super().__init__(route, link)
        self._of = gates
        self._carried: dict[trio.CancelScope, int] = {}

    async def _carry(self, dialer: trio.SocketStream) -> None:
        try:
            port = dialer.socket.getpeername()[1]
        except OSError:
            port = 0  # gone already
        if not port or self._of.is_cut(self, port):
            await dialer.aclose()
            return
        with trio.CancelScope() as scope:
            self._carried[scope] = port
            try:
                await super()._carry(dialer)
            finally:
                del self._carried[scope]

    def part(self, ports: Iterable[int] | None) -> None:
        """Break the connections that were made from these ports; None: all."""
        for scope, port in self._carried.items():
            if ports is None or port in ports:
                scope.cancel()


def ports_of(pid: int | None) -> frozenset[int]:
    """Return the local ports of a process's TCP sockets; nothing where the system does not tell."""
    if pid is None or not _SOCKETS.exists():
        return frozenset()
    own = set()
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                own.add(str(file.readlink()))
    fields = (line.split() for line in _SOCKETS.read_text().splitlines()[1:])
    return frozenset(int(each[1].rpartition(":")[2], 16) for each in fields if f"socket:[{each[9]}]" in own)
