"""AD-PSGD in virtual time: what is published of it, and what follows from its rule."""

import numpy as np
import pandas as pd
import pytest

from p2pfl.core.errors import InvalidConfig
from p2pfl.core.settings import validate
from p2pfl.simulation.asynchronous import _Pairs
from p2pfl.simulation.parts import Parts
from p2pfl.simulation.scenario import Scenario
from p2pfl.simulation.simulate import simulate

PEERS, ROUNDS, SLOWNESS = 8, 60, 10.0


def scenario(algorithm="ad-psgd", **values):
    settings = {
        "peers": PEERS, "seeds": [1, 2], "engine": "simnet",
        "training": {"algorithm": algorithm, "rounds": ROUNDS, "local_steps": 1, "batch_size": 16},
        "data": {"partition": "iid"}, "averaging": {"topology": "exponential"},
        "evaluation": {"times": 7, "peers": PEERS}, "cost": {"step_seconds": 1.0},
    }  # fmt: skip
    for key, value in values.items():
        settings[key] = settings.get(key, {}) | value if isinstance(value, dict) else value
    return validate(Scenario, settings, "test")


SLOW = {"slow": 1, "slowness": SLOWNESS}


def last(run, column):
    return run.frame[run.frame["round"] == run.frame["round"].max()][column].mean()


def test_a_slow_peer_does_not_slow_the_others_down_at_like_loss_per_gradient():
    """Lian et al. 2018, section 5.4 and figure 4: one slow worker costs synchronous D-PSGD its factor, AD-PSGD little.

    With n peers of which one is so slow that it hardly counts, as many gradients take n / (n - 1) of the time. Early
    on models are farther apart than in rounds, and worse; that evens out.
    """
    many = {"training": {"rounds": 240}, "evaluation": {"times": 2}}
    own, slowed = simulate(scenario(**many)), simulate(scenario(cost=SLOW, **many))
    rounds, held_up = simulate(scenario("d-psgd", **many)), simulate(scenario("d-psgd", cost=SLOW, **many))
    assert last(held_up, "modelled_seconds") > 0.8 * SLOWNESS * last(rounds, "modelled_seconds")
    assert last(slowed, "modelled_seconds") < 1.02 * PEERS / (PEERS - 1) * last(own, "modelled_seconds")
    # As many gradients, and as good a model; measured here 0.109 and 0.108 against 0.116.
    for run in (own, slowed):
        assert last(run, "loss") == pytest.approx(last(rounds, "loss"), rel=0.15)
        assert last(run, "accuracy") == pytest.approx(last(rounds, "accuracy"), abs=0.015)


def test_equal_seeds_give_equal_bits_and_others_others():
    one, other = simulate(scenario(cost=SLOW)), simulate(scenario(cost=SLOW))
    pd.testing.assert_frame_equal(one.frame, other.frame, check_exact=True)
    pd.testing.assert_frame_equal(one.peers, other.peers, check_exact=True)
    first, second = (one.frame[one.frame["seed"] == seed]["loss"].dropna().to_numpy() for seed in (1, 2))
    assert (first != second).all()


def test_an_exchange_keeps_the_mean_and_a_turn_moves_it_by_its_own_step():
    terms = scenario(seeds=[1], cost=SLOW)
    pairs = _Pairs(terms, Parts(terms), 1, set())
    pairs._locals = [pairs._begin(peer) for peer in range(PEERS)]
    for peer in (3, 3, 0, 7, 3):
        before, moved = pairs._models().astype(np.float64), pairs._states[peer]["moved"]
        pairs._end(peer)
        after = pairs._models().astype(np.float64)
        step = pairs._space.rows(moved)[0].numpy()
        np.testing.assert_allclose(after.sum(0) - before.sum(0), step, atol=1e-5)
        changed = np.flatnonzero((after != before).any(1))
        assert len(changed) <= 2
        assert set(changed) <= {peer, *pairs._neighbors[peer]}
        pairs._locals[peer] = pairs._begin(peer)


def test_a_row_stands_for_as_many_gradients_as_a_round():
    run = simulate(scenario(seeds=[1], cost=SLOW, training={"rounds": 12}))
    assert list(run.frame["round"]) == [*range(13)]
    seconds = run.frame["modelled_seconds"].to_numpy()
    assert (np.diff(seconds) > 0).all()
    # The slow one ends a turn every tenth row or so.
    assert run.frame["working"].iloc[1] == PEERS - 1
    assert run.frame["working"].iloc[1:].max() == PEERS
    sent = run.frame["modelled_bytes"].to_numpy()
    np.testing.assert_allclose(np.diff(sent), 2 * 4 * 4810)


def test_a_run_ends_where_the_rule_says():
    many = {"evaluation": {"times": ROUNDS + 1}}
    whole = simulate(scenario(**many))
    run = simulate(scenario(stopping={"metric": "accuracy", "target": 0.8}, **many))
    for seed, rows in whole.frame.groupby("seed"):
        reached = int(np.argmax(rows["accuracy"] >= 0.8))
        ended = run.frame[run.frame["seed"] == seed]
        assert 0 < ended["round"].max() == reached < ROUNDS
        pd.testing.assert_frame_equal(
            ended.reset_index(drop=True), rows.head(len(ended)).reset_index(drop=True), check_exact=True
        )
    assert {seed["outcome"] for seed in run.summary["seeds"]} == {"reached"}


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"engine": "dense"}, 'ad-psgd has no rounds, and the engine dense has no clock; set engine to "simnet"'),
        ({"averaging": {"topology": "groups", "masks": "on"}}, "each sees the other's model; set masks to off"),
        ({"averaging": {"topology": "one-peer-exponential"}}, "changes by rounds"),
        ({"faults": {"leave": 0.1}}, "faults is of rounds, which ad-psgd has not"),
        ({"compression": {"name": "sign"}}, "compression is of rounds"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_line(values, reason):
    with pytest.raises(InvalidConfig, match=reason):
        simulate(scenario(**values))


def test_a_round_of_stacked_tensors_takes_as_long_as_its_slowest_peer():
    for engine in ("dense", "simnet"):
        usual = simulate(scenario("d-psgd", engine=engine, seeds=[1]))
        slowed = simulate(scenario("d-psgd", engine=engine, seeds=[1], cost=SLOW))
        ratio = last(slowed, "modelled_seconds") / last(usual, "modelled_seconds")
        assert 0.8 * SLOWNESS < ratio <= SLOWNESS * 1.01
