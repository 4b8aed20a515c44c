"""Random products of words: they add up, they are the formula's, and a lie slips through as seldom as is said."""

from functools import partial

import numpy as np
import pytest

from p2pfl.core.errors import LocalError
from p2pfl.core.statements import MAX_BODY_BYTES, MAX_GROUP, MAX_PRODUCTS_BYTES
from p2pfl.crypto import products as module
from p2pfl.crypto.masks import Mask, MaskedVector
from p2pfl.crypto.products import PRODUCT_BYTES, PRODUCTS, add_up, pads, products, unmasked, words_of
from p2pfl.crypto.ring import HEADER_BYTES, WEIGHT_ONE, Layout, Ring
from p2pfl.crypto.suite import CipherSuite, suite

COUNT = 70_001


def key(of: CipherSuite, number: int) -> bytes:
    return number.to_bytes(of.key_bytes, "big")


def stream(of: CipherSuite, cipher_key: bytes, position: int, size: int) -> np.ndarray:
    data = bytearray(size)
    of.keystream(cipher_key).expand_into(position, memoryview(data))
    return np.frombuffer(data, np.uint8)


def by_formula(of: CipherSuite, challenge: bytes, words: list[int], bits: int) -> list[int]:
    """A second implementation, in whole numbers of Python's."""
    width = max(16, min(512, len(words) // 64 // 4 * 4))
    rows = -(-len(words) // width)
    words = words + [0] * (rows * width - len(words))
    right = stream(of, challenge, 0, 4 * PRODUCTS * PRODUCTS * width).view("<u4").reshape(PRODUCTS, -1).astype(object)
    left = stream(of, challenge, 4 * PRODUCTS * PRODUCTS * width, rows * PRODUCTS).reshape(rows, PRODUCTS)
    matrix = np.array(words, object).reshape(rows, width)
    return [int(each) % 2**bits for each in right @ (left.T.astype(object) @ matrix).reshape(-1)]


@pytest.mark.parametrize("name", ["aes", "sm4"])
@pytest.mark.parametrize("bits", [32, 16])
@pytest.mark.parametrize("count", [1, 17, COUNT])
def test_products_are_those_of_the_formula(name: str, bits: int, count: int) -> None:
    """Over several pieces, with masks, of the second chunk."""
    of, layout = suite(name), Layout(2 * count, 2, bits)
    place = layout.chunk(1)
    chunk = np.random.default_rng(1).integers(0, 256, place.size, np.uint8)
    masks = (Mask(key(of, 1), -1), Mask(key(of, 2), 1))
    word = f"<u{bits // 8}"
    header, words = chunk[:HEADER_BYTES].view("<u4").astype(object), chunk[HEADER_BYTES:].view(word).astype(object)
    for mask in masks:
        drawn = stream(of, mask.key, place.position, place.size)
        header = header + mask.sign * drawn[:HEADER_BYTES].view("<u4").astype(object)
        words = words + mask.sign * drawn[HEADER_BYTES:].view(word).astype(object)
    expected = [int(each) % 2**32 for each in header] + by_formula(of, key(of, 9), words.tolist(), bits)
    (found,) = products(of, layout, 1, key(of, 9), [unmasked(of, layout, 1, chunk, masks)])
    assert np.frombuffer(found, "<u4").tolist() == expected


@pytest.mark.parametrize("word", [2**31, 2**31 - 1, 2**32 - 1])
def test_the_largest_words_are_multiplied_exactly(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over more rows than floats hold exactly without a reduction: all words and all entries of A at their largest."""

    class Largest:
        def expand_into(self, offset: int, out: memoryview) -> None:
            np.frombuffer(out, np.uint8)[:] = 255

    of, rows = suite("aes"), 20_000
    monkeypatch.setattr(type(of), "keystream", lambda self, key: Largest())
    layout = Layout(rows * 512, 1, 32)
    chunk = np.full(layout.chunk(0).size // 4, word, "<u4").view(np.uint8)
    (found,) = products(of, layout, 0, key(of, 1), [words_of(chunk)])
    expected = (2**32 - 1) * 255 * word * rows * 512 * PRODUCTS % 2**32
    assert np.frombuffer(found, "<u4")[4:].tolist() == [expected] * PRODUCTS


@pytest.mark.parametrize("bits", [32, 16])
def test_products_of_summands_add_up_to_that_of_the_sum(bits: int) -> None:
    of, layout, draw = suite("aes"), Layout(5000, 3, bits), np.random.default_rng(2)
    chunks = [draw.integers(0, 256, layout.chunk(0).size, np.uint8) for _ in range(5)]
    header = sum(each[:HEADER_BYTES].view("<u4") for each in chunks).astype("<u4")
    body = sum(each[HEADER_BYTES:].view(f"<u{bits // 8}") for each in chunks).astype(f"<u{bits // 8}")
    total = np.frombuffer(header.tobytes() + body.tobytes(), np.uint8)
    *each, whole = products(of, layout, 0, key(of, 3), [words_of(chunk) for chunk in (*chunks, total)])
    assert add_up(bits, each) == whole


@pytest.mark.parametrize("bits", [32, 16])
def test_a_vector_that_is_computed_where_it_is_read_has_the_products_of_its_words(bits: int) -> None:
    of, layout, draw = suite("aes"), Layout(COUNT, 2, bits), np.random.default_rng(3)
    masks = tuple(Mask(key(of, number), 1) for number in (1, 2, 3))
    values = draw.standard_normal(COUNT).astype(np.float32)
    hidden = MaskedVector(of, Ring(bits, 3, 8.0), layout, values, WEIGHT_ONE, masks)
    upload = np.empty(layout.chunk(1).size, np.uint8)
    hidden.block_into(1, 0, upload.data)
    less = unmasked(of, layout, 1, upload, [Mask(masks[0].key, -1), Mask(masks[2].key, -1)])
    one, other = products(of, layout, 1, key(of, 9), [partial(hidden.block_into, 1, masks=masks[1:2]), less])
    assert one == other


@pytest.mark.parametrize("name", ["aes", "sm4"])
def test_pads_of_all_members_cancel_and_are_others_for_each_challenge(name: str) -> None:
    of = suite(name)
    pairs = {(one, two): key(of, 10 * one + two) for one in range(4) for two in range(one + 1, 4)}
    told = [
        pads(of, b"once", [Mask(each, 1 if who == pair[0] else -1) for pair, each in pairs.items() if who in pair])
        for who in range(4)
    ]
    assert not any(add_up(32, told))
    assert all(add_up(32, told[:count]) != bytes(PRODUCT_BYTES) for count in range(1, 4))
    assert pads(of, b"again", [Mask(pairs[0, 1], 1)]) != pads(of, b"once", [Mask(pairs[0, 1], 1)])


def expected_misses(rows: int, bits: int) -> float:
    """How often an error of 2^(32 - bits) in one word is missed, with so many rows and products.

    The rows' entries times the error are all divisible by 2^j more with probability 2^(-rows j), until all are zero;
    then products miss what is left.
    """
    divisible = [2.0 ** (-rows * each) for each in range(bits + 1)] + [0.0]
    return divisible[bits] + sum(
        (divisible[each] - divisible[each + 1]) * 2.0 ** (-rows * (bits - each)) for each in range(bits)
    )


@pytest.mark.parametrize(("power", "bits"), [(31, 1), (30, 2), (29, 3)])
@pytest.mark.parametrize("rows", [1, 2])
def test_a_lie_is_missed_as_seldom_as_is_said(
    power: int, bits: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of fewer products, so that misses can be counted; with all of them the worst case is below 2^-15."""
    assert expected_misses(PRODUCTS, 1) < 2**-15
    monkeypatch.setattr(module, "PRODUCTS", rows)
    of, layout, trials = suite("aes"), Layout(4, 1, 32), 4000
    error = np.zeros(8, "<u4")
    error[5] = 2**power
    missed = sum(
        not any(products(of, layout, 0, key(of, number), [words_of(error.view(np.uint8))])[0])
        for number in range(trials)
    )
    most = expected_misses(rows, bits)
    assert abs(missed - most * trials) <= 5 * (most * trials) ** 0.5


def test_products_of_the_largest_group_fit_a_statement() -> None:
    assert PRODUCT_BYTES == MAX_PRODUCTS_BYTES
    assert 2 * MAX_GROUP * (PRODUCT_BYTES + 2) < MAX_BODY_BYTES


def test_a_chunk_of_another_length_is_refused() -> None:
    of, layout = suite("aes"), Layout(4, 1, 32)
    with pytest.raises(LocalError):
        unmasked(of, layout, 0, np.zeros(16, np.uint8), ())
