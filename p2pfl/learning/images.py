"""Images in files, as bytes: CIFAR-10's binary version, idx as of MNIST, and folders of pictures.

Owns these formats and what can be wrong with a file. Must not unpickle anything: a data file is never code. What a
header claims is believed only up to `MOST_BYTES`, and memory is taken as bytes are read.
"""

import gzip
import math
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.task import Examples

Bytes = NDArray[np.uint8]

MOST_BYTES = 1 << 32
"""Of the pixels of one set of images, a byte each; a guess at what still fits into memory as float32."""

MOST_PIXELS = 1 << 26
"""Of a picture as it lies on disk, 64 megapixels: a guess above what cameras make, far below what harms."""

AT_ONCE = 1 << 20
"""Bytes that are read at a time."""

CIFAR10_SIDE, CIFAR10_CHANNELS, CIFAR10_CLASSES = 32, 3, 10
CIFAR10_TRAIN = tuple(f"data_batch_{number}.bin" for number in range(1, 6))
CIFAR10_TEST = ("test_batch.bin",)

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP"}
"""Pictures by their files' names; Pillow has more formats, which nobody checks."""


def read_cifar10(folder: Path, names: Sequence[str], most: int | None = None) -> Examples:
    """Read files of CIFAR-10's binary version: records of a label and 3072 bytes, red, green and blue.

    Krizhevsky 2009, Learning multiple layers of features from tiny images; www.cs.toronto.edu/~kriz/cifar.html.

    Args:
        folder: that the files are in.
        names: of the files, in order; all have to be there.
        most: how many images to read, the first ones; None for all.

    Returns:
        Inputs uint8 [n, 3, 32, 32], targets int64 [n].

    Raises:
        InvalidConfig: naming the file that is not there or not such a file.
    """
    if not (folder / names[0]).exists() and any((folder / name).exists() for name in ("data_batch_1", "test_batch")):
        raise InvalidConfig(
            f"{folder}: CIFAR-10's python version is pickled, and unpickling runs code; get the binary version, "
            "cifar-10-binary.tar.gz"
        )
    shape = (CIFAR10_CHANNELS, CIFAR10_SIDE, CIFAR10_SIDE)
    record = 1 + math.prod(shape)
    left, pixels, labels = most, list[Bytes](), list[Bytes]()
    for name in names:
        path = folder / name
        size = _size(path)
        if size == 0 or size % record:
            raise InvalidConfig(f"{path}: has {size} bytes, no multiple of {record}; unpack CIFAR-10's binary version")
        count = size // record if left is None else min(left, size // record)
        _verify_bytes(path, size)
        with path.open("rb") as file:
            rows = _array(path, _take(file, count * record), (count, record))
        _verify_labels(path, rows[:, 0], CIFAR10_CLASSES)
        pixels.append(rows[:, 1:].reshape(-1, *shape))
        labels.append(rows[:, 0])
        left = None if left is None else left - count
    return _examples(np.concatenate(pixels), np.concatenate(labels))


def read_idx(path: Path, dimensions: int, most: int | None = None) -> Bytes:
    """Read an idx file of unsigned bytes, gzipped if its name ends in .gz: uint8 of so many dimensions.

    The format is that of MNIST: LeCun, Cortes and Burges, yann.lecun.com/exdb/mnist.

    Args:
        path: the file.
        dimensions: how many it has to have.
        most: how much to read of the first one; None for all.

    Raises:
        InvalidConfig: the file is not there, or not such a file.
    """
    size = _size(path)
    try:
        with _opened(path) as file:
            shape = _idx_shape(path, file, dimensions)
            if path.suffix != ".gz" and size != (wanted := 4 + 4 * dimensions + math.prod(shape)):
                raise InvalidConfig(f"{path}: has {size} bytes, and its header says {wanted}; get it again")
            _verify_bytes(path, math.prod(shape))
            kept = (shape[0] if most is None else min(most, shape[0]), *shape[1:])
            values = _array(path, _take(file, math.prod(kept)), kept)
            if kept == shape and file.read(1):
                raise InvalidConfig(f"{path}: has more bytes than its header says; get it again")
            return values
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidConfig(f"{path}: cannot be read: {' '.join(str(error).split())}; get it again") from error


def read_idx_images(images: Path, labels: Path, side: int, classes: int, most: int | None = None) -> Examples:
    """Read a pair of idx files, gray images of `side` by `side` pixels and their labels.

    Returns:
        Inputs uint8 [n, 1, side, side], targets int64 [n].

    Raises:
        InvalidConfig: as `read_idx` does, or the files do not belong together.
    """
    # Labels are short: all of them, so that the files can be compared.
    numbers, pixels = read_idx(labels, 1), read_idx(images, 3, most)
    if pixels.shape[1:] != (side, side):
        found = " by ".join(map(str, pixels.shape[1:]))
        raise InvalidConfig(f"{images}: its images are of {found} pixels, not {side} by {side}; name another file")
    count = len(pixels) if most is None else min(most, len(numbers))
    if len(pixels) != count or (most is None and len(numbers) != count):
        raise InvalidConfig(f"{labels}: has {len(numbers)} labels for {len(pixels)} images; get both files again")
    _verify_labels(labels, numbers, classes)
    return _examples(pixels[:, None], numbers[:count])


