"""What a watched peer answers: its metrics, its health, and nothing that a slow or hostile client could make of it."""

import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from trio.testing import MockClock, memory_stream_pair

from p2pfl.core.config import MetricsConfig, PeerConfig
from p2pfl.core.errors import AddressInUse, InvalidConfig, NotAMember, WrongCharter
from p2pfl.core.privacy import Budget
from p2pfl.core.settings import validate
from p2pfl.core.trace import Evaluated, LinkChanged, MemberChanged, RoundEnded, State, StateChanged
from p2pfl.node.health import CLIENT_SECONDS, MOST_CLIENTS, MOST_HEADER_BYTES, Endpoint, Page, listen, text_page
from p2pfl.node.libp2p.channel import Verdict, _objection_of
from p2pfl.node.metrics import CONTENT_TYPE, OTHER, REASONS, Metrics, Sources, is_ready, pages, reason_of
from p2pfl.node.status import Progress, fold
from tests.trio_tools import trio_test

ROOT = Path(__file__).parents[2]
ENDED = RoundEnded(
    round=4, seconds=1.5, heard=("bee",), absent={"cat": "upload: silent"}, loss=0.25, spread=7.1257575, settling=False,
    outcome="full", clipped=2, group_loss=0.53125, distance=0.8125, weight=0.7,
)  # fmt: skip
EVENTS = (
    StateChanged(State.TRAINING, 4),
    MemberChanged("bee", "here"),
    LinkChanged("cat", False, "reset"),
    ENDED,
    Evaluated(5, {"accuracy": 0.75}),
)


def watched(**changes: Any) -> Metrics:
    """Metrics of a peer to which `EVENTS` have happened."""
    progress = Progress(written_at=0.0, started_at=100.0)
    for event in EVENTS:
        progress = fold(progress, event)
    sources = Sources(
        member="ant", release="1", wire=4, charter="ab" * 32, others=("bee", "cat", "dog"), rounds=9, parameters=8,
        progress=lambda: progress, traffic=lambda: (11, 22), disk=lambda: (33, 44), budget=None, rho=lambda: 0.0,
    )  # fmt: skip
    metrics = Metrics(replace(sources, **changes))
    for event in EVENTS:
        metrics.note(event, 200.0)
    return metrics


