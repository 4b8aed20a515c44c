"""Images in files on disk: CIFAR-10, MNIST, and folders of one's own pictures. Nothing is downloaded.

The network is the one with two convolutions of McMahan et al. 2017 (arXiv 1602.05629), section 3.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.images import (
    CIFAR10_CHANNELS,
    CIFAR10_SIDE,
    CIFAR10_TEST,
    CIFAR10_TRAIN,
    FORMATS,
    read_cifar10,
    read_folder,
    read_idx_images,
    read_picture,
)
from p2pfl.learning.partition import share
from p2pfl.learning.task import Data, Examples, Task

LEARNING_RATE = 0.05
"""Of plain SGD. Measured with small layers on scikit-learn's digits in the form of CIFAR-10, 500 of them dealt to five
peers: of 0.02, 0.05, 0.1 and 0.2, 0.02 was slow, and with two classes for each peer 0.2 learned nothing."""

SPLIT_SEED = 20261121
"""Fixes which pictures of a folder are held out; any number would do, but a peer that starts again needs the same."""

TEST_FRACTION = 0.2
"""Of each class's pictures, held out where there is no folder for that; customary."""


class Images(Task):
    """What an image shows. Subclasses say how images are read; bytes become numbers of -1 to 1.

    Attributes:
        channels: 3 for colours, 1 for gray.
        side: of an image, in pixels.
        filters: of the two convolutions.
        hidden: units between those and the outputs.
    """

    channels = 3
    side = 32
    filters = (32, 64)
    hidden = 512

    def model(self) -> nn.Module:
        """Make the network: twice 5 by 5 filters, ReLU and the largest of 2 by 2, then a hidden layer.

        Of 28 by 28 gray pixels and ten classes it has 1 663 370 parameters, as in the paper.
        """
        first, second = self.filters
        return nn.Sequential(
            nn.Conv2d(self.channels, first, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(first, second, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(second * (self.side // 4) ** 2, self.hidden), nn.ReLU(),
            nn.Linear(self.hidden, len(self.classes)),
        )  # fmt: skip

    def data(self, settings: Mapping[str, object]) -> Data:
        """Give this peer's share of the images to train on, and the common held-out ones.

        Raises:
            InvalidConfig: naming the key or the file and what is wrong with it.
        """
        train, test = self.read(_folder(settings, "path"), settings)
        return Data(_scaled(share(train, settings, self.keys())), _scaled(test))

    @abstractmethod
    def read(self, folder: Path, settings: Mapping[str, object]) -> tuple[Examples, Examples]:
        """Read all images to train on and the held-out ones: inputs uint8 [n, channels, side, side]."""

    def keys(self) -> tuple[str, ...]:
        """Return the keys of `[data]` that `read` knows."""
        return ("path", "train", "test")

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Make SGD at `LEARNING_RATE`."""
        return torch.optim.SGD(parameters, lr=LEARNING_RATE)

    def read_inputs(self, path: Path) -> Tensor:
        """Read a picture, a folder of pictures in the order of their names, or a .npy array of model inputs.

        Raises:
            InvalidConfig: if one cannot be read.
        """
        if not path.is_dir() and path.suffix.lower() not in FORMATS:
            return super().read_inputs(path)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        files = [file for file in files if not file.name.startswith(".")]
        if not files:
            raise InvalidConfig(f"{path}: holds no pictures; name another folder")
        pixels = np.stack([read_picture(file, self.channels, self.side) for file in files])
        return _numbers(torch.from_numpy(pixels))


class Cifar10(Images):
    """What a photograph of CIFAR-10 shows; `[data] path` is the folder of its binary version.

    `train` and `test` say how many images to read, the first ones; all unless given.
    """

    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    channels = CIFAR10_CHANNELS
    side = CIFAR10_SIDE

    def read(self, folder: Path, settings: Mapping[str, object]) -> tuple[Examples, Examples]:
        """Read the five files of training images, and the one of test images."""
        return (
            read_cifar10(folder, CIFAR10_TRAIN, _count(settings, "train")),
            read_cifar10(folder, CIFAR10_TEST, _count(settings, "test")),
        )


class Mnist(Images):
    """Which digit, or whatever is in files of the same form, such as Fashion-MNIST's; `[data] path` is their folder.

    Files may be gzipped. `train` and `test` say how many images to read, the first ones; all unless given.
    """

    classes = tuple("0123456789")
    channels = 1
    side = 28

    def read(self, folder: Path, settings: Mapping[str, object]) -> tuple[Examples, Examples]:
        """Read the four files."""
        train, test = (
            read_idx_images(
                _found(folder, f"{name}-images-idx3-ubyte"), _found(folder, f"{name}-labels-idx1-ubyte"),
                self.side, len(self.classes), _count(settings, part),
            )
            for name, part in (("train", "train"), ("t10k", "test"))
        )  # fmt: skip
        return train, test


class ImageFolder(Images):
    """Pictures of one's own: subclass it in a file, and name the classes, whose folders are in `[data] path`.

    `test_path` is a folder of the same form; without it a fixed fifth of each class is held out.
    """

    def read(self, folder: Path, settings: Mapping[str, object]) -> tuple[Examples, Examples]:
        """Read both folders, or one."""
        if len(self.classes) < 2:
            raise InvalidConfig(
                f'{type(self).__name__} names no classes; write two or more, such as classes = ("cat", "dog")'
            )
        everything = read_folder(folder, self.classes, self.channels, self.side)
        if "test_path" in settings:
            other = _folder(settings, "test_path")
            return everything, read_folder(other, self.classes, self.channels, self.side)
        held = torch.from_numpy(_held_out(everything.targets.numpy()))
        return _where(everything, ~held), _where(everything, held)

    def keys(self) -> tuple[str, ...]:
        """Return the keys of `[data]` that `read` knows."""
        return ("path", "test_path")


def _folder(settings: Mapping[str, object], key: str) -> Path:
    path = settings.get(key)
    if not isinstance(path, str) or not path:
        raise InvalidConfig(f'[data] {key} is {path!r}; name the folder that the images are in, {key} = "FOLDER"')
    return Path(path)


def _count(settings: Mapping[str, object], key: str) -> int | None:
    value = settings.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InvalidConfig(f"[data] {key} is {value!r}; it is how many images to read, 1 or more")
    return value


def _found(folder: Path, name: str) -> Path:
    """Return the path of a file, or of one that is gzipped in its place."""
    zipped = folder / f"{name}.gz"
    return zipped if zipped.exists() and not (folder / name).exists() else folder / name


def _scaled(examples: Examples) -> Examples:
    return Examples(_numbers(examples.inputs), examples.targets)


def _numbers(pixels: Tensor) -> Tensor:
    """Map bytes to -1 to 1, float32."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


def _held_out(targets: np.ndarray) -> np.ndarray:
    """Choose `TEST_FRACTION` of each class, bool [n], the same for the same folder."""
    random = np.random.RandomState(SPLIT_SEED)  # its numbers are frozen for all versions (NEP 19)
    held = np.zeros(len(targets), np.bool_)
    for number in np.unique(targets):
        places = random.permutation(np.flatnonzero(targets == number))
        held[places[: round(TEST_FRACTION * len(places))]] = True
    return held


def _where(examples: Examples, chosen: Tensor) -> Examples:
    return Examples(examples.inputs[chosen], examples.targets[chosen])
