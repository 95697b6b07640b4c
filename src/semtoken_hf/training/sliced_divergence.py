"""KL divergence of two language-model heads from their last states, without ever holding all of their logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Rows of logits that stand at a time: 12 MB in float32 for a vocabulary of 49,152.
ROWS_PER_SLICE = 64


class _SlicedDivergence(torch.autograd.Function):
    """The gradient is taken where the logits are: to keep them for the backward pass is what there is no room for."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: Tensor, taught: Tensor, taught_head: Tensor) -> Tensor:
        device = states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
        with torch.autocast(device, enabled=False):
            weight = head.to(dtype)
            taught_weight = weight if taught_head is head else taught_head.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=states.device)
            gradient = torch.empty_like(states)
            head_gradient = torch.zeros_like(head, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for start in range(0, len(states), ROWS_PER_SLICE):
                rows = slice(start, start + ROWS_PER_SLICE)
                read = states[rows].to(dtype)
                ours = torch.log_softmax((read @ weight.T).float(), -1)
                theirs = torch.log_softmax((taught[rows].to(dtype) @ taught_weight.T).float(), -1)
                p = theirs.exp()
                total += (p * theirs.sub_(ours)).sum()
                difference = ours.exp_().sub_(p).to(dtype)
                gradient[rows] = difference @ weight
                if head_gradient is not None:
                    head_gradient += difference.T @ read
        ctx.save_for_backward(gradient, head_gradient)
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradient, head_gradient = ctx.saved_tensors
        outer = outer / len(gradient)
        of_head = None if head_gradient is None else head_gradient * outer
        return gradient * outer.to(gradient.dtype), of_head, None, None


def sliced_divergence(states: Tensor, head: Tensor, taught: Tensor, taught_head: Tensor) -> Tensor:
    """Mean KL(teacher || student) in nats per position, float32 scalar; differentiable in `states` and `head`.

    Args:
        states: [N, H], last states of the student.
        head: [V, H], its output embeddings.
        taught: [N, H], last states of the teacher.
        taught_head: [V, H], its output embeddings.
    """
    return _SlicedDivergence.apply(states, head, taught, taught_head)