def samples(metrics: Metrics) -> dict[str, float]:
    """Read the text as a monitoring system would."""
    families = text_string_to_metric_families(metrics.render().decode())
    return {
        sample.name + "".join(f"/{value}" for value in sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_what_happened_can_be_read_by_a_monitoring_system() -> None:
    metrics = watched()
    metrics.refused("is not on the roster")
    metrics.refused("whatever")
    found = samples(metrics)
    expected = {
        "p2pfl_info/abababababab/ant/1/4": 1, "p2pfl_started_timestamp_seconds": 100,
        "p2pfl_state/training": 1, "p2pfl_state/linking": 0, "p2pfl_ready": 1,
        "p2pfl_round": 5, "p2pfl_rounds_agreed": 9, "p2pfl_rounds_total/full": 1, "p2pfl_rounds_total/void": 0,
        "p2pfl_round_seconds_sum": 1.5, "p2pfl_round_seconds_count": 1, "p2pfl_last_round_timestamp_seconds": 200,
        "p2pfl_last_round_heard": 1, "p2pfl_last_round_absent": 1, "p2pfl_loss": 0.25, "p2pfl_clipped_ratio": 0.25,
        "p2pfl_metric/accuracy": 0.75, "p2pfl_members/reachable": 1, "p2pfl_members/away": 1,
        "p2pfl_members/unknown": 1, "p2pfl_member_reachable/bee": 1, "p2pfl_member_reachable/cat": 0,
        "p2pfl_received_bytes_total": 11, "p2pfl_sent_bytes_total": 22, "p2pfl_links_lost_total": 1,
        "p2pfl_refusals_total/roster": 1, "p2pfl_refusals_total/other": 1, "p2pfl_refusals_total/charter": 0,
        "p2pfl_disk_free_bytes": 33, "p2pfl_run_bytes": 44,
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert "p2pfl_epsilon_spent" not in found, "a charter without noise has no budget"


def test_what_is_spent_of_a_budget_is_there_and_stays_below_it() -> None:
    budget = Budget(noise=10.0, epsilon=3.0, delta=1e-5, values=8)
    rho = 0.0
    metrics = watched(budget=budget, rho=lambda: rho)
    assert samples(metrics)["p2pfl_epsilon_spent"] == 0
    rho = 5 * budget.rho
    found = samples(metrics)
    assert found["p2pfl_epsilon_spent"] == pytest.approx(budget.spent(rho))
    assert 0 < found["p2pfl_epsilon_spent"] < found["p2pfl_epsilon_budget"] == 3


def test_other_members_figures_are_nowhere_in_it() -> None:
    text = watched().render().decode()
    for figure in ("7.1257575", "0.53125", "0.8125", "upload: silent"):
        assert figure not in text


@pytest.mark.parametrize("verdict", [each for each in Verdict if each is not Verdict.WELCOME])
def test_every_objection_of_a_handshake_has_a_label(verdict: Verdict) -> None:
    error = _objection_of(None, verdict)
    label = "charter" if isinstance(error, WrongCharter) else None
    label = label or ("roster" if verdict is Verdict.NOT_A_MEMBER else "identity")
    assert reason_of(error.reason) == label
    assert isinstance(error, WrongCharter | NotAMember)


def test_whatever_remotes_do_there_are_few_labels() -> None:
    assert reason_of("x" * 10_000) == OTHER
    assert len(REASONS) < 10


def test_a_peer_that_waits_for_others_is_alive_and_not_ready() -> None:
    progress = Progress(written_at=0.0, started_at=0.0, state="linking")
    found = pages(watched(progress=lambda: progress))
    assert not is_ready(progress)
    assert (found["/healthz"]().code, found["/readyz"]().code) == (200, 503)
    assert pages(watched())["/readyz"]() == text_page(200, "training, 5 rounds ended")


# The list and the dashboard


def all_names() -> set[str]:
    budget = Budget(noise=10.0, epsilon=3.0, delta=1e-5, values=8)
    families = text_string_to_metric_families(watched(budget=budget).render().decode())
    return {sample.name for family in families for sample in family.samples if sample.name.startswith("p2pfl_")}


def test_the_page_lists_exactly_what_there_is() -> None:
    listed = set(re.findall(r"^\| `(p2pfl_\w+)", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE))
    summary = {"p2pfl_round_seconds_sum", "p2pfl_round_seconds_count"}
    assert listed == all_names() - summary | {"p2pfl_round_seconds"}


def test_every_metric_that_the_dashboard_names_exists() -> None:
    dashboard = json.loads((ROOT / "packaging/grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    assert len(queries) > 10
    named = {name for query in queries for name in re.findall(r"\b(?:p2pfl|process)_\w+", query)}
    families = text_string_to_metric_families(watched().render().decode())
    process = {sample.name for family in families for sample in family.samples if family.name.startswith("process")}
    assert named <= all_names() | process
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


# Where it listens


def test_an_address_that_others_may_reach_must_be_wanted() -> None:
    def config(**metrics: Any) -> PeerConfig:
        return validate(PeerConfig, {"name": "ant", "metrics": metrics}, "peer.toml")

    assert config(port=9464, address="::1").metrics.address == "::1"
    with pytest.raises(InvalidConfig, match=r"^peer.toml: metrics: address: 0\.0\.0\.0 is not a loopback address"):
        config(port=9464, address="0.0.0.0")  # noqa: S104
    assert config(port=9464, address="0.0.0.0", exposed=True).metrics.exposed  # noqa: S104
    with pytest.raises(InvalidConfig, match="is no IP address; write"):
        config(port=9464, address="localhost")


@trio_test
async def test_a_port_that_is_taken_is_told_in_one_line() -> None:
    (first,) = await listen("127.0.0.1", 0)
    port = first.socket.getsockname()[1]
    with pytest.raises(AddressInUse, match=rf"^metrics: 127.0.0.1 port {port} is taken by another process"):
        await listen("127.0.0.1", port)
    await first.aclose()
    with pytest.raises(InvalidConfig, match="cannot be used"):
        await listen("192.0.2.1", 0)


# HTTP


async def ask(endpoint: Endpoint, request: bytes) -> bytes:
    """Send these bytes, hang up one way, and return all that comes back."""
    near, far = memory_stream_pair()
    answer = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(endpoint.answer, far)
        await near.send_all(request)
        await near.send_eof()
        async for part in near:
            answer += part
    return answer


def fixed(address: str = "127.0.0.1") -> Endpoint:
    made = {"/metrics": lambda: Page(200, CONTENT_TYPE, b"x 1\n"), "/readyz": lambda: text_page(503, "no")}
    return Endpoint(made, address)


def request(method: str = "GET", target: str = "/metrics", more: str = "", host: str = "127.0.0.1:9464") -> bytes:
    return f"{method} {target} HTTP/1.1\r\nHost: {host}\r\n{more}\r\n".encode()


@trio_test
async def test_a_page_is_answered_with_its_length_and_the_end() -> None:
    head, _, body = (await ask(fixed(), request(target="/metrics?x=1"))).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert {b"Content-Length: 4", b"Connection: close", f"Content-Type: {CONTENT_TYPE}".encode()} <= set(
        head.split(b"\r\n")
    )
    assert body == b"x 1\n"
    assert (await ask(fixed(), request("HEAD"))).endswith(b"\r\n\r\n")
    assert (await ask(fixed(), request(target="/readyz"))).startswith(b"HTTP/1.1 503 ")


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (request(target="/secret"), b"404"),
        (request(target="/../metrics"), b"404"),
        (request("POST", more="Content-Length: 999999999\r\n"), b"405"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (request(more=f"X: {'a' * 2 * MOST_HEADER_BYTES}\r\n"), b"431"),
        (b"a" * 2 * MOST_HEADER_BYTES, b"431"),
    ],
    ids=["unknown", "path", "post", "tls", "long-header", "endless-line"],
)
@trio_test
async def test_anything_else_is_refused(sent: bytes, code: bytes) -> None:
    assert (await ask(fixed(), sent)).startswith(b"HTTP/1.1 " + code)


LOOPBACK = ("localhost", "LocalHost:9464", "127.0.0.1", "127.0.0.1:9464", "127.1.2.3:1", "[::1]", "[::1]:9464")
OTHERS = ("10.0.0.5", "10.0.0.5:9464", "[fd00::1]", "[fd00::1]:9464", "0.0.0.0:9464")
NAMES = (
    "",
    "evil.example",
    "evil.example:9464",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "[localhost]",
    "::1",
)


@pytest.mark.parametrize(
    ("address", "answered", "refused"),
    [
        ("127.0.0.1", LOOPBACK, OTHERS + NAMES),
        ("::1", LOOPBACK, OTHERS + NAMES),
        ("10.0.0.5", LOOPBACK + OTHERS, NAMES),
        ("0.0.0.0", LOOPBACK + OTHERS, NAMES),  # noqa: S104
    ],
)
@trio_test
async def test_a_web_page_whose_name_leads_here_reads_nothing(
    address: str, answered: tuple[str, ...], refused: tuple[str, ...]
) -> None:
    """DNS rebinding: the browser takes this endpoint for the page's own server, and sends the page's name as Host."""
    for host in answered:
        assert (await ask(fixed(address), request(host=host))).startswith(b"HTTP/1.1 200 "), host
    for host in refused:
        for target in ("/metrics", "/readyz", "/other"):
            head, _, body = (await ask(fixed(address), request(target=target, host=host))).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 403 "), host
            assert (
                body == b"ask by IP address, for localhost on this machine, or by one of [metrics] names in peer.toml\n"
            )
    assert (await ask(fixed(address), b"GET /metrics HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 403 ")


@trio_test
async def test_names_that_the_operator_lists_are_answered_and_no_others() -> None:
    endpoint = Endpoint(fixed()._pages, "10.0.0.5", ["Peer.Bank.example"])
    for host, code in (
        ("peer.bank.example", 200), ("PEER.bank.example:9464", 200), ("bank.example", 403),
        ("evil.peer.bank.example", 403), ("peer.bank.example.evil", 403),
    ):  # fmt: skip
        assert (await ask(endpoint, request(host=host))).startswith(f"HTTP/1.1 {code} ".encode()), host


@pytest.mark.parametrize("name", ["", "*", "bank example", "bank.example:9464", "-bank.example", "a" * 64, "."])
def test_a_name_is_a_host_name(name: str) -> None:
    with pytest.raises(ValueError, match="names"):
        MetricsConfig(names=[name])


@pytest.mark.parametrize("sent", [b"", b"GET", b"\r\n"])
@trio_test
async def test_whoever_hangs_up_is_forgotten(sent: bytes) -> None:
    assert not (await ask(fixed(), sent)).startswith(b"HTTP/1.1 200")


@asynccontextmanager
async def slow_clients(endpoint: Endpoint, count: int) -> AsyncIterator[list[trio.abc.Stream]]:
    """So many clients that have sent half a request and send no more."""
    async with trio.open_nursery() as nursery:
        nears = []
        for _ in range(count):
            near, far = memory_stream_pair()
            nursery.start_soon(endpoint.answer, far)
            await near.send_all(b"GET /metrics HT")
            await trio.testing.wait_all_tasks_blocked()
            nears.append(near)
        yield nears
        nursery.cancel_scope.cancel()


@trio_test
async def test_slow_clients_keep_nobody_out_and_the_oldest_gives_way() -> None:
    endpoint = fixed()
    async with slow_clients(endpoint, 3 * MOST_CLIENTS) as nears:
        assert len(endpoint._clients) == MOST_CLIENTS
        assert await nears[0].receive_some() == b"", "closed"
        assert (await ask(endpoint, request())).startswith(b"HTTP/1.1 200 ")


def test_a_slow_client_is_closed_in_time_and_one_that_never_stops_talking_too() -> None:
    async def run() -> None:
        endpoint = fixed()
        began = trio.current_time()
        async with slow_clients(endpoint, 1) as (near,):
            assert await near.receive_some() == b""
            assert trio.current_time() - began == pytest.approx(CLIENT_SECONDS)
        near, far = memory_stream_pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint.answer, far)
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                while True:
                    await near.send_all(request())
        assert trio.current_time() - began < 2 * CLIENT_SECONDS
        assert not endpoint._clients

    trio.run(run, clock=MockClock(autojump_threshold=0))


def test_metrics_are_written_once_a_second_at_most() -> None:
    async def run() -> None:
        metrics = watched()
        page = pages(metrics)["/metrics"]
        first = page()
        metrics.refused("is not on the roster")
        assert page() is first
        await trio.sleep(1)
        assert b'p2pfl_refusals_total{reason="roster"} 1.0' in page().body

    trio.run(run, clock=MockClock(autojump_threshold=0))
