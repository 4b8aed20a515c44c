"""A model as one flat float32 vector, and as a safetensors file.

Owns the order in which a model's numbers travel. Must not know what they are averaged with. Nothing here unpickles.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from p2pfl.core.errors import InvalidConfig
from p2pfl.learning.seeding import seeded
from p2pfl.learning.task import Task, make_model

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a model lies in its vector.

    Floating point parameters and persistent buffers in the order of `state_dict`, each in row-major order; a tensor
    that has two names (tied weights) lies there once, under the first. Integer buffers stay with the peer.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """The length of the vector."""
        return sum(_count(shape) for shape in self.shapes)


def layout(model: nn.Module) -> Layout:
    """Describe the vector of a model.

    Raises:
        InvalidConfig: if the model has nothing to average, or a tensor that no float32 vector can hold.
    """
    floats = _floats(model)
    if not floats:
        raise InvalidConfig("the model has no floating point parameters; there is nothing to train or to average")
    return Layout(tuple(floats), tuple(tuple(t.shape) for t in floats.values()))


def flatten(model: nn.Module) -> Vector:
    """Copy a model into a new vector, float32 [size].

    Raises:
        InvalidConfig: as `layout` does.
    """
    floats = list(_floats(model).values())
    if not floats:
        layout(model)
    vector: Vector = torch.cat([t.detach().reshape(-1).to(torch.float32) for t in floats]).numpy()
    return vector


def assign(model: nn.Module, vector: Vector) -> None:
    """Copy a vector, float32 [size], into a model; the vector may be read-only and is not kept.

    Raises:
        InvalidConfig: if the vector is not one of this model's; the model is then as it was.
    """
    floats = list(_floats(model).values())
    ends = np.cumsum([0, *(t.numel() for t in floats)])
    if vector.dtype != np.float32 or vector.shape != (ends[-1],):
        raise InvalidConfig(
            f"a vector of {vector.dtype} {list(vector.shape)} for a model of float32 [{ends[-1]}]; "
            "do all peers run the same task?"
        )
    # torch warns about arrays it could write to but must not; a received vector is often such a one.
    source = torch.from_numpy(vector if vector.flags.writeable else vector.copy())
    with torch.no_grad():
        for tensor, (start, end) in zip(floats, pairwise(ends.tolist()), strict=True):
            tensor.copy_(source[start:end].view(tensor.shape))


def initial(task: Task, seed: int) -> Vector:
    """Make the vector of the task's untrained model from a seed, the same on every peer with the same torch.

    Raises:
        InvalidConfig: if the task fails to make a model.
    """
    with seeded(seed):
        return flatten(make_model(task))


def notes(model: nn.Module) -> list[str]:
    """List what a user should be told about averaging this model, one line each; most models need nothing."""
    tracking = [
        name for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    ]  # fmt: skip
    lines = []
    if tracking:
        lines.append(
            f"{_some(tracking)}: running mean and variance are averaged with the parameters and num_batches_tracked "
            "stays with each peer; where peers' data differ, so do these statistics, and nn.GroupNorm often does better"
        )
    wide = [name for name, tensor in _floats(model).items() if tensor.dtype != torch.float32]
    if wide:
        lines.append(f"{_some(wide)}: not float32, but travels and is averaged as float32")
    held = [n for n in _whole(model) if not n.endswith("num_batches_tracked")]
    if held:
        lines.append(f"{_some(held)}: not floating point, so it stays with each peer and is never averaged")
    return lines


def save_model(path: Path, model: nn.Module, metadata: Mapping[str, str]) -> None:
    """Write a model and its metadata as safetensors; the file appears whole or not at all.

    Raises:
        InvalidConfig: if the file cannot be written.
    """
    tensors = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in _tensors(model).items()}
    content = save(tensors, dict(metadata))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise InvalidConfig(f"cannot write {path}: {error.strerror}; check the folder and the disk") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_model(path: Path, model: nn.Module) -> dict[str, str]:
    """Read a safetensors file into a model, and return the file's metadata.

    Raises:
        InvalidConfig: if the file cannot be read or holds another model; the model is then as it was.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except FileNotFoundError as error:
        raise InvalidConfig(f"there is no model file {path}; correct the path") from error
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise InvalidConfig(f"{path}: not a readable safetensors file: {reason}; save the model again") from error
    wanted = _tensors(model)
    _verify_same(path, found, wanted)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])
    return metadata


def _verify_same(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    hint = "is it a model of this task?"
    for name, tensor in wanted.items():
        if name not in found:
            raise InvalidConfig(f"{path}: no tensor {name!r} of shape {list(tensor.shape)}; {hint}")
        if found[name].shape != tensor.shape:
            shapes = f"has shape {list(found[name].shape)}, the model needs {list(tensor.shape)}"
            raise InvalidConfig(f"{path}: tensor {name!r} {shapes}; {hint}")
        if found[name].dtype != tensor.dtype:
            types = f"holds {found[name].dtype}, the model needs {tensor.dtype}"
            raise InvalidConfig(f"{path}: tensor {name!r} {types}; {hint}")
    extra = sorted(set(found) - set(wanted))
    if extra:
        shape = list(found[extra[0]].shape)
        raise InvalidConfig(f"{path}: tensor {extra[0]!r} of shape {shape} is not in the model; {hint}")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Each tensor of the state once, under its first name: tied weights would otherwise count twice."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor
    return tensors


def _floats(model: nn.Module) -> dict[str, Tensor]:
    floats = {}
    for name, tensor in _tensors(model).items():
        if nn.parameter.is_lazy(tensor):
            raise InvalidConfig(f"the model's {name} has no shape yet; give lazy layers their sizes in Task.model")
        if tensor.is_complex():
            raise InvalidConfig(f"the model's {name} is complex; split it into real and imaginary parameters")
        if tensor.is_floating_point():
            floats[name] = tensor
    return floats


def _whole(model: nn.Module) -> list[str]:
    return [name for name, tensor in _tensors(model).items() if not tensor.is_floating_point()]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _count(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def _sync_folder(folder: Path) -> None:
    """Make the renaming itself durable: fsync(2) asks for the folder's own descriptor."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
