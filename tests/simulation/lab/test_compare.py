"""What is said of runs beside each other."""

from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from p2pfl.core.settings import validate
from p2pfl.simulation.compare import compare, cost_words, labels_of
from p2pfl.simulation.scenario import Scenario
from p2pfl.simulation.simulate import simulate


def scenario(**other):
    return validate(
        Scenario,
        {
            "name": "small", "peers": 5, "seeds": [0, 1], "training": {"rounds": 1, "batch_size": 8},
            "averaging": {"topology": "ring"}, "evaluation": {"times": 2, "peers": 3},
        } | other,
        "test",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run():
    return simulate(scenario())


def test_bytes_of_real_peers_are_counted_and_others_modelled(run):
    real = replace(run, scenario=scenario(engine="simnet"))
    pairs = replace(run, scenario=scenario(engine="simnet", training={"algorithm": "ad-psgd"}))
    assert "counted" not in cost_words([run, pairs])
    assert "modelled" not in cost_words([real])
    assert "counted" in cost_words([run, real])
    assert "modelled" in cost_words([run, real])


def printed(made, width):
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(made)
    return capture.get()


WIDE = {
    "median": 0.1234, "low": 0.1111, "high": 0.2222, "worst_peer": 0.3333, "consensus": 0.00044, "rounds_to": 777.0,
    "modelled_bytes": 55.5e6, "modelled_seconds": 66666.6,
}  # fmt: skip
CELLS = {"0.1234", "0.1111", "0.2222", "0.3333", "0.00044", "777", "55.5", "MB", "66666.6", "s"}
NAMES = {"median", "quartiles", "worst", "peer", "consensus", "sent", "takes"}


@pytest.mark.parametrize("width", [24, 40, 79, 80, 120])
def test_no_number_is_cut_and_no_column_left_out(run, width):
    made = compare([run, run])
    made = replace(
        made, labels=("a name of many words", "b" * 30), table=pd.DataFrame([made.table.iloc[0].to_dict() | WIDE] * 2)
    )
    text = printed(made, width)
    assert set(text.split()) >= CELLS | NAMES
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    assert text.count("0.1234") == text.count("66666.6") == 2
    assert "b" * 20 in "".join(text.split())


def test_columns_in_which_nothing_is_are_left_out(run):
    made = compare([run], "loss")
    assert "rounds to" not in printed(made, 200)
    lone = compare([replace(run, scenario=scenario(seeds=[0]))])
    assert "quartiles" not in printed(lone, 200)
    assert "one seed" in printed(lone, 200)
    assert "small 0" not in printed(lone, 200)  # there is nothing to tell it from


def labels(run, *others):
    return labels_of([replace(run, scenario=scenario(**other)) for other in others])


def test_a_value_that_says_too_little_has_its_key(run):
    assert labels(run, {"stopping": {"metric": ""}}, {"stopping": {"metric": "loss"}}) == ["no metric", "metric loss"]
    assert labels(run, {"peers": 6}, {"peers": 7, "evaluation": {"times": 2, "peers": 4}}) == [
        "peers 6, evaluation.peers 3", "peers 7, evaluation.peers 4",
    ]  # fmt: skip
    both = {"attackers": {"attack": "sign-flip", "count": 1}, "defence": {"rule": "none"}}
    assert labels(run, {"attackers": {"count": 1}}, both, both | {"defence": {"rule": "median"}})[0] == (
        "attack none, rule none"
    )
    assert labels(run, both, both | {"attackers": {"attack": "scaling", "count": 1}}) == ["sign-flip", "scaling"]


def test_unlike_runs_have_their_scenarios_names(run):
    training = {"rounds": 2, "batch_size": 4, "algorithm": "local-sgd"}
    unlike = {"name": "other", "peers": 7, "training": training, "averaging": {"topology": "path"}}
    assert labels(run, {}, unlike) == ["small", "other"]
    assert labels(run, {}, unlike, unlike | {"peers": 8}) == ["small", "other: peers 7", "other: peers 8"]
    assert labels(run, {}, unlike | {"name": "small"}) == [
        "peers 5, d-psgd, rounds 1, batch_size 8, ring", "peers 7, local-sgd, rounds 2, batch_size 4, path",
    ]  # fmt: skip


def test_the_worst_peer_is_that_of_the_metric(run):
    for metric in ("accuracy", "loss", "peer_loss"):
        own = metric.removeprefix("peer_")
        last = run.peers[run.peers["round"] == 1].groupby("seed")[own]
        worst = last.min() if own == "accuracy" else last.max()
        assert compare([run], metric).table["worst_peer"][0] == pytest.approx(worst.median())
    assert compare([run]).table["worst_peer"][0] == pytest.approx(run.summary["final"]["worst_peer"]["median"])
    assert compare([run], "consensus").table["worst_peer"].isna().all()
