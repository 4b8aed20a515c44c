"""The flood that tells peers when to stop, on whole overlays, with and without broken links."""

import networkx as nx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.gossip.mixing import consensus_distance
from p2pfl.gossip.settle import Settling, Verdict
from p2pfl.gossip.topology import diameter, overlay
from tests.pump import ANY_SIZE

Link = frozenset[int]


def flood(graph: nx.Graph, peers: list[Settling], seen: list[float], broken: set[Link]) -> list[Settling]:
    """One settling round: everybody announces, and hears whom an intact link leads to."""
    claims = [peer.claim for peer in peers]
    after = []
    for i, peer in enumerate(peers):
        heard = [j for j in graph.neighbors(i) if frozenset((i, j)) not in broken]
        after.append(peer.after_round(seen[i], [claims[j] for j in heard], len(heard) == graph.degree[i]))
    return after


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(ANY_SIZE),
    n=st.integers(2, 20),
    spreads=st.lists(st.floats(0, 100), min_size=40, max_size=40),
)
def test_the_flood_brings_the_largest_spread_to_everyone_in_one_window(name: str, n: int, spreads: list[float]) -> None:
    graph = overlay(name, n, 0)
    hops = diameter(graph)
    peers = [Settling(hops, n) for _ in range(n)]
    for window in range(2):
        seen = spreads[n * window : n * window + n]
        for step in range(hops + 1):
            # Spreads of later rounds must not enter an open window.
            peers = flood(graph, peers, seen if step == 0 else [1e9] * n, set())
            verdicts = {peer.verdict() for peer in peers}
            assert verdicts == ({Verdict(hops**2 * max(seen), proven=True)} if step == hops else {None})


@settings(max_examples=150, deadline=None)
@given(data=st.data(), name=st.sampled_from(ANY_SIZE), n=st.integers(2, 14))
def test_a_proven_bound_holds_whatever_links_break_and_when(data: st.DataObject, name: str, n: int) -> None:
    graph = overlay(name, n, 0)
    hops = diameter(graph)
    links = [frozenset(edge) for edge in graph.edges]
    cut = data.draw(st.sets(st.sampled_from(links)))
    rounds = data.draw(st.lists(st.booleans(), min_size=hops + 1, max_size=hops + 1))
    vectors = np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal((n, 3)).astype(np.float32)
    peers = [Settling(hops, n) for _ in range(n)]
    for step in range(hops + 1):
        broken = cut if rounds[step] else set()
        seen = [
            max((float(((vectors[i] - vectors[j]) ** 2).sum()) for j in graph.neighbors(i)
                 if frozenset((i, j)) not in broken), default=0.0)
            for i in range(n)
        ]  # fmt: skip
        peers = flood(graph, peers, seen, broken)
    for peer in peers:
        verdict = peer.verdict()
        assert verdict is not None
        if verdict.proven:
            assert consensus_distance(vectors) <= verdict.bound
    if rounds[0] and cut:
        assert not any(v.proven for v in (peer.verdict() for peer in peers) if v), (
            "a link at the window's start is missing"
        )


def test_an_overlay_in_two_parts_proves_nothing() -> None:
    """Both halves of a cut ring agree within themselves, and neither may say that the members agree."""
    graph = overlay("ring", 6, 0)
    cut = {frozenset((1, 2)), frozenset((4, 5))}
    vectors = np.array([[1.0]] * 2 + [[0.0]] * 3 + [[1.0]], np.float32)
    peers = [Settling(diameter(graph), 6) for _ in range(6)]
    for _ in range(diameter(graph) + 1):
        peers = flood(graph, peers, [0.0] * 6, cut)
    assert {peer.verdict() for peer in peers} == {Verdict(0.0, proven=False)}
    assert consensus_distance(vectors) > 0.2
