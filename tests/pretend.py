"""A pretend GPU: tensors on the device "pretend" keep their data in a CPU tensor and, as CUDA's do, refuse to be mixed
with tensors of the CPU. What it shows is that every tensor is made and moved where it belongs; not speed or kernels."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

MOVES = ("aten::copy_", "aten::_to_copy")
INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")  # indices may be the CPU's


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("pretend", _Backend())
DEVICE = torch.device("pretend", 0)


class Pretend(torch.Tensor):
    """A tensor on DEVICE; `held` is the CPU tensor with its data."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype,
                                                   storage_offset=held.storage_offset(), device=DEVICE)

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return _run(op, *args, **(kwargs or {}))

    def __repr__(self):
        return f"Pretend({self.held})"

    def tolist(self):
        return self.held.tolist()

    def numpy(self, *args, **kwargs):
        raise TypeError("a tensor on a pretend GPU has no numpy form: .cpu() comes first")


class Made(TorchFunctionMode):
    """torch.tensor does not reach a device that is written in Python: makes the tensor on the CPU, then moves it."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        return function(*args, **kwargs)


def _run(op, *args, **kwargs):
    """The operation on the CPU tensors that are held; RuntimeError where one of its tensors is really the CPU's."""
    name, tensors = op._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    if name == "aten::_efficientzerotensor":
        op = torch.ops.aten.zeros.default
    here = {id(x.held): x for x in tensors if isinstance(x, Pretend)}
    needed = [args[0], *args[2:3]] if name in INDEXING else tensors
    if here and name not in MOVES and any(not isinstance(x, Pretend) and x.dim() for x in needed):
        raise RuntimeError(f"{name}: some tensors are on {DEVICE} and some on the CPU")
    device = kwargs.get("device")
    stays = bool(here) if device is None else torch.device(device).type == DEVICE.type
    if device is not None and stays:
        kwargs["device"] = torch.device("cpu")
    held = lambda part: tree_map(lambda x: x.held if isinstance(x, Pretend) else x, part)
    out = op(*held(args), **held(kwargs))
    if name == "aten::copy_":
        return args[0]
    own = here if op._schema.is_mutable else {}  # an operation in place gives back the tensor that it was given
    place = lambda x: own[id(x)] if id(x) in own else Pretend(x) if stays and isinstance(x, torch.Tensor) else x
    return tree_map(place, out)


_LIBRARY = torch.library.Library("_", "IMPL")
_LIBRARY.fallback(_run, "PrivateUse1")
