"""A second device where there is none: torch's device "meta", whose tensors hold CPU tensors here.

It computes what the CPU does, and refuses what CUDA would: an operation on tensors of two devices, and reading one as
an array before it was moved. It shows no speed, and nothing of CUDA's own arithmetic.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

ACROSS = {"aten::_to_copy", "aten::copy_"}
"""What moves numbers from one device to another."""

INDEXED = {"aten::index", "aten::index_put_", "aten::_index_put_impl_"}
"""What takes indices that are on the CPU, as CUDA does."""


class Held(Tensor):
    """A tensor of the other device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        wrapper = Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device="meta",
        )  # fmt: skip
        wrapper.inner = inner
        return wrapper

    def untyped_storage(self):
        return self.inner.untyped_storage()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        self.inner = value.inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} outside of the device")


class OtherDevice(TorchDispatchMode):
    """Runs operations on the tensors that the other device's hold, and refuses those that mix devices."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        held = [each for each in tensors if isinstance(each, Held)]
        others = [each for each in tensors if not isinstance(each, Held) and each.ndim > 0]
        if held and others and name not in ACROSS:
            indices = name in INDEXED and isinstance(args[0], Held)
            assert indices, f"{name}: tensors of two devices, {[list(each.shape) for each in tensors]}"
        here = bool(held)
        if kwargs.get("device") is not None:
            here = torch.device(kwargs["device"]).type == "meta"
            kwargs["device"] = torch.device("cpu")
        self.operations += bool(held)
        result = func(*tree_map_only(Held, _inner, args), **tree_map_only(Held, _inner, kwargs))
        known = {id(each.inner): each for each in held}
        return tree_map(lambda each: self._given(each, known, name, here), result)

    @staticmethod
    def _given(each, known, name, here):
        if not isinstance(each, Tensor):
            return each
        if id(each) in known:
            return known[id(each)]
        if name == "aten::copy_":
            return each
        return Held(each) if here else each


def _inner(held):
    return held.inner
