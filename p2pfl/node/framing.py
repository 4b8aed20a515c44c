"""Frames on lanes: what `p2pfl.core.wire` describes, read and written."""

import hmac

from p2pfl.core.errors import Malformed, StreamReset
from p2pfl.core.wire import (
    DIGEST_BYTES,
    LENGTH_BYTES,
    MAX_MESSAGE_BYTES,
    SPOKEN,
    VERSION,
    Message,
    Versions,
    decode_header,
    digest,
    encode_header,
    header_length,
    payload_length,
)
from p2pfl.node.budget import HEADER_BYTES, SKIPPED_BYTES, Allowance
from p2pfl.node.transport import IncomingLane, OutgoingLane

WRITE_BYTES = 256 * 1024
"""Up to here a payload leaves in one write with what surrounds it, beyond it is written where it lies: a frame of the
muxer."""


async def write_message(lane: OutgoingLane, message: Message, version: int = VERSION) -> None:
    """Write a message without a payload, in a version that its receiver speaks.

    Raises:
        StreamReset: the lane is broken.
    """
    await lane.write(encode_header(message, version))


async def write_bulk(
    lane: OutgoingLane, message: Message, payload: memoryview, trailer: bytes, version: int = VERSION
) -> None:
    """Write a message with its payload (bytes) and that payload's digest, in a version that its receiver speaks.

    Raises:
        StreamReset: the lane is broken.
    """
    header = encode_header(message, version)
    if len(payload) <= WRITE_BYTES:
        # One write, so one record of the channel where it fits: a small model pays for as few headers and tags as
        # possible.
        await lane.write(b"".join((header, payload, trailer)))
        return
    await lane.write(header)
    await lane.write(payload)
    await lane.write(trailer)


async def read_message(
    lane: IncomingLane,
    most: int = MAX_MESSAGE_BYTES,
    allowance: Allowance | None = None,
    versions: Versions = SPOKEN,
) -> Message | None:
    """Read a header of at most `most` bytes, at its writer's cost; None when the lane has ended cleanly.

    Args:
        lane: where it comes.
        most: bytes that it may have.
        allowance: what the writer may cost.
        versions: that this peer speaks.

    Raises:
        RemoteError: the bytes are no header.
        StreamReset: the lane broke.
    """
    prefix = bytearray(LENGTH_BYTES)
    if not await lane.read_into(memoryview(prefix)):
        return None
    header = bytearray(header_length(prefix, most))
    await _fill(lane, memoryview(header))
    if allowance is not None:
        await allowance.spend(1 + len(header) / HEADER_BYTES)
    return decode_header(header, versions)


async def read_payload(lane: IncomingLane, message: Message) -> bytearray:
    """Read the payload of an accepted message and check its digest.

    Raises:
        Malformed: the digest is not the payload's.
        StreamReset: the lane broke.
    """
    payload = bytearray(payload_length(message))
    if payload:
        await _fill(lane, memoryview(payload))
    trailer = bytearray(DIGEST_BYTES)
    await _fill(lane, memoryview(trailer))
    if not hmac.compare_digest(trailer, digest(payload)):
        raise Malformed("sent a payload that does not match its digest", lane.peer)
    return payload


async def skip_payload(lane: IncomingLane, message: Message, allowance: Allowance | None = None) -> None:
    """Read the payload of a refused message and forget it, in a buffer of bounded size and at its writer's cost.

    Raises:
        StreamReset: the lane broke.
    """
    left = payload_length(message) + DIGEST_BYTES
    scratch = memoryview(bytearray(min(left, WRITE_BYTES)))
    while left:
        piece = min(left, len(scratch))
        await _fill(lane, scratch[:piece])
        if allowance is not None:
            await allowance.spend(piece / SKIPPED_BYTES)
        left -= piece


async def _fill(lane: IncomingLane, view: memoryview) -> None:
    if not await lane.read_into(view):
        raise StreamReset(f"{lane.peer}: the stream ended in the middle of a frame")
