"""A pretend accelerator on a CPU: what only a GPU would show, shown without one.

Tensors on the device "sim" hold CPU data. An operation that mixes them with CPU tensors raises, as on a GPU (0-dim CPU
tensors in pointwise operations and CPU indices are let through, as on a GPU). Every read of values by the host is
counted with the line of the library that asked for it: on a GPU each of those waits for the device.

    import pretend_device as sim
    model = sim.move(tiny_model)                       # parameters and buffers, in place
    batch = {k: sim.put(v) for k, v in batch.items()}
    sim.reads.clear(); out = model.generate(**batch); print(sim.reads); sim.raw(out)

It uses torch's hook for Python back ends (since 2.9 or 2.10, experimental there). Import it before anything else makes
tensors on "sim", in a process of its own: it renames the PrivateUse1 back end and replaces functions of torch.

Not seen by it: kernels (a device of this name takes the reference), streams, memory, half-precision rounding.
"""

from __future__ import annotations

import collections
import functools
import linecache
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils import backend_registration

backend_registration._setup_privateuseone_for_python_backend("sim")

DEVICE = torch.device("sim:0")


class Read(NamedTuple):
    """A place of the library at which the host read values of the device.

    Attributes:
        step: what `step` said at that time.
        file: without its folder.
        function: that holds the line.
        line: its number.
        code: its text.
        operation: what read.
    """

    step: str
    file: str
    function: str
    line: int
    code: str
    operation: str


reads: collections.Counter[Read] = collections.Counter()
"""How often the host read at each place."""
step: list[str] = [""]
"""What the caller says is at work: its last entry is written down with every read."""
root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
library: tuple[str, ...] = tuple(os.path.join(root, name) + os.sep for name in ("tokenprune", "adapters", "kernels"))
"""A frame counts as the library's when its file lies under one of these folders."""

_COPIES = {"aten::_to_copy", "aten::copy_", "aten::_local_scalar_dense", "aten::item"}
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
# whose result has a size that only the device knows, or is a value
_WAITING = {
    "aten::_local_scalar_dense", "aten::_unique2", "aten::bincount", "aten::equal", "aten::is_nonzero",
    "aten::masked_select", "aten::nonzero", "aten::repeat_interleave", "aten::unique_consecutive", "aten::unique_dim",
    "aten::unique_dim_consecutive",
}  # fmt: skip
_tensor, _as_tensor, _interleave, _arange = torch.tensor, torch.as_tensor, torch.repeat_interleave, torch.arange


def put(value: Any) -> Any:
    """A tensor on the pretend device; anything else as it is."""
    return Sim(value) if isinstance(value, torch.Tensor) and not isinstance(value, Sim) else value


def raw(value: Any) -> Any:
    """The CPU data behind."""
    return value.raw if isinstance(value, Sim) else value


