"""Traces on disk: a reader that follows sees whole lines, each once."""

from pathlib import Path

import pytest

from p2pfl.core.errors import InvalidConfig, Malformed
from p2pfl.core.trace import Entry, Event, Note, PeerFinished, PeerStarted, RoundEnded, encode_entry
from p2pfl.node.tracefile import (
    TRACE_FILE,
    TraceReader,
    TraceWriter,
    first_round,
    older_of,
    read_trace,
    trace_begins,
)


def notes(entries: list[Entry]) -> list[str]:
    return [entry.event.text for entry in entries if isinstance(entry.event, Note)]


def test_what_is_written_is_read_with_the_bytes_so_far(tmp_path: Path) -> None:
    path = tmp_path / "run" / TRACE_FILE
    traffic = iter([(0, 0), (10, 20)])
    writer = TraceWriter(path, lambda: next(traffic))
    writer.write(Note("Größe\n\u2028"))
    writer.write(PeerFinished("done", 3, agreed=True))
    entries = read_trace(path)  # before it is closed: a line is there once it is written
    writer.close()
    assert [entry.event for entry in entries] == [Note("Größe\n\u2028"), PeerFinished("done", 3, agreed=True)]
    assert [(entry.bytes_in, entry.bytes_out) for entry in entries] == [(0, 0), (10, 20)]
    assert 1.7e9 < entries[0].at <= entries[1].at


def test_a_second_run_goes_on_behind_the_first(tmp_path: Path) -> None:
    path = tmp_path / TRACE_FILE
    for text in ("first", "second"):
        skipping = TraceReader(path, skip=True)
        writer = TraceWriter(path, lambda: (0, 0))
        writer.write(Note(text))
        writer.close()
        assert notes(list(skipping.read_new())) == [text]
    assert notes(read_trace(path)) == ["first", "second"]


def test_a_follower_waits_for_the_file_and_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / TRACE_FILE
    reader = TraceReader(path)
    assert list(reader.read_new()) == []
    lines = [encode_entry(Entry(1.0, 0, 0, Note(f"number {number}"))) + "\n" for number in range(3)]
    seen: list[str] = []
    with path.open("w", buffering=1) as file:
        for character in "".join(lines):
            file.write(character)
            file.flush()
            new = notes(list(reader.read_new()))
            assert bool(new) == (character == "\n")
            seen += new
    assert seen == ["number 0", "number 1", "number 2"]
    assert list(reader.read_new()) == []


def test_a_half_line_does_not_hide_the_whole_ones_before_it(tmp_path: Path) -> None:
    path = tmp_path / TRACE_FILE
    line = encode_entry(Entry(1.0, 0, 0, Note("whole"))) + "\n"
    path.write_text(line * 2 + line[:20])
    assert notes(read_trace(path)) == ["whole", "whole"]


@pytest.mark.parametrize("content", [b"hello\n", b"\xff\xfe\n", b"\n", b"{}\n", b"\x00\n"])
def test_a_line_that_is_none_is_malformed_and_the_next_one_is_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / TRACE_FILE
    path.write_bytes(content + encode_entry(Entry(1.0, 0, 0, Note("behind"))).encode() + b"\n")
    with pytest.raises(Malformed):
        read_trace(path)
    reader = TraceReader(path)
    with pytest.raises(Malformed):
        list(reader.read_new())
    assert notes(list(reader.read_new())) == ["behind"]


def test_a_trace_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="there is no trace; name the folder of a run"):
        read_trace(tmp_path / TRACE_FILE)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InvalidConfig, match="the trace cannot be written"):
        TraceWriter(tmp_path / "file" / TRACE_FILE, lambda: (0, 0))