def read_folder(folder: Path, classes: Sequence[str], channels: int, side: int) -> Examples:
    """Read pictures that lie in a folder for each class, in the order of classes and then of names.

    Hidden files are passed over. A class may have no folder: not everybody has pictures of everything.

    Args:
        folder: that the classes' folders are in.
        classes: the names of their folders.
        channels: 3 for colours, 1 for gray.
        side: pixels that a picture is cut and scaled to, each way.

    Returns:
        Inputs uint8 [n, channels, side, side], targets int64 [n].

    Raises:
        InvalidConfig: naming what is no such folder, or no picture.
    """
    if not folder.is_dir():
        raise InvalidConfig(f"{folder}: there is no such folder; name the one with a folder for each class")
    known, files = {name: number for number, name in enumerate(classes)}, list[tuple[Path, int]]()
    for home in _visible(folder):
        if home.name not in known or not home.is_dir():
            named = f"{', '.join(classes[:5])}{', …' if len(classes) > 5 else ''}"
            raise InvalidConfig(f"{home}: is no class's folder; there are {named}: rename or remove it")
        files += [(path, known[home.name]) for path in _visible(home)]
    if not files:
        raise InvalidConfig(f"{folder}: no class has a picture; put some into folders named {', '.join(classes[:5])}")
    files.sort(key=lambda each: (each[1], each[0].name))
    _verify_bytes(folder, len(files) * channels * side * side)
    pixels = np.empty((len(files), channels, side, side), np.uint8)
    for place, (path, _) in enumerate(files):
        pixels[place] = read_picture(path, channels, side)
    return _examples(pixels, np.array([number for _, number in files]))


def read_picture(path: Path, channels: int, side: int) -> Bytes:
    """Read a picture, turned as its camera says, cut to its middle square and scaled: uint8 [channels, side, side].

    Raises:
        InvalidConfig: it cannot be read, is too large, or is of no format in `FORMATS`.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise InvalidConfig(f"{path}: no picture by its name; there are {', '.join(FORMATS)}: convert or remove it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # doubts about colours and tags
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=[kind]) as image:
                _verify_picture(path, image)
                turned = ImageOps.exif_transpose(image).convert("RGB" if channels == 3 else "L")
                fitted = ImageOps.fit(turned, (side, side), Image.Resampling.BILINEAR)
    except InvalidConfig:
        raise
    except Exception as error:  # decoders raise whatever broken bytes lead them to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidConfig(f"{path}: cannot be read as {kind}: {reason}; get it again or remove it") from error
    values = np.asarray(fitted, np.uint8)
    return values[None] if channels == 1 else np.ascontiguousarray(values.transpose(2, 0, 1))


def _verify_picture(path: Path, image: Image.Image) -> None:
    if image.width * image.height > MOST_PIXELS:
        raise InvalidConfig(f"{path}: has {image.width} by {image.height} pixels; at most {MOST_PIXELS}: scale it down")
    if image.mode.startswith(("I", "F")):
        raise InvalidConfig(f"{path}: has more than 8 bits a channel, {image.mode}; convert it")


def _idx_shape(path: Path, file: IO[bytes], dimensions: int) -> tuple[int, ...]:
    header = _take(file, 4 + 4 * dimensions)
    magic = bytes([0, 0, 8, dimensions])
    if header[:4] != magic:
        raise InvalidConfig(
            f"{path}: begins with {header[:4].hex(' ') or 'nothing'}, an idx file of bytes in {dimensions} dimensions "
            f"with {magic.hex(' ')}; name another file"
        )
    if len(header) < 4 + 4 * dimensions:
        raise InvalidConfig(f"{path}: ends in its header; get it again")
    shape = struct.unpack(f">{dimensions}I", header[4:])
    if not all(shape):
        raise InvalidConfig(f"{path}: holds nothing; get it again")
    return shape


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _take(file: IO[bytes], size: int) -> bytearray:
    """Read so many bytes, or what there is; memory grows with what was read."""
    taken = bytearray()
    while len(taken) < size and (part := file.read(min(AT_ONCE, size - len(taken)))):
        taken += part
    return taken


def _array(path: Path, values: bytearray, shape: tuple[int, ...]) -> Bytes:
    if len(values) != math.prod(shape):
        raise InvalidConfig(f"{path}: ends after {len(values)} of {math.prod(shape)} bytes; get it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError as error:
        raise InvalidConfig(f"there is no file {path}; correct the path") from error
    except OSError as error:
        raise InvalidConfig(f"{path}: cannot be read: {error.strerror}; check its permissions") from error


def _verify_bytes(path: Path, size: int) -> None:
    if size > MOST_BYTES:
        raise InvalidConfig(f"{path}: {size} bytes of pixels; at most {MOST_BYTES}: take fewer or smaller images")


def _verify_labels(path: Path, labels: Bytes, classes: int) -> None:
    wrong = np.flatnonzero(labels >= classes)
    if len(wrong):
        raise InvalidConfig(
            f"{path}: label {labels[wrong[0]]} of image {wrong[0] + 1}; labels are 0 to {classes - 1}: get it again"
        )


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _examples(pixels: Bytes, labels: NDArray[np.integer]) -> Examples:
    return Examples(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))