def move(model: Any) -> Any:
    """Put all parameters (without gradients) and buffers on the pretend device, in place; shared ones stay shared."""
    done: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not isinstance(parameter, Sim):
                if id(parameter) not in done:
                    done[id(parameter)] = torch.nn.Parameter(Sim(parameter.data), requires_grad=False)
                module._parameters[name] = done[id(parameter)]
        for name, buffer in list(module._buffers.items()):
            module._buffers[name] = put(buffer)
    return model


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """`value` with `change` done to everything in its lists, tuples and dicts."""
    if isinstance(value, (list, tuple)):
        return type(value)([_each(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _each(change, part) for name, part in value.items()}
    return change(value)


def _flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for part in value for leaf in _flat(part)] if isinstance(value, (list, tuple)) else [value]


def not_ours(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function; reads inside it are its own, whoever called it, unless the library is called again from there:
    for the model's own methods that the library wraps."""

    @functools.wraps(function)
    def the_models_own(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return the_models_own


def _note(operation: str) -> None:
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "the_models_own" and code.co_filename == __file__:
            return
        if code.co_filename.startswith(library):
            name, line = code.co_filename, frame.f_lineno
            text = linecache.getline(name, line).strip()
            while frame.f_code.co_name.startswith("<") and frame.f_back is not None:  # comprehensions, in Python < 3.12
                frame = frame.f_back
            reads[Read(step[-1], os.path.basename(name), frame.f_code.co_name, line, text, operation)] += 1
            return
        frame = frame.f_back  # type: ignore[assignment]


class Sim(torch.Tensor):
    """A tensor that says it is on the pretend device."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Sim:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            device=DEVICE,
        )
        made.raw = data.detach()
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _dispatch(func, args, kwargs or {})

    def __repr__(self, **kw: Any) -> str:
        return f"Sim({self.raw!r})"

    def tolist(self) -> Any:
        _note("tolist")
        return self.raw.tolist()

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = None, **kw: Any) -> torch.Tensor:
        return Sim(_tensor(data, dtype=dtype or self.dtype))

    def __getitem__(self, index: Any) -> Any:
        def fit(part: Any) -> Any:
            return _tensor(part) if isinstance(part, list) else part

        return super().__getitem__(tuple(map(fit, index)) if isinstance(index, tuple) else fit(index))

    def repeat_interleave(self, repeats: Any, dim: Any = None, **kw: Any) -> torch.Tensor:
        return torch.repeat_interleave(self, repeats, dim, **kw)


def _mixed(name: str, value: torch.Tensor) -> RuntimeError:
    return RuntimeError(
        f"{name}: all tensors must be on one device, found sim:0 and a CPU tensor of shape {tuple(value.shape)}"
    )


def _check_devices(func: Any, name: str, args: Any, flat: list[Any]) -> None:
    """Raise where a GPU would: tensors of two devices in one operation."""
    if name in _COPIES:
        return
    scalars = torch.Tag.pointwise in func.tags or name in ("aten::fill_", "aten::masked_fill", "aten::masked_fill_")
    if name in _INDEXING:
        # indices may be on the CPU, what is indexed may not, and a value may where it is one number
        flat, scalars = [*([] if isinstance(args[0], Sim) else [args[0]]), *args[2:3]], True
    for value in flat:
        if isinstance(value, torch.Tensor) and not isinstance(value, Sim) and not (scalars and value.dim() == 0):
            raise _mixed(name, value)


def _note_reads(name: str, args: Any, to_cpu: bool) -> None:
    if name in _WAITING or (name == "aten::copy_" and not isinstance(args[0], Sim)):
        _note(name.removeprefix("aten::"))
    elif name == "aten::_to_copy" and to_cpu:
        _note("to the CPU")
    elif name in _INDEXING and any(isinstance(i, Sim) and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
        _note("index by a mask")


def _dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func._schema.name
    flat = _flat([args, kwargs])
    ours = [value for value in flat if isinstance(value, Sim)]
    device = kwargs.get("device")
    to_sim = device is not None and torch.device(device).type == "sim"
    to_cpu = device is not None and torch.device(device).type == "cpu"
    if ours:
        _check_devices(func, name, args, flat)
        _note_reads(name, args, to_cpu)
    plain_args, plain_kwargs = _each(raw, args), _each(raw, kwargs)
    if device is not None:
        plain_kwargs["device"] = "cpu"
    if to_sim:
        plain_kwargs.pop("pin_memory", None)
    result = func(*plain_args, **plain_kwargs)
    if name == "aten::copy_":
        return args[0]
    known = {id(value.raw): value for value in ours}
    stays = to_sim or (bool(ours) and not to_cpu)

    def wrap(value: Any) -> Any:
        if not stays or not isinstance(value, torch.Tensor) or isinstance(value, Sim):
            return value
        same = known.get(id(value))
        return Sim(value) if same is None else same

    return _each(wrap, result)


def _tensor_here(data: Any, *args: Any, device: Any = None, **kw: Any) -> torch.Tensor:
    if any(isinstance(value, Sim) for value in _flat(data)):
        _note("values into a new tensor")
        data = _each(raw, data)
    made = _tensor(data, *args, **kw)
    return Sim(made) if device is not None and torch.device(device).type == "sim" else made


def _as_tensor_here(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
    if isinstance(data, torch.Tensor):
        return data.to(device=device or data.device, dtype=dtype or data.dtype)
    return _tensor_here(data, dtype=dtype, device=device)


def _interleave_here(values: Any, *args: Any, **kw: Any) -> torch.Tensor:
    if any(isinstance(value, Sim) for value in (values, *args, *kw.values())):
        counts = args[0] if args else kw.get("repeats", values)
        if isinstance(counts, Sim) and kw.get("output_size") is None:
            _note("repeat_interleave")
        return Sim(_interleave(raw(values), *map(raw, args), **_each(raw, kw)))
    return _interleave(values, *args, **kw)


def _arange_here(*args: Any, device: Any = None, **kw: Any) -> torch.Tensor:
    if any(isinstance(value, Sim) for value in args):
        _note("a length")
    made = _arange(*[value.raw.item() if isinstance(value, Sim) else value for value in args], **kw)
    return Sim(made) if device is not None and torch.device(device).type == "sim" else made


def _in_one_piece(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Not taken apart on its way to the device: its algorithm is the one that the CPU takes, and rounds as it does."""

    def whole(*args: Any, **kwargs: Any) -> torch.Tensor:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        if not any(isinstance(value, Sim) for value in given):
            return function(*args, **kwargs)
        for value in given:
            if not isinstance(value, Sim):
                raise _mixed(function.__name__, value)
        return Sim(function(*map(raw, args), **{name: raw(value) for name, value in kwargs.items()}))

    return whole


torch.tensor, torch.as_tensor = _tensor_here, _as_tensor_here
torch.repeat_interleave, torch.arange = _interleave_here, _arange_here
for _name in ("linear", "scaled_dot_product_attention"):
    setattr(torch.nn.functional, _name, _in_one_piece(getattr(torch.nn.functional, _name)))
_fallback = torch.library.Library("_", "IMPL")
_fallback.fallback(lambda op, *args, **kwargs: _dispatch(op, args, kwargs), "PrivateUse1")