def test_a_trace_stays_within_its_bound_and_a_follower_misses_nothing(tmp_path: Path) -> None:
    path = tmp_path / TRACE_FILE
    most = 2_000
    follower, slow = TraceReader(path), TraceReader(path)
    writer = TraceWriter(path, lambda: (0, 0), most)
    seen, seen_slowly = [], []
    for number in range(60):
        writer.write(Note(f"number {number}"))
        seen += notes(list(follower.read_new()))
        if number % 7 == 0:
            seen_slowly += notes(list(slow.read_new()))
    writer.close()
    seen_slowly += notes(list(slow.read_new()))
    assert seen == seen_slowly == [f"number {number}" for number in range(60)]
    kept = notes(read_trace(path))
    assert kept == seen[-len(kept) :], "the latest, without a gap"
    assert most < sum(file.stat().st_size for file in tmp_path.iterdir()) <= 2 * most
    assert len(list(tmp_path.iterdir())) == 2


def test_a_new_writer_counts_what_is_there_and_a_new_follower_skips_it(tmp_path: Path) -> None:
    path = tmp_path / TRACE_FILE
    for text in ("first", "second"):
        skipping = TraceReader(path, skip=True)
        writer = TraceWriter(path, lambda: (0, 0), 150)
        writer.write(Note(text * 10))
        writer.close()
        assert notes(list(skipping.read_new())) == [text * 10]
    assert notes(read_trace(path)) == ["first" * 10, "second" * 10]
    assert older_of(path).exists()


def test_a_crash_between_two_files_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / TRACE_FILE
    older_of(path).write_text(encode_entry(Entry(1.0, 0, 0, Note("kept"))) + "\n")
    assert notes(read_trace(path)) == ["kept"]
    writer = TraceWriter(path, lambda: (0, 0))
    writer.write(Note("new"))
    writer.close()
    assert notes(read_trace(path)) == ["kept", "new"]


def test_a_malformed_line_in_the_older_file_hides_nothing_behind_it(tmp_path: Path) -> None:
    path = tmp_path / TRACE_FILE
    lines = [encode_entry(Entry(1.0, 0, 0, Note(text))) + "\n" for text in ("older", "newer")]
    older_of(path).write_text("hello\n" + lines[0])
    path.write_text(lines[1])
    reader = TraceReader(path)
    with pytest.raises(Malformed):
        list(reader.read_new())
    assert notes(list(reader.read_new())) == ["older", "newer"]


def started(resumed_at: int = 0) -> PeerStarted:
    return PeerStarted("ant", "id", "00", (), 3, 5, resumed_at)


def ended(round: int) -> RoundEnded:
    return RoundEnded(round=round, seconds=1.0, heard=(), absent={}, loss=None, spread=0.0, settling=False)


@pytest.mark.parametrize(
    ("events", "first"),
    [
        ([], 0),
        ([started(), ended(0), started(7), ended(8)], 0),
        ([ended(5), Note("x"), ended(6), started(7), ended(8)], 5),
        ([started(7), ended(8)], 7),
        ([Note("x"), ended(0)], 0),
        ([ended(5), started(), ended(0)], 0),
    ],
)
def test_a_trace_tells_from_which_round_on_it_speaks(tmp_path: Path, events: list[Event], first: int) -> None:
    path = tmp_path / TRACE_FILE
    assert trace_begins(path) == first_round([]) == 0
    writer = TraceWriter(path, lambda: (0, 0))
    for event in events:
        writer.write(event)
    writer.close()
    assert trace_begins(path) == first_round(events) == first


def test_a_trace_that_was_put_aside_twice_speaks_from_its_oldest_file_on(tmp_path: Path) -> None:
    path = tmp_path / TRACE_FILE
    writer = TraceWriter(path, lambda: (0, 0), 2_000)
    for event in (started(), *map(ended, range(40))):
        writer.write(event)
    writer.close()
    kept = [entry.event.round for entry in read_trace(path) if isinstance(entry.event, RoundEnded)]
    assert 0 < kept[0] == trace_begins(path)
    with path.open("a") as file:
        file.write('{"event":"round","at":half a line\n')
    assert kept[0] == trace_begins(path)
