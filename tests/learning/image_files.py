"""Small files in the formats of image data sets, as their makers describe them."""

import gzip
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def random_pixels(count, channels, side, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (count, channels, side, side)).astype(np.uint8)


def write_cifar10(folder: Path, each=4, test=3, pixels=None, labels=None) -> Path:
    """Write the six files of the binary version; with `pixels` [n, 3, 32, 32] and `labels` [n] what is in them."""
    folder.mkdir(parents=True, exist_ok=True)
    count = 5 * each + test
    pixels = random_pixels(count, 3, 32) if pixels is None else pixels
    labels = np.arange(count) % 10 if labels is None else labels
    records = np.concatenate([labels.astype(np.uint8)[:, None], pixels.reshape(count, -1)], axis=1)
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for name, part in zip(names, np.split(records, np.arange(1, 6) * each), strict=True):
        (folder / name).write_bytes(part.tobytes())
    return folder


def idx(values) -> bytes:
    """Encode an array of bytes."""
    return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def write_mnist(folder: Path, train=12, test=5, zipped=False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 10).astype(np.uint8)
        for kind, values in (("images-idx3", random_pixels(count, 1, 28)[:, 0]), ("labels-idx1", labels)):
            encoded = idx(values)
            path = folder / f"{name}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(encoded) if zipped else encoded)
    return folder


def write_pictures(folder: Path, classes=("cat", "dog"), each=5) -> Path:
    """Write pictures of odd sizes and kinds: those of the first class are dark, those of the last light."""
    for number, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for place in range(each):
            color = 40 + 160 * number + place
            kind = ("RGB", "L", "RGBA", "P", "1")[place % 5]
            image = Image.new("L", (20 + place, 30 - place), color).convert(kind)
            image.save(folder / name / f"{place}.png")
    return folder
