"""What is said of runs beside each other."""

from dataclasses import replace

import pandas as pd
import pytest
from rich.console import Console

from p2pfl.core.settings import validate
from p2pfl.simulation.compare import compare, cost_words, labels_of, trend_of
from p2pfl.simulation.run_plots import comparison_figure, png, run_figure, trend_figure
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


def test_a_trend_is_of_runs_that_are_alike_in_all_else(run):
    def trend(*others):
        return trend_of([replace(run, scenario=scenario(**other)) for other in others])

    peers = [{"peers": 6}, {"peers": 7}, {"peers": 8}]
    assert trend(*peers).values == (6, 7, 8)
    unlike = [{"averaging": {"topology": name}} for name in ("ring", "path", "star")]
    assert trend(*(one | other for one, other in zip(peers, unlike, strict=True))) is None
    assert trend(*peers, {"peers": 9} | unlike[1]).groups == ("ring", "ring", "ring", "path")


def widths(figure):
    png(figure)  # lays it out
    return [axes.get_position().width for axes in figure.axes]


def test_long_names_leave_panels_their_width(run):
    names = [f"{place} {'word ' * 40}" for place in range(24)]
    assert min(widths(comparison_figure([run] * 24, names, "loss"))) > 0.12
    assert min(widths(trend_figure([run] * 24, [*range(24)], names, "peers", "loss"))) > 0.2


def test_a_figure_of_many_runs_says_that_its_curves_have_no_bands(run):
    def title(count):
        return comparison_figure([run] * count, ["a name"] * count, "loss").get_suptitle()

    assert title(2) == "median and quartiles over 2 seeds"
    assert title(20) == "median, and quartiles at the end, over 2 seeds"


def test_lines_beside_the_names_are_outside_of_the_panel(run):
    figure = comparison_figure([run] * 2, ["one", "other"], "loss")
    png(figure)
    last = figure.axes[2]
    edge = last.get_window_extent().x1
    assert [line.get_window_extent().x0 > edge for line in last.lines if not line.get_clip_on()].count(True) == 2


def test_numbers_of_a_logarithmic_axis_have_one_size(run):
    axes = run_figure(run).axes[1]
    axes.set_ylim(0.1, 0.9)
    sizes = {text.get_fontsize() for text in (*axes.get_yticklabels(), *axes.get_yticklabels(minor=True))}
    assert axes.get_yticklabels(minor=True)
    assert sizes == {8.0}
