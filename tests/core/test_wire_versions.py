"""Versions of the messages beside each other: stored frames of each are read, and peers find the highest in common."""

from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pfl.core.errors import Malformed, WrongVersion
from p2pfl.core.ids import Round
from p2pfl.core.statements import (
    KINDS,
    Acknowledged,
    Advert,
    Challenge,
    Content,
    Deal,
    Enrolment,
    Products,
    Proposal,
    Ready,
    Result,
    Returned,
    Reveal,
    Roots,
    SecondChallenge,
    SecondProducts,
    Statement,
    Vote,
    encode_body,
)
from p2pfl.core.wire import (
    LENGTH_BYTES,
    MAX_VERSION,
    SPOKEN,
    VERSION,
    Bye,
    Chunk,
    Have,
    Hello,
    Message,
    Part,
    Ping,
    Proof,
    Told,
    Update,
    Versions,
    Want,
    Whereabouts,
    decode_header,
    encode_header,
)

FOLDER = Path(__file__).parent / "vectors"
CHARTER, SESSION = bytes(range(32)), bytes(range(32, 64))
ROUND = Round(300)
DIGEST, SIGNATURE = bytes(range(64, 96)), bytes(range(64))
CONTENTS: tuple[Content, ...] = (
    Advert(ROUND, 1, 2.5, bytes(range(64)), DIGEST),
    Enrolment(ROUND, 1, (0, 3, 200), (DIGEST, SESSION, CHARTER), DIGEST),
    Ready(ROUND, SESSION, DIGEST),
    Roots(ROUND, SESSION, (DIGEST, CHARTER)),
    Acknowledged(ROUND, SESSION, (0, 200)),
    Proposal(ROUND, SESSION, (0, 3), (0, 3, 200)),
    Vote(ROUND, SESSION, (0, 3, 200)),
    Result(ROUND, SESSION, 2, DIGEST),
    Deal(ROUND, SESSION, (DIGEST,), (CHARTER,), (b"", b"\x01" * 32), (b"\x02" * 48, b"")),
    Reveal(ROUND, SESSION, b"\x03" * 32, (b"", b"\x04" * 32)),
    Returned(ROUND, SESSION, (3, 200), (b"\x05" * 48, b"\x06" * 48)),
    Challenge(ROUND, SESSION, (DIGEST, CHARTER), DIGEST, 5),
    Products(ROUND, SESSION, (b"\x07" * 16, b""), (b"\x08" * 16,)),
    SecondChallenge(ROUND, SESSION, (DIGEST,), DIGEST, 2**63),
    SecondProducts(ROUND, SESSION, (b"",), (b"\x09" * 16,)),
)


def statement(signer: int, content: Content) -> Statement:
    return Statement(signer, encode_body(content), SIGNATURE, content)


def frames(version: int) -> Mapping[str, Message]:
    """What is stored of a version, by the name of its file: a later one may say something else in the same words."""
    statements = {type(content).__name__: statement(3, content) for content in CONTENTS}
    told = {f"Told-{name}": Told(CHARTER, ROUND, each) for name, each in statements.items()}
    where = ("/ip4/192.0.2.1/tcp/4001", "/dns4/peer.example.org/tcp/4001")
    return {
        "Hello": Hello(CHARTER, ROUND, Versions(version, version)),
        "Hello-of-several-versions": Hello(CHARTER, ROUND, Versions(version, version + 3)),
        "Ping": Ping(CHARTER, Round(2**48)),
        "Update": Update(CHARTER, ROUND, 2**33, 0.1, True, 40_000),
        "Bye": Bye(CHARTER, Round(0)),
        "Have": Have(CHARTER, ROUND, 2, SESSION, (*range(len(KINDS) - 1), 2**64 - 1)),
        "Want": Want(CHARTER, ROUND, SESSION, Part.AVERAGE, 63),
        "Chunk": Chunk(CHARTER, ROUND, SESSION, Part.RESULT, 7, 100_000),
        "Proof": Proof(CHARTER, ROUND, tuple(statements[name] for name in ("Enrolment", "Vote", "Result"))),
        "Whereabouts": Whereabouts(CHARTER, Round(0), "12D3KooWant", 2**40, where, SIGNATURE),
        **told,
    }


STORED = [
    (version, name, message)
    for version in range(SPOKEN.lowest, SPOKEN.highest + 1)
    for name, message in frames(version).items()
]


@pytest.mark.parametrize(("version", "name", "message"), STORED, ids=[f"v{v}-{name}" for v, name, _ in STORED])
def test_every_stored_frame_is_read_and_written_as_it_was(version: int, name: str, message: Message) -> None:
    stored = (FOLDER / f"wire-v{version}" / f"{name}.bin").read_bytes()
    assert decode_header(stored[LENGTH_BYTES:], SPOKEN) == message
    assert encode_header(message, version) == stored


def test_every_kind_of_message_and_statement_is_stored_in_every_version_that_is_spoken() -> None:
    assert {type(message) for message in frames(VERSION).values()} == set(get_args(Message))
    assert {type(content) for content in CONTENTS} == set(KINDS)
    for version in range(SPOKEN.lowest, SPOKEN.highest + 1):
        files = {file.stem for file in (FOLDER / f"wire-v{version}").iterdir()}
        assert files == set(frames(version)), "a frame that is stored stays"


versions = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(lambda pair: Versions(min(pair), max(pair)))


@given(versions, versions)
def test_two_peers_find_the_highest_version_in_common_and_both_the_same(one: Versions, other: Versions) -> None:
    shared = [version for version in range(10) if version in one and version in other]
    if shared:
        assert one.common(other) == other.common(one) == max(shared)
        return
    for here, there in ((one, other), (other, one)):
        with pytest.raises(WrongVersion, match=f"^speaks wire version {there}, this peer {here}: "):
            here.common(there)


@given(versions)
def test_a_hello_is_read_whatever_its_sender_speaks(spoken: Versions) -> None:
    hello = Hello(CHARTER, ROUND, spoken)
    for ours in (Versions(4, 4), Versions(7, 9), Versions(MAX_VERSION, MAX_VERSION)):
        assert decode_header(encode_header(hello)[LENGTH_BYTES:], ours) == hello


def test_anything_else_is_read_in_versions_that_are_spoken_only() -> None:
    ping = Ping(CHARTER, ROUND)
    for version in range(3, 8):
        header = encode_header(ping, version)[LENGTH_BYTES:]
        if 4 <= version <= 6:
            assert decode_header(header, Versions(4, 6)) == ping
        else:
            with pytest.raises(Malformed, match=f"^wire version {version}; this peer speaks 4 to 6"):
                decode_header(header, Versions(4, 6))


def test_who_needs_a_newer_release_is_said() -> None:
    with pytest.raises(WrongVersion, match=r"^speaks wire version 2 to 3, this peer 4: it needs a newer p2pfl$"):
        Versions(4, 4).common(Versions(2, 3))
    with pytest.raises(WrongVersion, match=r"^speaks wire version 5, this peer 4: this peer needs a newer p2pfl$"):
        Versions(4, 4).common(Versions(5, 5))


if __name__ == "__main__":
    folder = FOLDER / f"wire-v{VERSION}"
    folder.mkdir(parents=True)
    for stem, frame in frames(VERSION).items():
        (folder / f"{stem}.bin").write_bytes(encode_header(frame))
