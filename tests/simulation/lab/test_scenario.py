"""What a scenario file may say, and how it is told, changed, spread and known."""

from itertools import product

import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.gossip.compress import COMPRESSORS
from p2pfl.gossip.robust import RULES
from p2pfl.gossip.schedule import SCHEDULES, WEIGHTS
from p2pfl.learning.algorithms import ALGORITHMS
from p2pfl.simulation import scenario as module
from p2pfl.simulation.attacks import ATTACKS
from p2pfl.simulation.scenario import (
    CHARTERS,
    CHARTERS_ONLY,
    NOT_SIMULATED,
    Scenario,
    documented,
    explain,
    load,
    names,
    points,
    put,
    tables,
    varied,
)

TASK = """
from p2pfl.learning.tasks.digits import Digits


class Mine(Digits):
    pass
"""


def scenario(**values):
    return validate(Scenario, values, "test")


@pytest.mark.parametrize("name", names())
def test_what_ships_can_be_read(name):
    found = load(name)
    assert found.name == name
    assert found.description
    for point in points(found) if found.sweep else [found]:
        assert point.averaging.topology in SCHEDULES
        assert point.training.algorithm in (*ALGORITHMS, "d-psgd")


def test_every_key_topology_and_algorithm_is_explained():
    told = list(explain())
    for kind in (Scenario, *tables(Scenario).values()):
        for key, words in documented(kind).items():
            assert len(words) > 5
            assert any(line.startswith(f"  {key} = ") for line in told)
    for name in (*SCHEDULES, *WEIGHTS, *ALGORITHMS, *COMPRESSORS, *ATTACKS, *RULES):
        assert any(line.split()[:1] == [name] for line in told), name


def test_a_scenario_is_explained_by_its_own_values():
    assert any(line.startswith("  rounds = 7 ") for line in explain(scenario(training={"rounds": 7})))


def test_the_federations_part_has_a_charters_keys_and_defaults():
    different = {("averaging", "masks"), ("averaging", "topology"), ("training", "options")}
    for table, kind in CHARTERS.items():
        own = tables(Scenario)[table].model_fields
        for name, field in kind.model_fields.items():
            if (table, name) not in different:
                assert own[name].default == field.default, (table, name)
    assert Scenario().averaging.masks == "off"


