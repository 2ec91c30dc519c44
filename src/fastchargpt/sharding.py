"""Tensors that lie in pieces on several processes (torch's DTensor), seen whole or as this process's piece.

Nothing here imports torch.distributed for a tensor that is not in pieces.
"""

from typing import Any

from torch import Tensor

__all__ = ["is_sharded", "local", "piece_like", "sharded_state", "whole", "whole_state"]


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a piece of the tensor only."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This process's piece, on the same memory; the tensor itself where it is whole."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole(tensor: Tensor) -> Tensor:
    """All pieces together; every process must call it at the same time."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def piece_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """A tensor that every process has whole, cut as `pattern` is; nothing is sent. Itself where the pattern is whole.

    Args:
        tensor: of the pattern's whole shape.
        pattern: a tensor in pieces or a whole one.
    """
    if not is_sharded(pattern):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(pattern, DTensor)
    tensor = tensor.to(device=pattern.device, dtype=pattern.dtype)
    return distribute_tensor(tensor, pattern.device_mesh, pattern.placements, src_data_rank=None)


def whole_state(state: Any, *, keep: bool = True) -> Any:
    """A state dict with every tensor in pieces made whole, in the dict's order; every process must call it.

    Args:
        state: nested dicts, lists and tensors.
        keep: whether this process wants the result; one that does not only sends its pieces, and gets None for each.
    """
    if isinstance(state, dict):
        return {name: whole_state(value, keep=keep) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value, keep=keep) for value in state)
    if isinstance(state, Tensor) and is_sharded(state):
        found = whole(state.detach())
        return found.cpu() if keep else None  # on the host, so that a device never holds more than one of them
    return state


def sharded_state(state: dict[str, Any], parameters: list[Tensor]) -> dict[str, Any]:
    """An optimiser's whole state dict, with the tensors that are shaped like their parameter cut as it is.

    Args:
        state: as `Optimizer.state_dict` gives it.
        parameters: the optimiser's, in the order of its groups.
    """
    if not any(map(is_sharded, parameters)):
        return state
    kept = {
        index: {
            name: piece_like(value, parameters[index])
            if isinstance(value, Tensor) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": kept}
