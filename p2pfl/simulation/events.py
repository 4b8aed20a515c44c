"""A simulated run's curves as TensorBoard's event files, a folder for each seed in the run's own.

Written when a run has ended, from what is kept of it, so that runs of earlier days have theirs as well.
"""

import math
import shutil
from pathlib import Path
from typing import Any

from p2pfl.core.errors import InvalidConfig
from p2pfl.simulation.runs import Run

EVENTS_FOLDER = "tensorboard"
_PLACES = ("seed", "round")


def write_events(run: Run) -> list[Path]:
    """Write a run's event files anew; return their folders, one for each seed.

    A scalar for each column of `Run.frame`, by round. Its time is the modelled one, in seconds since the run began.

    Raises:
        InvalidConfig: tensorboardX is not installed, or the run is kept in no folder.
    """
    writer_of = event_writer()
    if run.path is None:
        raise InvalidConfig("the run is kept in no folder; give simulate one")
    home = run.path / EVENTS_FOLDER
    if home.exists():
        shutil.rmtree(home)
    folders = []
    for seed, rows in run.frame.groupby("seed"):
        folders.append(home / f"seed-{seed}")
        with writer_of(str(folders[-1])) as writer:
            for row in rows.to_dict("records"):
                for name, value in row.items():
                    if name not in _PLACES and math.isfinite(value):
                        writer.add_scalar(name, value, int(row["round"]), walltime=row["modelled_seconds"])
    return folders


def event_writer() -> Any:
    """Return tensorboardX's `SummaryWriter`.

    Raises:
        InvalidConfig: it is not installed.
    """
    try:
        from tensorboardX import SummaryWriter  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise InvalidConfig("event files need an extra; pip install 'p2pfl-mesh[tensorboard]'") from error
    return SummaryWriter