def test_lists_of_charters_keys_name_keys_that_charters_have():
    for table, keys in [*NOT_SIMULATED.items(), *CHARTERS_ONLY.items()]:
        assert set(keys) <= set(CHARTERS[table].model_fields)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peer": 4}, "peer: unknown setting"),
        ({"averaging": {"masks": "on"}, "privacy": {"epsilon": 1.0}}, "privacy.epsilon needs training.clip_norm"),
        ({"training": {"clip_norm": 1.0}, "privacy": {"epsilon": 1.0}}, "noise is for masked sums"),
        ({"averaging": {"weights": "samples"}}, "averaging.weights: is not simulated; leave it out"),
        ({"averaging": {"topology": "groups", "masks": "on", "bits": 16}}, "averaging.bits: is not simulated"),
        ({"seeds": 3}, "seeds: input should be a valid list, got 3"),
        ({"seeds": []}, "seeds: list should have at least 1 item"),
        ({"averaging": {"topology": "ring", "masks": "on"}}, "masks are on and the topology is ring"),
        ({"stopping": {"patience": 3}}, "need a metric"),
        ({"seeds": [1, 1]}, "a seed is there twice"),
        ({"data": {"alpha": 0.0}}, "data.alpha"),
        ({"faults": {"parts": 17}}, "16 peers cannot be split into 17 parts"),
        ({"faults": {"split": 9, "heal": 3}}, "swap them"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(values, words):
    with pytest.raises(InvalidConfig, match=words) as raised:
        scenario(**values)
    assert "\n" not in str(raised.value)


def test_a_file_is_read_with_changes(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("peers = 5\n[training]\nrounds = 3\n")
    found = load(str(path), ["training.rounds=9", "averaging.topology=ring", "seeds=[4, 5]"])
    assert (found.name, found.peers, found.training.rounds) == ("mine", 5, 9)
    assert (found.averaging.topology, found.seeds) == ("ring", (4, 5))
    with pytest.raises(InvalidConfig, match="key=value"):
        load(str(path), ["peers"])
    with pytest.raises(InvalidConfig, match="peers is no table"):
        load(str(path), ["peers.more=1"])
    with pytest.raises(InvalidConfig, match="neither a file nor one of"):
        load("nowhere")


def test_a_tasks_and_a_graphs_file_are_beside_the_scenario(tmp_path):
    (tmp_path / "task.py").write_text(TASK)
    (tmp_path / "graph.txt").write_text("0 1\n1 2\n")
    path = tmp_path / "mine.toml"
    path.write_text(
        'peers = 3\n[data]\ntask = "task.py:Mine"\n[averaging]\ntopology = "graph"\noptions = {file = "graph.txt"}\n'
    )
    found = load(str(path))
    assert found.data.task == f"{tmp_path / 'task.py'}:Mine"
    assert found.averaging.options == {"file": str(tmp_path / "graph.txt")}
    before = found.hash()
    (tmp_path / "graph.txt").write_text("0 1\n1 2\n0 2\n")
    between = found.hash()
    (tmp_path / "task.py").write_text(TASK + "\n")
    assert len({before, between, found.hash()}) == 3


def test_data_is_beside_the_scenario_and_known_by_what_is_in_it(tmp_path, monkeypatch):
    (tmp_path / "images" / "cats").mkdir(parents=True)
    (tmp_path / "images" / "cats" / "a").write_bytes(b"a")
    path = tmp_path / "mine.toml"
    path.write_text('[data]\nsettings = {path = "images"}\n')
    found = load(str(path))
    assert found.data.settings == {"path": str(tmp_path / "images")}
    before = found.hash()
    (tmp_path / "images").rename(tmp_path / "moved")
    with pytest.raises(InvalidConfig, match=r"images: No such file or directory; correct data\.settings"):
        found.hash()
    # What is given in words is relative to where one is, not to the scenario.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    moved = load(str(path), ["data.settings.path=../moved"])
    assert moved.data.settings == {"path": str(tmp_path / "moved")}
    assert moved.hash() == before
    (tmp_path / "moved" / "cats" / "a").rename(tmp_path / "moved" / "cats" / "b")
    between = moved.hash()
    (tmp_path / "moved" / "cats" / "b").write_bytes(b"other")
    assert len({before, between, moved.hash()}) == 3
    assert load(str(path), ["data.task=../task.py:Mine"]).data.task == f"{tmp_path}/task.py:Mine"


def test_a_run_is_known_by_what_its_results_follow_from():
    plain = Scenario()
    assert scenario(name="other", description="words").hash() == plain.hash()
    others = [scenario(seeds=[1]), scenario(peers=17), scenario(data={"alpha": 0.4}), scenario(cost={"latency": 0.0})]
    assert len({each.hash() for each in (plain, *others)}) == 5


def test_a_scenario_written_out_is_the_same(tmp_path):
    path = tmp_path / "written.toml"
    for name in names():
        found = load(name)
        path.write_text(found.to_toml())
        assert load(str(path)) == found
        assert load(str(path)).hash() == found.hash()


def test_a_sweep_is_every_combination():
    swept = scenario(sweep={"data.alpha": [0.1, 1.0], "averaging.topology": ["ring", "complete", "path"]})
    found = [(point.data.alpha, point.averaging.topology) for point in points(swept)]
    assert found == list(product([0.1, 1.0], ["ring", "complete", "path"]))
    assert all(not point.sweep for point in points(swept))
    more = varied(swept, ["data.alpha=[0.5]", "training.rounds=[1, 2]"])
    assert len(points(more)) == 6


def test_a_sweep_says_what_is_wrong_with_it(monkeypatch):
    with pytest.raises(InvalidConfig, match="no sweep"):
        points(Scenario())
    with pytest.raises(InvalidConfig, match=r"with data\.alpha = -1\.0: data\.alpha"):
        points(scenario(sweep={"data.alpha": [0.1, -1.0]}))
    with pytest.raises(InvalidConfig, match="unknown setting"):
        points(scenario(sweep={"data.nothing": [1]}))
    with pytest.raises(InvalidConfig, match=r"write key=\[value"):
        varied(Scenario(), ["data.alpha=0.1"])
    monkeypatch.setattr(module, "MOST_POINTS", 3)
    with pytest.raises(InvalidConfig, match="a sweep of 4 runs"):
        points(scenario(sweep={"peers": [2, 3, 4, 5]}))


def test_what_is_set_is_swept_no_more(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[sweep]\n"averaging.options" = [{size = 4}, {size = 8}]\n"data.alpha" = [0.1, 1.0]\npeers = [8, 16]\n'
    )
    assert set(load(str(path)).sweep) == {"averaging.options", "data.alpha", "peers"}
    found = load(str(path), ["peers=9", "averaging.options.size=3", 'data={task="digits"}'])
    assert (found.peers, found.averaging.options, found.sweep) == (9, {"size": 3}, {})
    beside = load(str(path), ["averaging.topology=ring"])
    assert set(beside.sweep) == {"averaging.options", "data.alpha", "peers"}
    later = load(str(path), ["peers=9", "sweep={peers=[2, 3]}"])
    assert dict(later.sweep) == {"peers": (2, 3)}


def test_put_keeps_what_is_beside():
    assert put({"a": {"b": 1, "c": 2}, "d": 3}, "a.b", 4) == {"a": {"b": 4, "c": 2}, "d": 3}
    assert put({}, "a.b.c", 1) == {"a": {"b": {"c": 1}}}
