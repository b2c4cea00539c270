"""A GPU that is not there: tensors "on cuda" that really lie in memory, and refuse what a card's tensors refuse.

>>> with pretend_gpu():
...     x = torch.rand(3, device="cuda")
...     x + torch.rand(3)
Traceback (most recent call last):
RuntimeError: aten.add.Tensor: all tensors must be on one device, found cuda:0 and cpu

Every operation computes real numbers, so whole runs can be compared with the CPU's. What it cannot show is what a card's own
kernels do: their speed, their memory, their rounding.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from torch.nn.functional import one_hot
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

from demem_lab import kernels, replay
from demem_lab.streams import Streams

CARD = torch.device("cuda", 0)
aten = torch.ops.aten
# what may take tensors of both sides: copies, and indices, which a card takes from the CPU
CROSSING = {aten.copy_.default: (0, 1), aten.index.Tensor: (1,), aten.index_put_.default: (1,), aten.index_put.default: (1,)}
ELEMENTWISE_ONLY = (aten.cat.default, aten.stack.default, aten.mm.default, aten.bmm.default, aten.gather.default)


class OnCard(torch.Tensor):
    """A tensor that says it is on a card. `inside` is the CPU's tensor that computes for it."""

    watch = None  # told of every new tensor (`made`) and every operation (`called`)

    @staticmethod
    def __new__(cls, inside: torch.Tensor):
        return torch.Tensor._make_wrapper_subclass(
            cls, inside.size(), strides=inside.stride(), storage_offset=inside.storage_offset(), dtype=inside.dtype,
        )

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside
        if OnCard.watch is not None:
            OnCard.watch.made(self)

    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:  # what pytest shows
        return f"OnCard({self.inside!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        _on_one_device(func, args, kwargs)
        if OnCard.watch is not None:
            OnCard.watch.called(func)
        a, k = pytree.tree_map(_inside, (args, kwargs))
        found = pytree.tree_map_only(torch.Tensor, OnCard, func(*a, **k))
        if func is aten.copy_.default and not isinstance(args[0], OnCard):
            return args[0]  # from the card to the CPU
        return return_and_correct_aliasing(func, args, kwargs, found)


class CardGenerator(torch.Generator):
    """Random numbers of a device; a card's cannot be used on the CPU, nor the CPU's on a card."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.on_card = torch.device(device).type == "cuda"
        return made


def _inside(thing):
    return thing.inside if isinstance(thing, OnCard) else thing


def _on_one_device(func, args, kwargs) -> None:
    free = CROSSING.get(func, ())
    tied = [a for i, a in enumerate(args) if i not in free] + list(kwargs.values())
    for thing in pytree.tree_leaves(tied):
        if isinstance(thing, torch.Tensor) and not isinstance(thing, OnCard) and (thing.ndim or func in ELEMENTWISE_ONLY):
            raise RuntimeError(f"{func}: all tensors must be on one device, found {CARD} and cpu")


def _own_generator(func, args, kwargs) -> None:
    generator = kwargs.get("generator")
    if isinstance(generator, CardGenerator):
        made = _is_card(kwargs["device"]) if "device" in kwargs else any(isinstance(a, OnCard) for a in args)
        if generator.on_card != made:
            sides = ("cuda", "cpu") if made else ("cpu", "cuda")
            raise RuntimeError(f"{func.__name__}: expected a '{sides[0]}' generator but found '{sides[1]}'")


def _is_card(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, to_card: bool):
        ctx.to_card = to_card
        return OnCard(x.clone()) if to_card else x.inside.clone()

    @staticmethod
    def backward(ctx, slope):
        return (slope.inside.clone() if ctx.to_card else OnCard(slope.clone())), None


def _moved(x: torch.Tensor, to_card: bool) -> torch.Tensor:
    return x if to_card == isinstance(x, OnCard) else _Move.apply(x, to_card)


def _to(x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    rest, where = [], kwargs.pop("device", None)
    if args and isinstance(args[0], torch.Tensor):
        where, rest = args[0].device, [args[0].dtype, *args[1:]]
    else:
        for a in args:
            if isinstance(a, (str, torch.device)):
                where = a
            elif a is not None:
                rest.append(a)
    if rest and isinstance(rest[0], torch.dtype):
        kwargs["dtype"] = rest[0]
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    same = torch.Tensor.to(x, **kwargs) if kwargs else x
    return same if where is None else _moved(same, _is_card(where))


class _Host(TorchFunctionMode):
    """What Python asks torch for, on its way there: moves between devices, and new tensors on a card."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        _own_generator(func, args, kwargs)
        if func is torch.Tensor.to:
            return _to(*args, **kwargs)
        if func is torch.Tensor.cpu:
            return _moved(args[0], False)
        if func is torch.Tensor.cuda:
            return _moved(args[0], True)
        if func is torch.Tensor.tolist:
            return _inside(args[0]).tolist()
        if func is one_hot and isinstance(args[0], OnCard):  # written with parts that ask the device below Python
            return OnCard(one_hot(args[0].inside, *args[1:], **kwargs))
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], OnCard):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor first")
        if func is torch.from_numpy or "device" not in kwargs:
            return func(*args, **kwargs)
        where = kwargs.pop("device")
        if where is None:
            return func(*args, **kwargs)
        args = pytree.tree_map(_inside, args)  # as zeros_like: only shapes are read
        return pytree.tree_map_only(torch.Tensor, lambda t: _moved(t, _is_card(where)), func(*args, device="cpu", **kwargs))


class _Autocast(torch.autocast):
    def __init__(self, device_type, dtype=None, enabled=True, cache_enabled=None):
        super().__init__("cpu", dtype, enabled, cache_enabled)


def played_again(compute, pool, device):
    """What `replay.recorded` gives, for a recording that computes all of it again and puts it in the same place."""
    own, whole = compute()
    out = own.detach(), whole

    def play() -> None:
        for place, fresh in zip((out[0], *out[1]), (lambda own, whole: (own, *whole))(*compute()), strict=True):
            if place is not fresh:
                place.copy_(fresh.detach())

    return out, play


@contextmanager
def pretend_gpu(capability=(8, 0), memory=16 << 30):
    """Inside, and in this thread, this machine has one card of a compute capability."""
    facts = SimpleNamespace(name="Pretended 8000", total_memory=memory, major=capability[0], minor=capability[1])
    asked = torch.is_autocast_enabled
    says = {
        "is_available": lambda: True, "device_count": lambda: 1, "get_device_capability": lambda device=None: capability,
        "get_device_name": lambda device=None: facts.name, "get_device_properties": lambda device=None: facts,
        "synchronize": lambda device=None: None, "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (memory, memory),
        "current_device": lambda: 0, "current_stream": lambda device=None: SimpleNamespace(synchronize=lambda: None),
    }
    with ExitStack() as stack:
        for name, answer in says.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch, "Generator", CardGenerator))
        # the CPU's, so that runs can be compared
        stack.enter_context(mock.patch.object(Streams, "_on_card", lambda s, seed, n: Streams._on_cpu(s, seed, n).to(s.device)))
        stack.enter_context(mock.patch.object(replay, "recorded", played_again))
        stack.enter_context(mock.patch.object(replay, "new_pool", object))
        stack.enter_context(mock.patch.object(kernels, "_works", lambda on: False))
        stack.enter_context(mock.patch.object(torch, "autocast", _Autocast))
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", lambda kind="cpu": asked("cpu")))
        # a module moved to a card gets new parameters, because torch cannot exchange the memory below these
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.enter_context(_Host())
        yield
