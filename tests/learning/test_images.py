"""Image files as they should be, and as they should not."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning import images
from p2pfl.learning.images import (
    CIFAR10_TEST,
    CIFAR10_TRAIN,
    read_cifar10,
    read_folder,
    read_idx,
    read_idx_images,
    read_picture,
)
from p2pfl.learning.task import load_task, make_model, read_data
from tests.learning.image_files import idx, random_pixels, write_cifar10, write_mnist, write_pictures

OWN = """
import p2pfl

class Pets(p2pfl.ImageFolder):
    classes = ("cat", "dog")
    side = 16
"""


def refusal(call, *arguments):
    with pytest.raises(InvalidConfig) as raised:
        call(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def cifar10(tmp_path):
    return write_cifar10(tmp_path / "cifar")


@pytest.fixture
def mnist(tmp_path):
    return write_mnist(tmp_path / "mnist")


def test_cifar10_is_read_as_it_was_written(cifar10):
    found = read_cifar10(cifar10, CIFAR10_TRAIN)
    assert found.inputs.dtype == torch.uint8
    np.testing.assert_array_equal(found.inputs.numpy(), random_pixels(23, 3, 32)[:20])
    assert found.targets.tolist() == [*range(10)] * 2
    assert read_cifar10(cifar10, CIFAR10_TEST).targets.tolist() == [0, 1, 2]
    few = read_cifar10(cifar10, CIFAR10_TRAIN, 6)
    assert torch.equal(few.inputs, found.inputs[:6])


def test_cifar10s_python_version_is_refused(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x02}q\x00.")
    assert "pickled" in refusal(read_cifar10, tmp_path, CIFAR10_TRAIN)
    assert "binary version" in refusal(read_cifar10, tmp_path, CIFAR10_TRAIN)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.unlink(), "there is no file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "no multiple of 3073"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "no multiple of 3073"),
        (lambda path: path.write_bytes(b""), "has 0 bytes"),
        (lambda path: path.write_bytes(bytes([200]) + path.read_bytes()[1:]), "label 200 of image 1"),
        (lambda path: (path.unlink(), path.mkdir()), "no multiple"),
    ],
)
def test_a_spoilt_file_of_cifar10_is_named(cifar10, spoil, words):
    path = cifar10 / "data_batch_3.bin"
    spoil(path)
    told = refusal(read_cifar10, cifar10, CIFAR10_TRAIN)
    assert words in told
    assert str(path) in told


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_is_read_as_it_was_written(tmp_path, zipped):
    values = random_pixels(3, 4, 5)
    path = tmp_path / ("values.gz" if zipped else "values")
    path.write_bytes(gzip.compress(idx(values)) if zipped else idx(values))
    np.testing.assert_array_equal(read_idx(path, 4), values)
    np.testing.assert_array_equal(read_idx(path, 4, 2), values[:2])
    np.testing.assert_array_equal(read_idx(path, 4, 9), values)


def changed(encoded, place, value):
    return encoded[:place] + value + encoded[place + len(value) :]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda data: b"", "begins with nothing"),
        (lambda data: data[:3], "begins with 00 00 08"),
        (lambda data: data[:9], "ends in its header"),
        (lambda data: changed(data, 0, b"\x1f\x8b"), "begins with 1f 8b"),
        (lambda data: changed(data, 2, b"\x0d"), "begins with 00 00 0d"),
        (lambda data: changed(data, 3, b"\x01"), "in 3 dimensions"),
        (lambda data: data[:-1], "bytes"),
        (lambda data: data + b"\0", "bytes"),
        (lambda data: changed(data, 4, struct.pack(">I", 13)), "bytes"),
        (lambda data: changed(data, 4, struct.pack(">I", 0)), "holds nothing"),
        (lambda data: changed(data, 4, struct.pack(">III", *[2**32 - 1] * 3)), "bytes"),
    ],
)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_spoilt_idx_file_is_told(tmp_path, spoil, words, zipped):
    data = spoil(idx(random_pixels(3, 4, 5)[:, :, 0]))
    path = tmp_path / ("values.gz" if zipped else "values")
    path.write_bytes(gzip.compress(data) if zipped else data)
    told = refusal(read_idx, path, 3)
    assert words in told
    assert str(path) in told


def test_whatever_becomes_of_an_idx_file_is_one_line(tmp_path):
    random, good = np.random.RandomState(0), idx(random_pixels(3, 4, 5)[:, :, 0])
    for zipped in (False, True):
        encoded = gzip.compress(good) if zipped else good
        path = tmp_path / ("values.gz" if zipped else "values")
        for _ in range(200):
            spoilt = bytearray(encoded[: random.randint(len(encoded) + 1)])
            for place in random.randint(max(1, len(spoilt)), size=2) if spoilt else ():
                spoilt[place] = random.randint(256)
            path.write_bytes(spoilt)
            try:
                read_idx(path, 3)
            except InvalidConfig as error:
                assert "\n" not in str(error)


def test_memory_is_bounded_by_what_a_header_claims(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MOST_BYTES", 59)
    path = tmp_path / "values.gz"
    path.write_bytes(gzip.compress(idx(random_pixels(3, 4, 5)[:, :, 0])))
    assert "at most 59" in refusal(read_idx, path, 3)


def test_idx_files_have_to_belong_together(mnist):
    names = [mnist / f"{name}-ubyte" for name in ("train-images-idx3", "train-labels-idx1")]
    found = read_idx_images(*names, 28, 10)
    assert found.inputs.shape == (12, 1, 28, 28)
    assert found.targets.tolist() == [*range(10), 0, 1]
    assert len(read_idx_images(*names, 28, 10, 7)) == 7
    assert "label 9 of image 10; labels are 0 to 8" in refusal(read_idx_images, *names, 28, 9)
    assert "28 by 28 pixels, not 32 by 32" in refusal(read_idx_images, *names, 32, 10)
    names[1].write_bytes(idx(np.zeros(11, np.uint8)))
    assert "has 11 labels for 12 images" in refusal(read_idx_images, *names, 28, 10)
    assert "has 11 labels for 12 images" in refusal(read_idx_images, *names, 28, 10, 12)


def test_a_folder_of_pictures_is_read(tmp_path):
    folder = write_pictures(tmp_path / "pets")
    (folder / ".hidden").touch()
    (folder / "cat" / ".hidden").touch()
    found = read_folder(folder, ("cat", "dog", "hen"), 3, 8)
    assert found.inputs.shape == (10, 3, 8, 8)
    assert found.targets.tolist() == [0] * 5 + [1] * 5
    means = found.inputs.float().mean((1, 2, 3))
    assert means[:4].max() < means[5:9].min()
    assert read_folder(folder, ("cat", "dog"), 1, 8).inputs.shape == (10, 1, 8, 8)


def test_a_picture_is_turned_as_its_camera_says(tmp_path):
    image = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 2, axis=1))
    tags = Image.Exif()
    tags[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "turned.png", exif=tags)
    assert read_picture(tmp_path / "turned.png", 1, 2)[0].tolist() == [[255, 255], [0, 0]]


def test_a_palette_with_transparency_is_a_picture(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(tmp_path / "a.png", transparency=bytes([255, 128]))
    assert read_picture(tmp_path / "a.png", 3, 2)[:, 0, 0].tolist() == [200, 100, 50]


def test_what_is_no_picture_is_told(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.fromarray(random_pixels(1, 1, 16)[0, 0]).save(path)
    good = path.read_bytes()
    path.write_bytes(good[: len(good) // 2])
    assert "cannot be read as PNG" in refusal(read_picture, path, 3, 8)
    path.write_bytes(b"")
    assert "cannot be read as PNG" in refusal(read_picture, path, 3, 8)
    Image.new("L", (4, 4)).save(path, format="GIF")
    assert "cannot be read as PNG" in refusal(read_picture, path, 3, 8)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(path)
    assert "more than 8 bits" in refusal(read_picture, path, 3, 8)
    assert "no picture by its name" in refusal(read_picture, tmp_path / "a.txt", 3, 8)
    path.write_bytes(good)
    monkeypatch.setattr(images, "MOST_PIXELS", 255)
    assert "16 by 16 pixels" in refusal(read_picture, path, 3, 8)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".webp"])
def test_whatever_becomes_of_a_picture_is_one_line(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    Image.fromarray(random_pixels(1, 1, 24)[0, 0]).convert("RGB").save(path)
    good, random = path.read_bytes(), np.random.RandomState(1)
    for _ in range(60):
        spoilt = bytearray(good[: random.randint(1, len(good) + 1)])
        for place in random.randint(len(spoilt), size=3):
            spoilt[place] = random.randint(256)
        path.write_bytes(spoilt)
        try:
            assert read_picture(path, 3, 8).shape == (3, 8, 8)
        except InvalidConfig as error:
            assert "\n" not in str(error)


def test_a_folder_says_what_does_not_belong_there(tmp_path):
    folder = write_pictures(tmp_path / "pets")
    assert "dog: is no class's folder; there are cat" in refusal(read_folder, folder, ("cat",), 3, 8)
    (folder / "cat" / "notes.txt").touch()
    assert "notes.txt: no picture by its name" in refusal(read_folder, folder, ("cat", "dog"), 3, 8)
    assert "no such folder" in refusal(read_folder, tmp_path / "none", ("cat",), 3, 8)
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    assert "no class has a picture" in refusal(read_folder, tmp_path / "empty", ("cat",), 3, 8)


@pytest.mark.parametrize(("name", "shape"), [("cifar10", (3, 32, 32)), ("mnist", (1, 28, 28))])
def test_built_in_tasks_read_and_deal_images(name, shape, tmp_path, request):
    folder = request.getfixturevalue(name)
    task = load_task(name, tmp_path).task
    data = read_data(task, {"path": str(folder)})
    assert data.train.inputs.shape[1:] == shape
    assert (data.train.inputs.min(), data.train.inputs.max()) == (-1.0, 1.0)
    assert make_model(task)(data.test.inputs).shape == (len(data.test), 10)
    halves = [read_data(task, {"path": str(folder), "peers": 2, "index": i, "test": 2}) for i in (0, 1)]
    assert sum(len(half.train) for half in halves) == len(data.train)
    assert len(halves[0].test) == 2
    assert "[data] path is None" in refusal(read_data, task, {})
    assert "[data] train is 0" in refusal(read_data, task, {"path": str(folder), "train": 0})
    assert "unknown key 'paths'" in refusal(read_data, task, {"path": str(folder), "paths": ""})


def test_zipped_digits_are_the_same(mnist, tmp_path):
    task = load_task("mnist", tmp_path).task
    zipped = read_data(task, {"path": str(write_mnist(tmp_path / "zipped", zipped=True))})
    assert torch.equal(zipped.train.inputs, read_data(task, {"path": str(mnist)}).train.inputs)


def test_the_network_is_the_papers(tmp_path):
    """McMahan et al. 2017, arXiv 1602.05629, section 3: 1,663,370 total parameters."""
    model = make_model(load_task("mnist", tmp_path).task)
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_663_370


def test_a_folder_of_ones_own_is_a_task(tmp_path):
    (tmp_path / "pets.py").write_text(OWN)
    folder = write_pictures(tmp_path / "pets", each=10)
    task = load_task("pets.py:Pets", tmp_path).task
    data = read_data(task, {"path": str(folder)})
    assert (len(data.train), len(data.test)) == (16, 4)
    assert data.test.targets.tolist() == [0, 0, 1, 1]
    assert torch.equal(data.test.inputs, read_data(task, {"path": str(folder)}).test.inputs)
    other = write_pictures(tmp_path / "others", each=2)
    both = read_data(task, {"path": str(folder), "test_path": str(other)})
    assert (len(both.train), len(both.test)) == (20, 4)
    assert make_model(task)(data.test.inputs).shape == (4, 2)
    assert torch.equal(task.read_inputs(folder / "cat"), both.train.inputs[:10])
    assert torch.equal(task.read_inputs(folder / "dog" / "3.png"), both.train.inputs[13:14])
    (tmp_path / "pets.py").write_text(OWN.replace('("cat", "dog")', '("cat",)'))
    told = refusal(read_data, load_task("pets.py:Pets", tmp_path).task, {"path": str(folder)})
    assert "names no classes" in told
