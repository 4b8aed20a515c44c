"""Which of several cipher libraries serves a primitive: the fastest on this machine, as a few milliseconds show.

The libraries give the same bytes, so the choice changes how long a run takes and nothing else. The clock is the
caller's: there is none here.
"""

from collections.abc import Callable, Sequence
from functools import partial

from p2pfl.crypto.providers import NONCE_BYTES, TAG_BYTES, Cipher, Provider

Clock = Callable[[], float]
"""Gives seconds from any beginning, such as `time.perf_counter`."""
Trial = Callable[[], object]

PIECE_BYTES = 1 << 16
"""What one trial works on. Measured: from here on the libraries keep their order up to the 256 KiB of a masked sum's
pieces and the 1 MiB of a channel's records; at 4 KiB the cost of a call still decides."""
LEAST_TRIALS, MOST_TRIALS = 2, 6
BUDGET_SECONDS = 0.004
"""No round of trials but the first two begins after this. Measured: a primitive takes 0.1 ms with AES-256, and 3.5 ms
with SM4, where a round takes 0.6 ms. On a machine ten times slower that is 12 ms, and the two of a suite 24 ms."""


def fastest_aead(providers: Sequence[Provider], cipher: Cipher, clock: Clock) -> Provider:
    """Return the provider that seals fastest; of equals the first. One alone is not tried."""
    piece, out = bytes(PIECE_BYTES), memoryview(bytearray(PIECE_BYTES + TAG_BYTES))

    def trial(provider: Provider) -> Trial:
        # A key and nonce for nothing but this: what is sealed is zeros, and it is thrown away.
        aead = provider.aead(cipher, bytes(cipher.key_bytes))
        return partial(aead.seal_into, bytes(NONCE_BYTES), piece, b"", out)

    return _fastest(providers, trial, clock)


def fastest_keystream(providers: Sequence[Provider], cipher: Cipher, clock: Clock) -> Provider:
    """Return the provider that expands fastest; of equals the first. One alone is not tried."""
    out = memoryview(bytearray(PIECE_BYTES))

    def trial(provider: Provider) -> Trial:
        return partial(provider.keystream(cipher, bytes(cipher.key_bytes)).expand_into, 0, out)

    return _fastest(providers, trial, clock)


def _fastest(providers: Sequence[Provider], trial: Callable[[Provider], Trial], clock: Clock) -> Provider:
    """Return the provider with the shortest trial, as other load only adds; they take turns, so that it adds to all."""
    if len(providers) == 1:
        return providers[0]
    trials = [trial(provider) for provider in providers]
    shortest = [float("inf")] * len(trials)
    begin = clock()
    for number in range(MOST_TRIALS):
        if number >= LEAST_TRIALS and clock() - begin >= BUDGET_SECONDS:
            break
        for index, run in enumerate(trials):
            start = clock()
            run()
            shortest[index] = min(shortest[index], clock() - start)
    return providers[shortest.index(min(shortest))]
