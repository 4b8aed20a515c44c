"""Peer-to-peer, decentralised federated learning.

The layers, each importing only those below it:

    cli          the command line
    commands     its groups of commands
    simulation   whole networks on one machine, their reports
    node         sockets, files, processes: the only layer that touches the world
    learning     what a peer trains; torch lives here
    gossip       protocols as machines without I/O, and the graph theory under them
    crypto       pure functions of cryptography
    core         the words and contracts all share
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pfl.learning.task import Data as Data
    from p2pfl.learning.task import Examples as Examples
    from p2pfl.learning.task import Task as Task
    from p2pfl.learning.tasks.images import ImageFolder as ImageFolder
    from p2pfl.simulation.runs import Run as Run
    from p2pfl.simulation.scenario import Scenario as Scenario
    from p2pfl.simulation.simulate import simulate as simulate

__version__ = version("p2pfl-mesh")
__all__ = ["Data", "Examples", "ImageFolder", "Run", "Scenario", "Task", "__version__", "simulate"]

_HOMES = {
    "Data": "p2pfl.learning.task",
    "Examples": "p2pfl.learning.task",
    "Task": "p2pfl.learning.task",
    "ImageFolder": "p2pfl.learning.tasks.images",
    "Run": "p2pfl.simulation.runs",
    "Scenario": "p2pfl.simulation.scenario",
    "simulate": "p2pfl.simulation.simulate",
}


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; whoever only wants `p2pfl --help` does not pay for it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'p2pfl' has no attribute {name!r}")
