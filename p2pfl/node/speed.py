"""How fast this machine's ciphers are, and which library serves each: what `p2pfl suites` shows."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata

from p2pfl.core.errors import InvalidConfig
from p2pfl.crypto.identity import SEED_BYTES, Identity
from p2pfl.crypto.providers import Cipher, Provider
from p2pfl.crypto.providers.openssl import OpenSsl
from p2pfl.crypto.sm2 import Sm2SigningKey
from p2pfl.crypto.suite import NONCE_BYTES, SUITES, TAG_BYTES, CipherSuite, suite

_PIECE_BYTES = 1 << 18
"""What is ciphered at once: a piece of a masked sum."""
_RUNS, _RUN_SECONDS = 3, 0.01
_MEGABYTE = 1e6
_KEYS = bytes(range(1, 33)), bytes(range(33, 65))

NOTES = (
    "Every suite: a peer's libp2p identity is an Ed25519 key, and the charter's hash is SHA-256: not SM algorithms.",
    "In brackets: a library that gives the same bytes. A peer measures both for some milliseconds; the faster serves.",
    "The suites sm4 and gm use the GM/T algorithms; none of these libraries is a certified module.",
)


@dataclass(frozen=True)
class Other:
    """A library that could serve and is slower, and its speed in MB/s."""

    library: str
    version: str
    megabytes_per_second: float


@dataclass(frozen=True)
class SuiteRow:
    """One algorithm of one suite, as it runs here. Either speed is set.

    Attributes:
        suite: the suite, or `every`.
        use: what for.
        algorithm: which.
        library: which library serves it.
        version: the library's.
        megabytes_per_second: of what works on streams, in pieces of 256 KiB, on one core; a megabyte is 10^6 bytes.
        microseconds: of what works on keys, for one of them.
        is_sm: whether it is an SM algorithm.
        others: the libraries that give the same answers and do not serve.
    """

    suite: str
    use: str
    algorithm: str
    library: str
    version: str
    megabytes_per_second: float | None
    microseconds: float | None
    is_sm: bool
    others: tuple[Other, ...] = ()


@dataclass(frozen=True)
class SuiteReport:
    """The rows of the suites that can be used here, and what is to be said beside them."""

    rows: tuple[SuiteRow, ...]
    notes: tuple[str, ...]


def measure_suites(clock: Callable[[], float] = time.perf_counter) -> SuiteReport:
    """Measure every suite that is installed, in about a second; `clock` gives seconds."""
    rows: list[SuiteRow] = []
    missing = []
    for name in SUITES:
        try:
            rows += _suite_rows(suite(name, clock=clock), clock)
        except InvalidConfig as error:
            missing.append(f"{name} cannot be used here: {error}")
    return SuiteReport((*rows, _identity_row(clock)), (*NOTES, *missing))


def seconds_per_call(operation: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return how long a call takes: the best of a few short runs, as other load only ever adds."""
    return min(_run(operation, clock) for _ in range(_RUNS))


def _run(operation: Callable[[], object], clock: Callable[[], float]) -> float:
    calls, start = 0, clock()
    while (elapsed := clock() - start) < _RUN_SECONDS or not calls:
        operation()
        calls += 1
    return elapsed / calls


def _suite_rows(chosen: CipherSuite, clock: Callable[[], float]) -> list[SuiteRow]:
    terms, name = chosen.terms, chosen.name
    agreement, openssl = terms.agreement, OpenSsl()
    private, public = _KEYS[0], agreement.public_key(_KEYS[1])
    is_sm, is_sm2 = terms.cipher is Cipher.SM4, terms.agreement_name == "SM2"
    library, version = ("fastecdsa", metadata.version("fastecdsa")) if is_sm2 else (openssl.name, openssl.version)
    agreeing = seconds_per_call(lambda: agreement.shared_secret(private, public), clock) * 1e6
    piece = bytes(_PIECE_BYTES)
    hashing = _speed(lambda: chosen.hash(piece), clock)
    rows = [
        SuiteRow(name, "agreement", terms.agreement_name, library, version, None, agreeing, is_sm2),
        SuiteRow(name, "hash", terms.hash_name, openssl.name, openssl.version, hashing, None, is_sm),
        _cipher_row(chosen, "messages", "GCM", chosen.aead_provider, chosen.aead_providers, clock),
        _cipher_row(chosen, "masks", "CTR", chosen.keystream_provider, chosen.keystream_providers, clock),
    ]
    if terms.sm2_signatures:
        key, gmssl = Sm2SigningKey(private), metadata.version("gmssl-pyx")
        signing = seconds_per_call(lambda: key.sign("p2pfl/speed/1", b""), clock) * 1e6
        rows.append(SuiteRow(name, "statements", "SM2", "gmssl-pyx", gmssl, None, signing, is_sm=True))
    return rows


def _cipher_row(
    chosen: CipherSuite,
    use: str,
    mode: str,
    serving: Provider,
    providers: Sequence[Provider],
    clock: Callable[[], float],
) -> SuiteRow:
    """Measure longer than what chose the serving library: where two are as fast, the other may come out ahead here."""
    cipher = chosen.terms.cipher
    measure = _sealing if mode == "GCM" else _expanding
    others = tuple(
        Other(provider.name, provider.version, _speed(measure(provider, cipher), clock))
        for provider in providers
        if provider is not serving
    )
    speed = _speed(measure(serving, cipher), clock)
    is_sm = cipher is Cipher.SM4
    return SuiteRow(chosen.name, use, f"{cipher}-{mode}", serving.name, serving.version, speed, None, is_sm, others)


def _sealing(provider: Provider, cipher: Cipher) -> Callable[[], object]:
    # A key and nonce for nothing but this: what is sealed is zeros, and it is thrown away.
    aead, out = provider.aead(cipher, bytes(cipher.key_bytes)), memoryview(bytearray(_PIECE_BYTES + TAG_BYTES))
    return partial(aead.seal_into, bytes(NONCE_BYTES), bytes(_PIECE_BYTES), b"", out)


def _expanding(provider: Provider, cipher: Cipher) -> Callable[[], object]:
    out = memoryview(bytearray(_PIECE_BYTES))
    return partial(provider.keystream(cipher, bytes(cipher.key_bytes)).expand_into, 0, out)


def _speed(operation: Callable[[], object], clock: Callable[[], float]) -> float:
    return _PIECE_BYTES / seconds_per_call(operation, clock) / _MEGABYTE


def _identity_row(clock: Callable[[], float]) -> SuiteRow:
    identity, openssl = Identity(bytes(SEED_BYTES)), OpenSsl()
    signing = seconds_per_call(lambda: identity.sign("p2pfl/speed/1", b""), clock) * 1e6
    return SuiteRow("every", "identity", "Ed25519", openssl.name, openssl.version, None, signing, False)
