"""Which of several libraries serves: the one that is faster by a clock that the tests move."""

from collections.abc import Callable
from itertools import permutations
from types import SimpleNamespace
from typing import Any

import pytest

from p2pfl.crypto.providers import Aead, Cipher, Keystream, Provider
from p2pfl.crypto.providers.choice import BUDGET_SECONDS, MOST_TRIALS, fastest_aead, fastest_keystream
from tests.crypto.test_providers import Altered

Choose = Callable[[list[Provider], Cipher, Callable[[], float]], Provider]
every_primitive = pytest.mark.parametrize("choose", [fastest_aead, fastest_keystream])
every_cipher = pytest.mark.parametrize("cipher", Cipher)


class Clock:
    """Goes on when a library works."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Paced(Altered):
    """OpenSSL, which takes the next of the given seconds for each call; the last again and again."""

    def __init__(self, clock: Clock, name: str, *seconds: float, **altered: Any) -> None:
        super().__init__(**altered)
        self.name = name
        self.calls = 0
        self._clock, self._seconds = clock, seconds

    def _paced(self, work: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            work(*arguments)
            self._clock.seconds += self._seconds[min(self.calls, len(self._seconds) - 1)]
            self.calls += 1

        return call

    def aead(self, cipher: Cipher, key: bytes) -> Aead:
        inner = super().aead(cipher, key)
        return SimpleNamespace(seal_into=self._paced(inner.seal_into), open_into=inner.open_into)

    def keystream(self, cipher: Cipher, key: bytes) -> Keystream:
        return SimpleNamespace(expand_into=self._paced(super().keystream(cipher, key).expand_into))


@every_primitive
@every_cipher
def test_the_fastest_is_chosen_wherever_it_stands(choose: Choose, cipher: Cipher) -> None:
    for order in permutations((0.0001, 0.0002, 0.0003)):
        clock = Clock()
        providers = [Paced(clock, str(seconds), seconds) for seconds in order]
        assert choose(providers, cipher, clock).name == "0.0001"
        assert {provider.calls for provider in providers} == {MOST_TRIALS}


@every_primitive
def test_of_equals_the_first_is_chosen(choose: Choose) -> None:
    clock = Clock()
    first, second = Paced(clock, "first", 0.001), Paced(clock, "second", 0.001)
    assert choose([first, second], Cipher.AES_256, clock) is first


@every_primitive
def test_a_library_is_judged_by_its_best_trial(choose: Choose) -> None:
    """Something else had the core in the others."""
    clock = Clock()
    disturbed, steady = Paced(clock, "disturbed", 0.0005, 0.0001, 0.0005), Paced(clock, "steady", 0.0002)
    assert choose([disturbed, steady], Cipher.SM4, clock) is disturbed


@every_primitive
def test_one_alone_is_not_tried(choose: Choose) -> None:
    clock = Clock()
    only = Paced(clock, "only", 1.0)
    assert choose([only], Cipher.SM4, clock) is only
    assert only.calls == 0


@every_primitive
@pytest.mark.parametrize("seconds", [0.00001, 0.0001, 0.001, 0.005])
def test_the_cost_is_bounded(choose: Choose, seconds: float) -> None:
    """The budget and a round, or two rounds where one takes more than the budget."""
    clock = Clock()
    providers = [Paced(clock, name, seconds) for name in ("one", "other")]
    choose(providers, Cipher.SM4, clock)
    a_round = 2 * seconds
    assert clock.seconds <= max(BUDGET_SECONDS + a_round, 2 * a_round) + 1e-9
