"""Registers operators with torch's dispatcher.

`torch.library.custom_op` and `register_autograd` make the same entries and do more at every call, for cases that are
not ours: 40 us of a call of attention and its backward, which without them takes the host 100.
"""

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["differentiable", "operator"]

NAMESPACE = "fastchargpt"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def operator(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `run`, which mutates none of its arguments, for every device; its annotations are the schema.

    `fake` gives empty tensors in the shapes, types and strides that `run` gives. Returns the overload, to be called.
    """
    schema = torch.library.infer_schema(run, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def differentiable(overload: Any, function: type[torch.autograd.Function]) -> None:
    """Let `function` differentiate an operator: its forward gets (run, *inputs), and run(*inputs) runs the operator."""

    def enter(keys: torch._C.DispatchKeySet, *inputs: Any) -> Any:
        below = keys & torch._C._after_autograd_keyset

        def run(*inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return overload.redispatch(below, *inputs)

        return function.apply(run, *inputs) if torch.is_grad_enabled() else run(*inputs)

    _LIBRARY.impl(overload._schema.name.split("::")[1], enter, "Autograd", with_keyset=True)
