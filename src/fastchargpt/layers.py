"""The parts of a transformer block, each one switch of `GPTConfig` away from nanoGPT's.

Shapes in names: B batch, T sequence, C channels (n_embd), H heads, D channels per head, P packed channels of q, k, v.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastchargpt.attention import causal_attention, causal_attention_packed
from fastchargpt.cache import KVCache
from fastchargpt.config import GPTConfig

__all__ = ["MLP", "Block", "CausalSelfAttention", "LayerNorm", "RMSNorm", "make_norm", "rope_tables", "rotate"]

NORM_EPS = 1e-5


class LayerNorm(nn.Module):
    """Layer normalisation whose bias is optional: (..., C) -> (..., C)."""

    def __init__(self, n_embd: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, NORM_EPS)


class RMSNorm(nn.Module):
    """Division by the root mean square, without weights: (..., C) -> (..., C)."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.shape = (n_embd,)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return F.rms_norm(x, self.shape, eps=NORM_EPS)


def make_norm(config: GPTConfig) -> nn.Module:
    """The normalisation that the config names."""
    return RMSNorm(config.n_embd) if config.norm == "rmsnorm" else LayerNorm(config.n_embd, config.bias)


def rope_tables(length: int, head_dim: int, base: float, device: torch.device | str | None = None) -> Tensor:
    """Cosines and sines of the rotary angles, (2, length, head_dim / 2), computed in float64 and kept in float32."""
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin())).float()


def rotate(x_BTHD: Tensor, rope: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + D/2) of each head by the angles of its position (arXiv:2104.09864, section 3).

    Args:
        x_BTHD: queries or keys, (B, T, H, D).
        rope: tables of the T positions, (2, T, D / 2).
    """
    cos, sin = rope[0, :, None], rope[1, :, None]
    left, right = x_BTHD.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1).type_as(x_BTHD)


class CausalSelfAttention(nn.Module):
    """Multi-head causal self-attention: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.kv_heads, config.head_dim
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        # the packed path serves where q, k and v go into attention just as the projection wrote them
        self.packed = config.position == "learned" and not config.qk_norm and self.n_kv_head == self.n_head
        self.backend = "auto"
        packed_channels = (self.n_head + 2 * self.n_kv_head) * self.head_dim
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        self.c_attn = nn.Linear(config.n_embd, packed_channels, bias=qkv_bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor, rope: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Attend to the positions up to each one's own, those in the cache included."""
        dropout_p = self.dropout if self.training else 0.0
        qkv_BTP = self.c_attn(x_BTC)
        if self.packed and cache is None:
            y_BTC = causal_attention_packed(qkv_BTP, self.n_head, dropout_p=dropout_p, backend=self.backend)
        else:
            q_BTHD, k_BTHD, v_BTHD = self._split(qkv_BTP, rope)
            q, k, v = q_BTHD.transpose(1, 2), k_BTHD.transpose(1, 2), v_BTHD.transpose(1, 2)
            if cache is not None:
                k, v = cache.append(self.layer, k, v)
            y_BHTD = causal_attention(q, k, v, dropout_p=dropout_p, backend=self.backend)
            y_BTC = y_BHTD.transpose(1, 2).flatten(2)
        out: Tensor = self.resid_dropout(self.c_proj(y_BTC))
        return out

    def _split(self, qkv_BTP: Tensor, rope: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D) and keys and values (B, T, H_kv, D), normalised and rotated where the config says so."""
        heads = qkv_BTP.unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split((self.n_head + self.n_kv_head, self.n_kv_head), dim=2)
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_dim,), eps=NORM_EPS)
        if rope is not None:
            qk = rotate(qk, rope)
        q, k = qk.split((self.n_head, self.n_kv_head), dim=2)
        return q, k, v


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}


class MLP(nn.Module):
    """Two linear layers with a non-linearity between them, four times as wide: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Apply the layer to every position."""
        out: Tensor = self.dropout(self.c_proj(ACTIVATIONS[self.activation](self.c_fc(x_BTC))))
        return out


class Block(nn.Module):
    """Attention and MLP, each on a normalised residual stream: (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTC: Tensor, rope: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Add the attention's and the MLP's contribution."""
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC), rope, cache)
        out: Tensor = x_BTC + self.mlp(self.ln_2(x_BTC))
        return out
