"""A site twenty times slower takes part all the same: its training is cut to the time that the charter gives."""

from p2pfl.core.trace import RoundEnded
from p2pfl.gossip.session import Outcome
from p2pfl.simulation.faults import Schedule, Slow
from p2pfl.simulation.soak import Case, standard_network


def test_a_site_twenty_times_slower_contributes_to_every_round() -> None:
    slow = Slow(at=0.0, until=100.0, peer=3, factor=20.0)
    net = standard_network(Case(1, faults=Schedule((slow,)), rounds=5))
    net.run(1000)
    records = {peer.name: [event for _, event in peer.events if isinstance(event, RoundEnded)] for peer in net.peers}
    for number in range(5):
        heard = [record for records_of in records.values() for record in records_of if record.round == number]
        assert any("m3" in record.heard for record in heard), f"m3 is in no average of round {number}"
    mine = [record for record in records["m3"] if not record.settling]
    assert [record.outcome for record in mine] == [Outcome.FULL] * 5
    steps = {record.steps for record in mine}
    assert steps == {2}, "two steps of a second each fit into its window of two seconds"
