"""Event files, read back as TensorBoard reads them."""

import struct
import sys

import pytest

from p2pfl import cli
from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.simulation.events import write_events
from p2pfl.simulation.scenario import Scenario
from p2pfl.simulation.simulate import simulate


def scenario():
    return validate(
        Scenario, {"peers": 4, "seeds": [0, 7], "training": {"rounds": 3}, "averaging": {"topology": "ring"}}, "test"
    )


def records(path):
    """Return the records of a TFRecord file: lengths and contents each followed by their masked CRC-32C."""
    crc32c = pytest.importorskip("tensorboardX.crc32c", reason="needs the extra tensorboard").crc32c
    data, found = path.read_bytes(), []
    while data:
        (length,), (checked,) = struct.unpack("<Q", data[:8]), struct.unpack("<I", data[8:12])
        content, (also,) = data[12 : 12 + length], struct.unpack("<I", data[12 + length : 16 + length])
        for part, said in ((data[:8], checked), (content, also)):
            crc = crc32c(part)
            assert said == (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF
        found.append(content)
        data = data[16 + length :]
    return found


def scalars(folder):
    """Return the scalars of a folder's one event file: (name, step) to value and time."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2", reason="needs the extra tensorboard")
    (path,) = folder.iterdir()
    events = [event_pb2.Event.FromString(record) for record in records(path)]
    return {
        (value.tag, event.step): (value.simple_value, event.wall_time)
        for event in events for value in event.summary.value
    }  # fmt: skip


def test_each_seeds_curves_are_in_its_events(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    run = simulate(scenario(), tmp_path)
    for _ in range(2):  # written anew, not twice
        folders = write_events(run)
    assert [folder.name for folder in folders] == ["seed-0", "seed-7"]
    for seed, folder in zip((0, 7), folders, strict=True):
        found = scalars(folder)
        rows = run.frame[run.frame["seed"] == seed].set_index("round")
        for column in rows.columns.drop("seed"):
            for round, value in rows[column].dropna().items():
                said, at = found.pop((column, round))
                assert said == pytest.approx(value)
                assert at == pytest.approx(rows.loc[round, "modelled_seconds"])
        assert not found


def test_what_is_missing_for_events_is_told(tmp_path, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "tensorboardX", None)
        with pytest.raises(InvalidConfig, match=r"p2pfl-mesh\[tensorboard\]"):
            write_events(simulate(scenario(), tmp_path))
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    with pytest.raises(InvalidConfig, match="kept in no folder"):
        write_events(simulate(scenario()))


def test_commands_write_events_if_asked(tmp_path, capsys):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    (tmp_path / "mine.toml").write_text("peers = 4\n[training]\nrounds = 2\n[sweep]\n'data.alpha' = [0.1, 1.0]\n")
    given = [str(tmp_path / "mine.toml"), "--runs", str(tmp_path / "runs"), "--tensorboard"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["sweep", *given, "--jobs", "1"])
    assert ended.value.code == 0
    assert f"tensorboard --logdir {tmp_path / 'runs' / 'mine'}" in capsys.readouterr().out.replace("\n", "")
    assert len(list((tmp_path / "runs" / "mine").glob("*/tensorboard/seed-0/events*"))) == 2
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", *given, "--set", "sweep={}"])
    assert ended.value.code == 0
    assert len(list((tmp_path / "runs").glob("mine-*/tensorboard/seed-0/events*"))) == 1
