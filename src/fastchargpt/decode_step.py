"""One more token of each sequence through a model with its key/value cache, written out over the model's weights.

At one token, module calls cost more than arithmetic, so there are none; and nothing here reads a value back from the
device, so that a CUDA graph can hold it.

Shapes in names: B sequences, C channels (n_embd), H heads, D channels per head, G query heads that share a key head,
S slots of the cache, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fastchargpt.layers import ACTIVATIONS, NORM_EPS, Block, LayerNorm
from fastchargpt.model import GPT

__all__ = ["Place", "decode_step", "place_at", "turn_tables"]


@dataclass(frozen=True)
class Place:
    """Where each sequence's token stands: its position, its slot of the cache, and the slots that it sees."""

    # positions (B,), or one of all as a slice
    at: Tensor | slice
    # slots (B,), or one of all
    slot: Tensor | int
    # 0 .. B - 1, or all as a slice
    rows: Tensor | slice
    # how many slots of the cache are looked at, from the first on
    seen: int
    # added to the scores, (B, 1, 1, seen): -inf where a sequence has nothing yet; None where all see all
    mask: Tensor | None


def place_at(at_B: Tensor, rows: Tensor, slots: Tensor, seen: int, dtype: torch.dtype) -> Place:
    """Each sequence at a position of its own.

    Args:
        at_B: positions, (B,) int64.
        rows: 0 .. B - 1.
        slots: 0 .. block_size - 1.
        seen: slots that are looked at; every position is below it, unless it is block_size.
        dtype: of the scores.
    """
    mask_BS = torch.empty(len(at_B), seen, device=at_B.device, dtype=dtype)
    # two operations: 1 and 0, whose logarithms are 0 and -inf
    torch.le(slots[:seen], at_B[:, None], out=mask_BS).log_()
    return Place(at=at_B, slot=at_B % len(slots), rows=rows, seen=seen, mask=mask_BS[:, None, None])


def decode_step(model: GPT, kv_L2BHSD: Tensor, rope: Tensor | None, tokens_B: Tensor, place: Place) -> Tensor:
    """Append a token to each sequence: its keys and values go into the cache. Logits (B, V) of what follows.

    Args:
        model: the model.
        kv_L2BHSD: the cache, which is written.
        rope: `turn_tables` of the positions that there may be, (2, P, D); None for learned positions.
        tokens_B: a token for each sequence, (B,) int64.
        place: where they stand.
    """
    config, parts = model.config, model.transformer
    heads, kv_heads, size = config.n_head, config.kv_heads, config.head_dim
    x_BC = parts.wte.weight[tokens_B]
    turn = None
    # keys and values go into the cache together where they lie side by side
    packed = rope is None and not config.qk_norm
    if rope is not None:
        turn = rope[:, place.at, None]
    elif parts.wpe is not None:
        x_BC = x_BC + parts.wpe.weight[place.at]
    for layer, block in enumerate(parts.h):
        assert isinstance(block, Block)
        attn, mlp = block.attn, block.mlp
        qkv_BC = F.linear(_norm(x_BC, block.ln_1), attn.c_attn.weight, attn.c_attn.bias)
        qkv_BHD = qkv_BC.view(-1, heads + 2 * kv_heads, size)
        qk_BHD, v_BHD = qkv_BHD[:, : heads + kv_heads], qkv_BHD[:, heads + kv_heads :]
        if config.qk_norm:
            qk_BHD = F.rms_norm(qk_BHD, (size,), eps=NORM_EPS)
        if turn is not None:
            qk_BHD = _turned(qk_BHD, turn)
        k_BHSD, v_BHSD = kv_L2BHSD[layer]
        if packed:
            _write(kv_L2BHSD[layer], place, qkv_BHD[:, heads:].unflatten(1, (2, kv_heads)))
        else:
            _write(kv_L2BHSD[layer, :1], place, qk_BHD[:, None, heads:])
            _write(kv_L2BHSD[layer, 1:], place, v_BHD[:, None])
        # heads that share a key head are so many queries to it
        y_BHGD = F.scaled_dot_product_attention(
            qk_BHD[:, :heads].unflatten(1, (kv_heads, -1)),
            k_BHSD[:, :, : place.seen],
            v_BHSD[:, :, : place.seen],
            attn_mask=place.mask,
        )
        _add_linear(x_BC, y_BHGD.flatten(1), attn.c_proj)
        h_BC = F.linear(_norm(x_BC, block.ln_2), mlp.c_fc.weight, mlp.c_fc.bias)
        _add_linear(x_BC, ACTIVATIONS[config.activation](h_BC), mlp.c_proj)
    return model.logits(_norm(x_BC, parts.ln_f))


def turn_tables(rope: Tensor) -> Tensor:
    """(2, P, D / 2) of `rope_tables` -> (2, P, D): what a channel and its partner, half a head away, are times."""
    cos, sin = rope
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def _turned(x_BHD: Tensor, turn: Tensor) -> Tensor:
    """What `layers.rotate` gives, in three operations."""
    partner_BHD = x_BHD.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return (x_BHD * turn[0]).addcmul_(partner_BHD, turn[1]).type_as(x_BHD)


def _write(kv_XBHSD: Tensor, place: Place, new_BXHD: Tensor) -> None:
    new_BXHD = new_BXHD.to(kv_XBHSD.dtype)
    if isinstance(place.slot, int):
        kv_XBHSD[:, :, :, place.slot] = new_BXHD.transpose(0, 1)
    else:
        kv_XBHSD[:, place.rows, :, place.slot] = new_BXHD


def _add_linear(x_BC: Tensor, h_BC: Tensor, linear: torch.nn.Linear) -> None:
    """Add to the residual stream, where it can be in the product's own pass over its result."""
    if h_BC.dtype != x_BC.dtype:  # under autocast
        x_BC.add_(F.linear(h_BC, linear.weight, linear.bias))
        return
    x_BC.addmm_(h_BC, linear.weight.t())
    if linear.bias is not None:
        x_BC.add_(linear.bias)


def _norm(x_BC: Tensor, norm: torch.nn.Module) -> Tensor:
    shape = x_BC.shape[-1:]
    if isinstance(norm, LayerNorm):
        return F.layer_norm(x_BC, shape, norm.weight, norm.bias, NORM_EPS)
    return F.rms_norm(x_BC, shape, eps=NORM_EPS)
