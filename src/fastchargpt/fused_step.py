"""The decoding step in few launches: Triton kernels in place of torch's operations, for what they serve.

Five launches a layer for a few sequences, eight for many, where torch takes eleven to twenty. Shapes in names: B
sequences, C channels, P packed channels of q, k and v, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastchargpt.kernels.availability import triton_problem
from fastchargpt.layers import ACTIVATIONS, NORM_EPS, Block, LayerNorm
from fastchargpt.model import GPT
from fastchargpt.sampling import SamplingConfig

__all__ = ["fused_draw", "fused_problem", "fused_step"]

# From more sequences on, the products are cuBLAS's: our kernel reads the weights once for each.
MOST_ROWS = 4
# Elements of a head that one program can hold beside those it reads.
MOST_HEAD_DIM = 256


def fused_problem(model: GPT) -> str | None:
    """Why this model's step cannot be fused here, half a sentence; None where it can."""
    weight, config = model.lm_head.weight, model.config
    if (problem := triton_problem(weight.device.type, weight.device.index or 0)) is not None:
        return problem
    if weight.dtype == torch.float64:
        return "the kernels sum in float32, and the model is float64"
    if config.head_dim > MOST_HEAD_DIM:
        return f"the kernels take heads of up to {MOST_HEAD_DIM} channels, and the model's have {config.head_dim}"
    return None


def fused_step(model: GPT, kv_L2BHSD: Tensor, rope: Tensor | None, tokens_B: Tensor, positions_B: Tensor) -> Tensor:
    """Append a token to each sequence: its keys and values go into the cache. Logits (B, V) of what follows.

    Args:
        model: a model that has no `fused_problem`.
        kv_L2BHSD: the cache, which is written; position p lies in slot p % S.
        rope: `turn_tables` of the positions that there may be, (2, P, D); None for learned positions.
        tokens_B: a token for each sequence, (B,) int64.
        positions_B: where they stand, (B,) int64.
    """
    from fastchargpt.kernels import token_step

    config, parts = model.config, model.transformer
    places = None if parts.wpe is None else parts.wpe.weight
    x_BC = token_step.embed(tokens_B, positions_B, parts.wte.weight, places)
    for layer, block in enumerate(parts.h):
        assert isinstance(block, Block)
        qkv_BP = _linear(x_BC, block.attn.c_attn, norm=block.ln_1)
        y_BC = token_step.attend(
            qkv_BP, kv_L2BHSD[layer], rope, positions_B, heads=config.n_head, qk_norm=config.qk_norm, eps=NORM_EPS
        )
        _linear(y_BC, block.attn.c_proj, add_to=x_BC)
        h_BC = _linear(x_BC, block.mlp.c_fc, norm=block.ln_2, activation=config.activation)
        _linear(h_BC, block.mlp.c_proj, add_to=x_BC)
    return _linear(x_BC, model.lm_head, norm=parts.ln_f, softcap=config.logit_softcap)


def fused_draw(
    logits_BV: Tensor,
    uniforms_NB: Tensor,
    drawn_NB: Tensor,
    tokens_B: Tensor,
    positions_B: Tensor,
    done_B: Tensor,
    *,
    vocab_size: int,
    config: SamplingConfig,
) -> bool:
    """Draw and step onward (`token_step.draw`) and say True; False where top_k cuts or V is too large."""
    from fastchargpt.kernels import token_step

    greedy = config.temperature == 0 or config.top_k == 1
    cut = config.top_k is not None and config.top_k < vocab_size and not greedy
    if cut or vocab_size > token_step.MOST_TOKENS:
        return False
    state = (uniforms_NB, drawn_NB, tokens_B, positions_B, done_B)
    token_step.draw(logits_BV, *state, vocab_size=vocab_size, temperature=config.temperature, greedy=greedy)
    return True


def _linear(
    x: Tensor,
    linear: torch.nn.Linear,
    *,
    norm: torch.nn.Module | None = None,
    activation: str | None = None,
    softcap: float | None = None,
    add_to: Tensor | None = None,
) -> Tensor:
    """A product with what comes before and after it, by one kernel or, for many sequences, by several."""
    from fastchargpt.kernels import token_step

    layer = norm if isinstance(norm, LayerNorm) else None
    if len(x) <= MOST_ROWS and x.shape[1] <= token_step.MOST_INPUTS:
        return token_step.linear(
            x,
            linear.weight,
            linear.bias,
            norm="none" if norm is None else "layer" if layer is not None else "rms",
            norm_weight=None if layer is None else layer.weight,
            norm_bias=None if layer is None else layer.bias,
            eps=NORM_EPS,
            activation=activation or "none",
            softcap=softcap,
            add_to=add_to,
        )
    if layer is not None:
        x = F.layer_norm(x, x.shape[-1:], layer.weight, layer.bias, NORM_EPS)
    elif norm is not None:
        x = F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)
    if add_to is not None:
        add_to.addmm_(x, linear.weight.t())
        return add_to if linear.bias is None else add_to.add_(linear.bias)
    y = F.linear(x, linear.weight, linear.bias)
    if activation is not None:
        y = ACTIVATIONS[activation](y)
    return y if softcap is None else softcap * torch.tanh(y / softcap)
