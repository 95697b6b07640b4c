"""Part: how often the host waits for the device, and where."""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .. import span_merging
from ..varlen_semtoken import VARLEN
from .equivalence import CASES, FIELDS, RATIO, SHAPE, available_backends
from .models import build_model
from .parts import Context, attention

PACKAGE, TORCH = Path(__file__).resolve().parents[1], Path(torch.__file__).parent
SIGN = "synchronizing CUDA operation"
# What makes the host wait on a GPU, for a processor, where nothing does.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "repeat_interleave", "_unique2", "equal")


def _place() -> str:
    """The innermost line of this package on the stack, else of any outside torch."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if frame.filename not in (__file__, warnings.__file__) and TORCH not in Path(frame.filename).parents
    ]
    own = [frame for frame in frames if PACKAGE in Path(frame.filename).parents]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno} ({frame.name})"


class _Lists(TorchFunctionMode):
    """`Tensor.tolist` of a processor reads the memory itself: no call is dispatched."""

    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.tolist:
            self.note("tolist")
        return func(*args, **(kwargs or {}))


class _WaitingCalls(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]):
        super().__init__()
        self.note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        known = name == "repeat_interleave" and (kwargs or {}).get("output_size") is not None
        if (name in WAITING and not known) or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))


class HostSyncs:
    """`with HostSyncs(device) as syncs: ...`, then `syncs.places`: how often the host waited, by line.

    On a processor it counts the calls that would wait on a GPU, except copies between devices.

    Args:
        device: of the work.
        forbid: raise RuntimeError at the first one.
    """

    def __init__(self, device: torch.device | str, forbid: bool = False):
        self.device, self.forbid = torch.device(device), forbid
        self.places: Counter[str] = Counter()

    @property
    def count(self) -> int:
        return sum(self.places.values())

    def _note_call(self, name: str) -> None:
        if self.forbid:
            raise RuntimeError(f"called a synchronizing operation: {name}")
        self.places[_place()] += 1

    def _note_warning(self, message: Any, *_: Any, **__: Any) -> None:
        if SIGN in str(message):
            self.places[_place()] += 1

    def __enter__(self) -> HostSyncs:
        if self.device.type != "cuda":
            self._modes = ExitStack()
            # What the stage looks at on a CPU alone, where nobody waits, is not what it does on a GPU.
            self._modes.enter_context(patch.object(span_merging, "is_on_host", lambda tensor: False))
            self._modes.enter_context(_WaitingCalls(self._note_call))
            self._modes.enter_context(_Lists(self._note_call))
            return self
        torch.cuda.synchronize(self.device)
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note_warning  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("error" if self.forbid else "warn")
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type != "cuda":
            self._modes.__exit__(*error)
            return
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*error)


def _measure(context: Context, what: str, setting: str, limit: int | None, call: Any) -> None:
    call()  # what is made once waits, too
    with HostSyncs(context.device) as syncs:
        call()
    places = ", ".join(f"{place} x {count}" for place, count in syncs.places.most_common())
    context.row(call=what, setting=setting, waits=syncs.count, places=places)
    if limit is not None:
        context.check(f"{what}, {setting}: the host waits at most {limit} x", syncs.count <= limit)


def _steps(model: Any, ids: Tensor, mask: Tensor | None) -> Callable[[], None]:
    """A function that decodes one more token behind a compressed prompt."""
    state = {"mask": mask}
    out = model(ids, attention_mask=mask, logits_to_keep=1, target_ratio=RATIO)
    token = out.logits[:, -1].argmax(-1, keepdim=True)

    def step() -> None:
        if state["mask"] is not None:
            state["mask"] = torch.cat([state["mask"], torch.ones_like(token)], dim=1)
        model(token, attention_mask=state["mask"], past_key_values=out.past_key_values, logits_to_keep=1)

    return step


def count_host_syncs(context: Context) -> None:
    """`compress` may wait once, to learn how many slots there are; a step of decoding never."""
    for encoder in ("static", "transformer"):
        model = build_model(SHAPE, context.device, context.dtype, encoder, **FIELDS)
        for case in CASES[:2]:
            ids, mask = case.prompts(context.device)
            compress = partial(model.compress, ids, mask, target_ratio=RATIO)
            _measure(context, "compress", f"{encoder} encoder, {case.name}", 1, compress)
            if encoder == "static":
                _count_of_steps(context, model, case.name, ids, mask)


def _count_of_steps(context: Context, model: Any, case: str, ids: Tensor, mask: Tensor | None) -> None:
    for implementation in dict.fromkeys(backend.implementation for backend in available_backends(context.device)):
        # With padding, Transformers asks SDPA's and FlashAttention's masks whether they hide anything.
        limit = 0 if mask is None or implementation == VARLEN else None
        try:
            with attention(model, implementation):
                step = _steps(model, ids, mask)
                _measure(context, "decode step", f"{implementation}, {case}", limit, step)
        except Exception as error:
            context.note(f"decode step, {implementation}, {case}: {type(error).__name__}: {error}")
            context.check(f"decode step, {implementation}, {case}: runs", False)
