"""Inner products of words: they add up, they are the formula's, and a lie slips through as seldom as is said."""

import numpy as np
import pytest

from p2pfl.core.errors import LocalError
from p2pfl.core.statements import MAX_BODY_BYTES, MAX_GROUP, MAX_PRODUCTS_BYTES
from p2pfl.crypto import products
from p2pfl.crypto.masks import Mask
from p2pfl.crypto.products import PRODUCT_BYTES, PRODUCTS, add_up, inner_products
from p2pfl.crypto.ring import HEADER_BYTES, Layout
from p2pfl.crypto.suite import CipherSuite, suite

COUNT = 70_001


def key(of: CipherSuite, number: int) -> bytes:
    return number.to_bytes(of.key_bytes, "big")


def stream(of: CipherSuite, cipher_key: bytes, position: int, size: int) -> np.ndarray:
    data = bytearray(size)
    of.keystream(cipher_key).expand_into(position, memoryview(data))
    return np.frombuffer(data, np.uint8)


@pytest.mark.parametrize("name", ["aes", "sm4"])
@pytest.mark.parametrize("bits", [32, 16])
def test_products_are_those_of_the_formula(name: str, bits: int) -> None:
    """A second implementation, in whole numbers of Python's; over several pieces, with masks, the second chunk."""
    of, layout = suite(name), Layout(2 * COUNT, 2, bits)
    place = layout.chunk(1)
    chunk = np.random.default_rng(1).integers(0, 256, place.size, np.uint8)
    masks = (Mask(key(of, 1), -1), Mask(key(of, 2), 1))
    word = f"<u{bits // 8}"
    random = stream(of, key(of, 9), 0, place.size - HEADER_BYTES).view(word).astype(object)
    header, words = chunk[:HEADER_BYTES].view("<u4").astype(object), chunk[HEADER_BYTES:].view(word).astype(object)
    for mask in masks:
        drawn = stream(of, mask.key, place.position, place.size)
        header = header + mask.sign * drawn[:HEADER_BYTES].view("<u4").astype(object)
        words = words + mask.sign * drawn[HEADER_BYTES:].view(word).astype(object)
    expected = [int(each) % 2**32 for each in header]
    expected += [int(((random // 2**number) * words).sum()) % 2**bits for number in range(PRODUCTS)]
    (found,) = inner_products(of, layout, 1, key(of, 9), [(chunk, masks)])
    assert np.frombuffer(found, "<u4").tolist() == expected


@pytest.mark.parametrize("bits", [32, 16])
def test_products_of_summands_add_up_to_that_of_the_sum(bits: int) -> None:
    of, layout, draw = suite("aes"), Layout(1000, 3, bits), np.random.default_rng(2)
    chunks = [draw.integers(0, 256, layout.chunk(0).size, np.uint8) for _ in range(5)]
    header = sum(each[:HEADER_BYTES].view("<u4") for each in chunks).astype("<u4")
    body = sum(each[HEADER_BYTES:].view(f"<u{bits // 8}") for each in chunks).astype(f"<u{bits // 8}")
    total = np.frombuffer(header.tobytes() + body.tobytes(), np.uint8)
    *each, whole = inner_products(of, layout, 0, key(of, 3), [(chunk, ()) for chunk in (*chunks, total)])
    assert add_up(bits, each) == whole


@pytest.mark.parametrize(("power", "most"), [(31, 2**-3), (30, 2**-4), (0, 2**-32)])
def test_a_lie_is_missed_as_seldom_as_is_said(power: int, most: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three products, so that misses can be counted; the error is 2^power in one word."""
    monkeypatch.setattr(products, "PRODUCTS", 3)
    of, layout = suite("aes"), Layout(4, 1, 32)
    error = np.zeros(8, "<u4")
    error[5] = 2**power
    trials = 4000
    missed = sum(
        not any(inner_products(of, layout, 0, key(of, number), [(error.view(np.uint8), ())])[0])
        for number in range(trials)
    )
    assert abs(missed - most * trials) <= 5 * (most * trials) ** 0.5


def test_products_of_the_largest_group_fit_a_statement() -> None:
    assert PRODUCT_BYTES == MAX_PRODUCTS_BYTES
    assert 2 * MAX_GROUP * (PRODUCT_BYTES + 2) < MAX_BODY_BYTES


def test_a_chunk_of_another_length_is_refused() -> None:
    of, layout = suite("aes"), Layout(4, 1, 32)
    with pytest.raises(LocalError):
        inner_products(of, layout, 0, key(of, 1), [(np.zeros(16, np.uint8), ())])
