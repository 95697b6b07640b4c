"""Several GPUs on a machine without any: tensors stay on the CPU and carry the device that they pretend to live on.

As on real devices, an operation on tensors of two devices raises; modules on another device get their inputs moved by
accelerate's own hook.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
# These take tensors of any device.
MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda)
# Indices may live on the CPU, whatever they index.
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)


def place_of(tensor: Tensor) -> torch.device:
    return getattr(tensor, "pretended_device", CPU)


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


class PretendedDevices(TorchFunctionMode):
    """Within this mode, `.device` and `.to` speak of pretended devices."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function == Tensor.device.__get__:
            return place_of(args[0])
        if function in MOVES:
            return self.move(function, args, kwargs)
        place = kwargs.pop("device", None)
        if place is None:
            # Scalars on the CPU mix with everything.
            tensors = [t for t in tensors_in((args, kwargs)) if t.ndim or place_of(t) != CPU]
            places = {place_of(t) for t in tensors}
            if function in INDEXING:
                places = {place_of(args[0]), *(p for p in places if p != CPU)}
            if len(places) > 1:
                name = getattr(function, "__name__", function)
                raise RuntimeError(f"{name}: expected all tensors to be on the same device, found {places}")
            place = places.pop() if places else CPU
        return self.mark(function(*args, **kwargs), torch.device(place))

    def move(self, function: Any, args: Any, kwargs: Any) -> Tensor:
        tensor, *others = args
        place = kwargs.pop("device", None)
        for i, value in enumerate(others):
            if isinstance(value, (str, torch.device)):
                place = others.pop(i)
                break
            if isinstance(value, Tensor):
                place = place_of(value)
        if function is Tensor.cpu:
            place = CPU
        place = place_of(tensor) if place is None else torch.device(place)
        moved = Tensor.to(tensor, *others, **kwargs) if others or kwargs else tensor
        if moved is tensor and place != place_of(tensor):
            moved = tensor.view_as(tensor)
        return self.mark(moved, place)

    def mark(self, result: Any, place: torch.device) -> Any:
        for tensor in tensors_in(result):
            tensor.pretended_device = place
        return result


@contextlib.contextmanager
def spread(model: nn.Module, device_map: dict[str, str]) -> Iterator[None]:
    """Within this block the modules named in `device_map` pretend to live there; the rest goes with its parent."""
    handles = []
    for name, device in device_map.items():
        module = model.get_submodule(name)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.pretended_device = torch.device(device)
        hook = AlignDevicesHook(execution_device=torch.device(device), skip_keys=model._skip_keys_device_placement)
        handles.append(
            module.register_forward_pre_hook(
                lambda module, args, kwargs, hook=hook: hook.pre_forward(module, *args, **kwargs), with_kwargs=True
            )
        )
    try:
        with PretendedDevices():
            yield
    finally:
        for handle in handles:
            handle.remove()
