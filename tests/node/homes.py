"""A federation's folders on disk, as three organisations make them."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from p2pfl.core.charter import Charter
from p2pfl.core.config import PeerConfig
from p2pfl.crypto.identity import sign_charter
from p2pfl.node.federation import (
    CHARTER_FILE,
    Home,
    create_home,
    draft_charter,
    join_charter,
    load_charter,
    save_charter,
)

TASK = """
import torch
import p2pfl

class Größe(p2pfl.Task):
    def model(self):
        return torch.nn.Linear({inputs}, 2)

    def data(self, settings):
        examples = p2pfl.Examples(torch.zeros(4, {inputs}), torch.tensor([0, 1, 0, 1]))
        return p2pfl.Data(train=examples, test=examples)
"""
OWN_TASK = "größe.py:Größe"
NAMES = ("ant", "bee", "cat.example")


@dataclass(frozen=True)
class Folders:
    """The charter's folder and the members' folders beside it."""

    path: Path
    homes: dict[str, Home]

    @property
    def charter_path(self) -> Path:
        return self.path / CHARTER_FILE

    @property
    def task_path(self) -> Path:
        return self.path / "größe.py"

    def charter(self) -> Charter:
        return load_charter(self.charter_path)

    def sign(self, *names: str) -> None:
        charter = self.charter()
        for name in names or self.homes:
            charter = sign_charter(charter, name, self.homes[name].identity())
        save_charter(self.charter_path, charter)

    def copy_to(self, path: Path) -> "Folders":
        shutil.copytree(self.path, path)
        return Folders(path, {name: Home(path / name, home.config) for name, home in self.homes.items()})


def make_folders(path: Path, task: str = "digits", first_port: int = 4001) -> Folders:
    """Make a signed charter of three members with this task, and the members' folders."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "größe.py").write_text(TASK.format(inputs=3))
    terms = {"training": {"rounds": 2}, "averaging": {"topology": "ring", "masks": "off"}}
    charter = draft_charter(path, "meadow", task, terms)
    homes = {}
    for port, name in enumerate(NAMES, first_port):
        config = PeerConfig(
            name=name,
            charter=f"../{CHARTER_FILE}",
            listen=(f"/ip4/127.0.0.1/tcp/{port}",),
            announce=(f"/dns4/localhost/tcp/{port}",),
        )
        homes[name] = create_home(path / name, config)[0]
        charter = join_charter(charter, homes[name].member(charter))
    save_charter(path / CHARTER_FILE, charter)
    folders = Folders(path, homes)
    folders.sign()
    return folders
