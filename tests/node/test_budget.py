"""What a neighbor may cost: tokens and credit, on a clock that jumps."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from p2pfl.node import budget
from p2pfl.node.budget import SLICE, Allowance, ReceiveCredit


def run(test: Callable[[], Awaitable[None]]) -> None:
    trio.run(test, clock=MockClock(autojump_threshold=0))


def test_who_stays_within_its_rate_never_waits() -> None:
    async def test() -> None:
        allowance, began = Allowance(rate=100.0, burst=200.0), trio.current_time()
        for number in range(1000):
            await trio.sleep_until(began + number / 100)
            await allowance.spend(1.0)
            assert trio.current_time() <= began + number / 100 + 1e-6

    run(test)


@pytest.mark.parametrize("cost", [0.1, 1.0, 64.0])
def test_who_exceeds_its_rate_is_slowed_down_to_it(cost: float) -> None:
    async def test() -> None:
        allowance, began = Allowance(rate=100.0, burst=200.0), trio.current_time()
        spent = 0.0
        while trio.current_time() < began + 60:
            await allowance.spend(cost)
            spent += cost
        assert spent <= 200 + 100 * 61 + SLICE + cost
        assert spent >= 100 * 55

    run(test)


def test_others_have_their_turn_however_much_there_is_to_read() -> None:
    async def test() -> None:
        allowance, turns = Allowance(), 0

        async def other() -> None:
            nonlocal turns
            while True:
                turns += 1
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(other)
            for _ in range(int(10 * SLICE)):
                await allowance.spend(1.0)
            nursery.cancel_scope.cancel()
        assert turns >= 9

    run(test)


class Receivers:
    """Tasks that take credit and keep it until told."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.credit, self.nursery = ReceiveCredit(), nursery
        self.receiving: list[int] = []
        self.scopes: list[trio.CancelScope] = []

    async def receive(self, size: int) -> None:
        with trio.CancelScope() as scope:
            self.scopes.append(scope)
            async with self.credit.take(size):
                self.receiving.append(size)
                try:
                    await trio.sleep_forever()
                finally:
                    self.receiving.remove(size)

    async def begin(self, *sizes: int) -> None:
        for size in sizes:
            self.nursery.start_soon(self.receive, size)
            await wait_all_tasks_blocked()


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "MOST_RECEIVING", 100)


def with_receivers(test: Callable[[Receivers], Awaitable[None]]) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            await test(Receivers(nursery))
            nursery.cancel_scope.cancel()

    trio.run(main)


@pytest.mark.usefixtures("_small")
def test_payloads_beyond_the_credit_wait_for_their_turn_and_hold_nothing() -> None:
    async def test(receivers: Receivers) -> None:
        await receivers.begin(*range(20, 40))
        assert sum(receivers.receiving) == receivers.credit.used <= 100
        assert receivers.receiving == [20, 21, 22, 23]
        await receivers.begin(1)
        assert 1 not in receivers.receiving, "who comes first is served first"
        receivers.scopes[0].cancel()
        await wait_all_tasks_blocked()
        assert receivers.receiving == [21, 22, 23, 24]
        for scope in receivers.scopes:
            scope.cancel()
        await wait_all_tasks_blocked()
        assert receivers.credit.used == 0

    with_receivers(test)


@pytest.mark.usefixtures("_small")
def test_three_that_drip_keep_no_large_payload_waiting() -> None:
    async def test(receivers: Receivers) -> None:
        await receivers.begin(*[5000] * 6)
        assert receivers.receiving == [5000] * budget.LEAST_PAYLOADS

    with_receivers(test)


@pytest.mark.usefixtures("_small")
def test_who_gives_up_waiting_keeps_nobody_else_waiting() -> None:
    async def test(receivers: Receivers) -> None:
        await receivers.begin(25, 25, 25, 20, 24, 5)
        assert receivers.receiving == [25, 25, 25, 20]
        receivers.scopes[4].cancel()
        await wait_all_tasks_blocked()
        assert receivers.receiving == [25, 25, 25, 20, 5]

    with_receivers(test)
