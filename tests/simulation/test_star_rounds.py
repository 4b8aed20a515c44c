"""Rounds in stars on a simulated network: who is in which sum, what an absence costs, that all end near one model."""

from collections.abc import Iterator

import numpy as np
import pytest

from p2pfl.core.ids import Round
from p2pfl.core.machine import Effect, Send, SendBulk
from p2pfl.core.statements import Acknowledged
from p2pfl.core.trace import PeerFinished, RoundEnded
from p2pfl.core.wire import Chunk, Part, Told, Update
from p2pfl.gossip.grouping import stars
from p2pfl.gossip.topology import overlay
from p2pfl.simulation.faults import Crash, Schedule
from p2pfl.simulation.simnet import Host, Network
from p2pfl.simulation.soak import PATIENCE, Case, plans_of, standard_network


def case_on(topology: str, peers: int, seed: int, *faults: Crash) -> Case:
    return Case(seed, "none", Schedule(faults) if faults else None, peers, topology=topology, masked=True)


def run(case: Case) -> Network:
    net = standard_network(case, log=True)
    net.run(PATIENCE)
    return net


def records(peer: Host) -> dict[int, RoundEnded]:
    return {event.round: event for _, event in peer.events if isinstance(event, RoundEnded)}


def drawn(case: Case, round: int) -> dict[int, tuple[int, ...]]:
    plan = plans_of(case)[0][0]
    return dict(stars(plan.beacon, Round(round), overlay(case.topology, case.peers, 0), plan.colluders))


def sent(net: Network) -> Iterator[tuple[float, int, Effect]]:
    for entry in net.log or ():
        if len(entry) == 4 and isinstance(entry[3], list):
            for effect in entry[3]:
                yield entry[0], entry[1], effect


@pytest.mark.parametrize(("topology", "peers"), [("torus", 12), ("exponential", 13), ("ring", 7), ("complete", 5)])
def test_each_round_s_sums_are_those_of_its_stars_and_the_others_sit_out(topology: str, peers: int) -> None:
    case = case_on(topology, peers, 3)
    net = run(case)
    names = [peer.name for peer in net.peers]
    for number in range(case.rounds):
        expected = drawn(case, number)
        assert expected
        for peer in net.peers:
            record = records(peer)[number]
            star = next((members for members in expected.values() if peer.place in members), None)
            if star is None:
                assert (record.outcome, record.reason, record.heard) == ("skip", "in no star this round", ())
            else:
                assert (record.outcome, record.reason) == ("full", "")
                assert {peer.name, *record.heard} == {names[place] for place in star}
    finished = [event for peer in net.peers for _, event in peer.events if isinstance(event, PeerFinished)]
    assert all(event.outcome == "done" and event.agreed for event in finished)
    models = np.stack([peer.adopted[-1][1] for peer in net.peers])
    assert np.square(models - models.mean(axis=0)).sum(axis=1).mean() <= 1e-6


def test_updates_go_to_the_centre_alone_masked_and_only_averages_are_sent_in_the_clear() -> None:
    case = case_on("torus", 12, 5)
    net = run(case)
    places = {peer.peer: peer.place for peer in net.peers}
    uploads = set()
    for _, sender, effect in sent(net):
        if isinstance(effect, SendBulk):
            message = effect.message
            if isinstance(message, Chunk) and message.part is Part.UPLOAD:
                assert effect.payload.dtype == np.uint8
                uploads |= {(message.round, sender, places[peer]) for peer in effect.peers}
            assert not isinstance(message, Update) or message.round >= case.rounds
    assert uploads == {
        (number, leaf, centre)
        for number in range(case.rounds)
        for centre, members in drawn(case, number).items()
        for leaf in members
        if leaf != centre
    }


def test_without_its_centre_a_star_loses_the_round_and_nothing_else() -> None:
    case = case_on("torus", 12, 7)
    expected = drawn(case, 1)
    centre = min(expected)
    ended = [at for at, event in run(case).peers[centre].events if isinstance(event, RoundEnded) and event.round == 0]
    net = run(case_on("torus", 12, 7, Crash(ended[0] + 0.3, centre, None)))
    for peer in net.peers:
        if peer.place != centre:
            lost = peer.place in expected[centre] or all(peer.place not in members for members in expected.values())
            assert (records(peer)[1].outcome in ("skip", "void")) == lost
            assert records(peer).keys() >= {0, 1, 2}


def test_a_leaf_that_dies_after_its_upload_costs_a_star_of_five_nothing() -> None:
    case = case_on("torus", 12, 9)
    centre, members = min(drawn(case, 0).items())
    leaf = next(member for member in members if member != centre)
    acknowledged = next(
        at
        for at, sender, effect in sent(run(case))
        if sender == centre
        and isinstance(effect, Send)
        and isinstance(effect.message, Told)
        and isinstance(effect.message.statement.content, Acknowledged)
    )
    net = run(case_on("torus", 12, 9, Crash(acknowledged, leaf, None)))
    for member in members:
        if member != leaf:
            record = records(net.peers[member])[0]
            assert record.outcome == "full"
            assert member == leaf or net.peers[leaf].name in record.heard


def test_an_equal_seed_gives_an_equal_run() -> None:
    case = Case(11, peers=12, topology="torus", masked=True)
    one, other = run(case), run(case)
    assert [peer.events for peer in one.peers] == [peer.events for peer in other.peers]
