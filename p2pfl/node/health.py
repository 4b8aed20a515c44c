"""A small HTTP endpoint for those who watch a peer: /metrics, /healthz and /readyz, by GET, one request a connection.

It answers strangers and so costs nothing: few connections at once, of which the oldest gives way, little time and few
bytes for each, and the metrics are written once a second at most. It changes nothing, and asks for no password; on
which addresses it may listen is settled by `p2pfl.core.config.MetricsConfig`.

Whom the firewall trusts may still run a browser, and a web page can let its own name lead to this endpoint (DNS
rebinding): so only requests for an address, localhost, or a name that the operator lists, are answered.
"""

import errno
import ipaddress
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import h11
import trio

from p2pfl.core.errors import AddressInUse, InvalidConfig

MOST_CLIENTS = 8
"""Connections at once; a guess: one monitoring system, its spare, and a person."""
CLIENT_SECONDS = 5.0
"""For a connection as a whole; a guess: an honest one on this machine takes milliseconds."""
MOST_HEADER_BYTES = 4096
RECEIVE_BYTES = 1024
LEAST_AGE = 1.0
"""Seconds that metrics are good for: whoever asks more often gets the same again. A guess."""
PLAIN = "text/plain; charset=utf-8"


@dataclass(frozen=True)
class Page:
    """An answer: its status code, what it is, and its bytes."""

    code: int
    kind: str
    body: bytes


def text_page(code: int, text: str) -> Page:
    """Return a page of one line."""
    return Page(code, PLAIN, f"{text}\n".encode())


class Remembered:
    """A page that is made once in `LEAST_AGE` seconds at most."""

    def __init__(self, make: Callable[[], Page]) -> None:
        self._make = make
        self._page: Page | None = None
        self._at = float("-inf")

    def __call__(self) -> Page:
        """Return it, made anew if it is old."""
        if self._page is None or trio.current_time() - self._at >= LEAST_AGE:
            self._page, self._at = self._make(), trio.current_time()
        return self._page


def is_own_host(host: str, bound: str, names: Sequence[str] = ()) -> bool:
    """Return whether a request's Host is one that no web page can have as its own name, or one of the operator's.

    Args:
        host: the header, with or without a port.
        bound: the address that the endpoint listens at: if it is a loopback address, only those count, else all do, for
            a port that is passed on has another address outside.
        names: that are the operator's own.
    """
    name = host if host.endswith("]") else host.rpartition(":")[0] or host
    if name.lower() in {"localhost", *(each.lower() for each in names)}:
        return True
    try:
        asked = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return asked.is_loopback or not ipaddress.ip_address(bound).is_loopback


async def listen(address: str, port: int) -> Sequence[trio.SocketListener]:
    """Bind the endpoint.

    Raises:
        AddressInUse: another process has the port.
        InvalidConfig: the address is not this machine's, or the port may not be used.
    """
    where = f"metrics: {address} port {port}"
    try:
        return await trio.open_tcp_listeners(port, host=address)
    except OSError as error:
        number = error.errno or getattr(error.__cause__, "errno", None)
        if number == errno.EADDRINUSE:
            raise AddressInUse(f"{where} is taken by another process; choose another port in peer.toml") from error
        raise InvalidConfig(f"{where} cannot be used: {error.strerror or error}") from error


class Endpoint:
    """Answers each connection with one page.

    Args:
        pages: by path.
        address: that it listens at.
        names: by which it may be asked, beside addresses.
    """

    def __init__(
        self, pages: Mapping[str, Callable[[], Page]], address: str, names: Sequence[str] = ()
    ) -> None:  # fmt: skip
        self._pages, self._address, self._names = pages, address, names
        self._clients: dict[trio.CancelScope, None] = {}

    async def serve(self, listeners: Sequence[trio.SocketListener]) -> None:
        """Answer until cancelled."""
        await trio.serve_listeners(self.answer, list(listeners))

    async def answer(self, stream: trio.abc.Stream) -> None:
        """Answer one connection and close it; nothing that its other end does raises."""
        scope = trio.CancelScope(deadline=trio.current_time() + CLIENT_SECONDS)
        self._clients[scope] = None
        while len(self._clients) > MOST_CLIENTS:
            oldest = next(iter(self._clients))
            del self._clients[oldest]
            oldest.cancel()
        try:
            with scope:
                await self._answer(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.ProtocolError):
            pass  # it hung up, or speaks something else: its own loss
        finally:
            self._clients.pop(scope, None)
            await trio.aclose_forcefully(stream)

    async def _answer(self, stream: trio.abc.Stream) -> None:
        talk = h11.Connection(h11.SERVER, max_incomplete_event_size=MOST_HEADER_BYTES)
        try:
            request = await _request(talk, stream)
        except h11.RemoteProtocolError as error:
            if talk.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await _send(talk, stream, text_page(error.error_status_hint, "not a request"), with_body=True)
            return
        if request is not None:
            await _send(talk, stream, self._page(request), with_body=request.method != b"HEAD")

    def _page(self, request: h11.Request) -> Page:
        if request.method not in (b"GET", b"HEAD"):
            return text_page(405, "only GET and HEAD")
        host = next((value.decode("ascii", "replace") for name, value in request.headers if name == b"host"), "")
        if not is_own_host(host, self._address, self._names):
            return text_page(
                403, "ask by IP address, for localhost on this machine, or by one of [metrics] names in peer.toml"
            )
        path = request.target.partition(b"?")[0].decode("ascii", "replace")
        make = self._pages.get(path)
        return text_page(404, f"there are {', '.join(sorted(self._pages))}") if make is None else make()


async def _request(talk: h11.Connection, stream: trio.abc.Stream) -> h11.Request | None:
    """Read until the end of a request's header; None where the other end hangs up before."""
    while True:
        event = talk.next_event()
        if isinstance(event, h11.Request):
            return event
        if event is not h11.NEED_DATA:
            return None
        talk.receive_data(await stream.receive_some(RECEIVE_BYTES))


async def _send(talk: h11.Connection, stream: trio.abc.Stream, page: Page, *, with_body: bool) -> None:
    headers = [
        ("Content-Type", page.kind),
        ("Content-Length", str(len(page.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Connection", "close"),
    ]
    parts = [talk.send(h11.Response(status_code=page.code, headers=headers))]
    if with_body:
        parts.append(talk.send(h11.Data(data=page.body)))
    await stream.send_all(b"".join(part or b"" for part in parts))
    if isinstance(stream, trio.abc.HalfCloseableStream):
        await stream.send_eof()
        # A socket that is closed with bytes unread takes the answer with it; but nobody is listened to for long.
        for _ in range(MOST_HEADER_BYTES // RECEIVE_BYTES):
            if not await stream.receive_some(RECEIVE_BYTES):
                break
