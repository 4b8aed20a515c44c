"""Peer-to-peer, decentralised federated learning.

The layers, each importing only those below it:

    cli          the commands
    simulation   whole networks on one machine, their reports
    node         sockets, files, processes: the only layer that touches the world
    learning     what a peer trains; torch lives here
    gossip       protocols as machines without I/O, and the graph theory under them
    crypto       pure functions of cryptography
    core         the words and contracts all share
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from p2pfl.learning.task import Data as Data
    from p2pfl.learning.task import Examples as Examples
    from p2pfl.learning.task import Task as Task

__version__ = version("p2pfl-mesh")
__all__ = ["Data", "Examples", "Task", "__version__"]


def __getattr__(name: str) -> Any:
    # Importing torch takes seconds; whoever only wants `p2pfl --help` does not pay for it.
    if name in ("Data", "Examples", "Task"):
        from p2pfl.learning import task  # noqa: PLC0415

        return getattr(task, name)
    raise AttributeError(f"module 'p2pfl' has no attribute {name!r}")
