"""One token of a few sequences through a transformer in few launches: what a decoding step is made of.

At one token the products read their weights once and do nothing else worth mentioning, so a launch costs as much as its
work, and what counts is how few there are. Four kernels: the embedding; a product with the normalisation before it and
the activation, the residual sum or the soft-cap after it; attention with the rotation and normalisation of queries and
keys, and the writing of the cache, before it; and the draw of the next token with the step onward after it. Positions
are read from the device, so one CUDA graph serves every position. All sums are in float32, the draw's in float64.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"
# (a kernel is Triton's language in Python's grammar: its arguments have no Python types)
import torch
import triton
import triton.language as tl

__all__ = [
    "MOST_INPUTS",
    "MOST_TOKENS",
    "attend",
    "attend_kernel",
    "draw",
    "draw_kernel",
    "embed",
    "embed_kernel",
    "linear",
    "linear_kernel",
]

# The draw holds a row of logits in one program.
MOST_TOKENS = 4096
# Programs that a product is cut into where it can be: one for each processor of a large GPU.
PROGRAMS = 132
# Elements of one tile: 32 registers of each of 256 threads.
TILE = 8192
# Inputs of a product: a program holds all of them.
MOST_INPUTS = TILE


@triton.jit
def embed_kernel(
    tokens_ptr,  # (B,) int64
    positions_ptr,  # (B,) int64
    token_table_ptr,  # (V, C) contiguous
    position_table_ptr,  # (block_size, C) contiguous, or None
    out_ptr,  # (B, C) contiguous
    channels,
    BLOCK: tl.constexpr,
):
    """Grid: (B, cdiv(C, BLOCK))."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < channels
    token = tl.load(tokens_ptr + row)
    x = tl.load(token_table_ptr + token * channels + columns, mask=mask, other=0.0).to(tl.float32)
    if position_table_ptr is not None:
        position = tl.load(positions_ptr + row)
        x += tl.load(position_table_ptr + position * channels + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + tl.cast(row, tl.int64) * channels + columns, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr, softcap):
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    if softcap is not None:
        x = softcap * (2.0 * tl.sigmoid(2.0 * x / softcap) - 1.0)
    return x


@triton.jit
def linear_kernel(
    x_ptr,  # (B, K) contiguous
    weight_ptr,  # (N, K) contiguous
    bias_ptr,  # (N,) or None
    norm_weight_ptr,  # (K,) or None
    norm_bias_ptr,  # (K,) or None
    out_ptr,  # (B, N) contiguous
    inputs,
    outputs,
    eps,
    softcap,  # float or None
    NORM: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = activation(norm(x) @ weight.T + bias), or that added to out. Grid: (cdiv(N, BLOCK_N), B)."""
    row = tl.cast(tl.program_id(1), tl.int64)
    ns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    mask_n, mask_k = ns < outputs, ks < inputs
    # asked for first: the weights come from afar, and the normalisation is computed meanwhile
    weight = weight_ptr + ns.to(tl.int64)[:, None] * inputs + ks[None, :]
    w = tl.load(weight, mask=mask_n[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_N, BLOCK_K]
    out = out_ptr + row * outputs + ns
    y = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if ADD:
        y = tl.load(out, mask=mask_n, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * inputs + ks, mask=mask_k, other=0.0).to(tl.float32)
    if NORM == "layer":
        x = tl.where(mask_k, x - tl.sum(x, 0) / inputs, 0.0)
    if NORM != "none":
        x = x * tl.rsqrt(tl.sum(x * x, 0) / inputs + eps)
        if norm_weight_ptr is not None:
            x *= tl.load(norm_weight_ptr + ks, mask=mask_k, other=0.0).to(tl.float32)
        if norm_bias_ptr is not None:
            x += tl.load(norm_bias_ptr + ks, mask=mask_k, other=0.0).to(tl.float32)
    product = tl.sum(w.to(tl.float32) * x[None, :], 1)
    if bias_ptr is not None:
        product += tl.load(bias_ptr + ns, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out, (y + _activated(product, ACTIVATION, softcap)).to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _turned(x_ptr, columns, mask, own, others, scale, HEAD_DIM: tl.constexpr, ROTATE: tl.constexpr):
    """A head of a query or key, normalised by `scale` and rotated, [BLOCK_D] in float32."""
    x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32) * scale
    if ROTATE:
        half = HEAD_DIM // 2
        partner = tl.load(x_ptr + tl.where(columns < half, columns + half, columns - half), mask=mask, other=0.0)
        x = x * own + partner.to(tl.float32) * scale * others
    return x


@triton.jit
def _head_scale(x_ptr, columns, mask, eps, HEAD_DIM: tl.constexpr):
    x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 0) / HEAD_DIM + eps)


@triton.jit
def attend_kernel(
    qkv_ptr,  # (B, (H + 2 H_kv) D) contiguous
    k_ptr,  # (B, H_kv, S, D) contiguous: read, and written at this token's slot
    v_ptr,
    rope_ptr,  # (2, P, D) contiguous, or None
    positions_ptr,  # (B,) int64
    out_ptr,  # (B, H D) contiguous
    slots,
    rope_length,
    heads,
    kv_heads,
    scale,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    QK_NORM: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """One query head of one sequence against its window of the cache and its own key. Grid: (B * H,)."""
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    group = heads // kv_heads
    kv_head = head // group
    position = tl.load(positions_ptr + batch)
    own = (position % slots).to(tl.int32)
    seen = tl.minimum(position + 1, slots).to(tl.int32)
    columns = tl.arange(0, BLOCK_D)
    mask_d = columns < HEAD_DIM
    cos = 1.0
    sin = 0.0
    if ROTATE:
        turn = rope_ptr + position * HEAD_DIM + columns
        cos = tl.load(turn, mask=mask_d, other=0.0)
        sin = tl.load(turn + tl.cast(rope_length, tl.int64) * HEAD_DIM, mask=mask_d, other=0.0)
    row = qkv_ptr + tl.cast(batch, tl.int64) * ((heads + 2 * kv_heads) * HEAD_DIM)
    q_row = row + head * HEAD_DIM
    k_row = row + (heads + kv_head) * HEAD_DIM
    q_scale = 1.0
    k_scale = 1.0
    if QK_NORM:
        q_scale = _head_scale(q_row, columns, mask_d, eps, HEAD_DIM)
        k_scale = _head_scale(k_row, columns, mask_d, eps, HEAD_DIM)
    q = _turned(q_row, columns, mask_d, cos, sin, q_scale, HEAD_DIM, ROTATE) * scale  # [BLOCK_D]
    k_own = _turned(k_row, columns, mask_d, cos, sin, k_scale, HEAD_DIM, ROTATE).to(k_ptr.dtype.element_ty)
    v_own = tl.load(row + (heads + kv_heads + kv_head) * HEAD_DIM + columns, mask=mask_d, other=0.0)
    cache = (tl.cast(batch, tl.int64) * kv_heads + kv_head) * slots * HEAD_DIM
    if head % group == 0:  # of the heads that share this key head, one writes it
        tl.store(k_ptr + cache + own * HEAD_DIM + columns, k_own, mask=mask_d)
        tl.store(v_ptr + cache + own * HEAD_DIM + columns, v_own, mask=mask_d)

    # the own slot comes from registers: another program may be writing it
    top = tl.sum(q * k_own.to(tl.float32), 0)
    total = 1.0
    acc = v_own.to(tl.float32)
    for start in range(0, seen, BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        mask_s = (slot < seen) & (slot != own)
        at = cache + slot[:, None] * HEAD_DIM + columns[None, :]
        mask = mask_s[:, None] & mask_d[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_S, BLOCK_D]
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        scores = tl.where(mask_s, tl.sum(k * q[None, :], 1), float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 0))
        p = tl.exp(scores - new_top)
        decay = tl.exp(top - new_top)
        total = total * decay + tl.sum(p, 0)
        acc = acc * decay + tl.sum(p[:, None] * v, 0)
        top = new_top
    out = out_ptr + tl.cast(tl.program_id(0), tl.int64) * HEAD_DIM + columns
    tl.store(out, (acc / total).to(out_ptr.dtype.element_ty), mask=mask_d)


@triton.jit
def draw_kernel(
    logits_ptr,  # (B, width) contiguous
    uniforms_ptr,  # (N, B) float64 contiguous
    drawn_ptr,  # (N, B) int64 contiguous
    tokens_ptr,  # (B,) int64
    positions_ptr,  # (B,) int64
    done_ptr,  # (B,) int64: the rows of uniforms and drawn that come next
    batch_size,
    width,
    tokens,  # of the vocabulary; logits beyond are not looked at
    inverse_temperature,
    GREEDY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The draw of `knobs.draw`, and everything a step onward. Grid: (B,)."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < tokens
    step = tl.load(done_ptr + row)
    z = tl.load(logits_ptr + tl.cast(row, tl.int64) * width + columns, mask=mask, other=float("-inf")).to(tl.float32)
    if GREEDY:
        token = tl.argmax(z, 0)
    else:
        z = (z * inverse_temperature).to(logits_ptr.dtype.element_ty).to(tl.float32)
        below = (z - tl.max(z, 0)).to(logits_ptr.dtype.element_ty)
        cumulative = tl.cumsum(tl.where(mask, tl.exp(below.to(tl.float64)), 0.0), 0)  # [BLOCK]
        total = tl.sum(tl.where(columns == tokens - 1, cumulative, 0.0), 0)
        u = tl.load(uniforms_ptr + step * batch_size + row)
        passed = mask & (cumulative <= u * total)
        # not finite: V, as torch.searchsorted has it, which is no token
        token = tl.where(total < float("inf"), tl.sum(passed.to(tl.int32), 0), tokens)
    tl.store(drawn_ptr + step * batch_size + row, token.to(tl.int64))
    tl.store(tokens_ptr + row, tl.minimum(token, tokens - 1).to(tl.int64))
    tl.store(positions_ptr + row, tl.load(positions_ptr + row) + 1)
    tl.store(done_ptr + row, step + 1)


def embed(
    tokens: torch.Tensor, positions: torch.Tensor, table: torch.Tensor, places: torch.Tensor | None
) -> torch.Tensor:
    """table[tokens] + places[positions]: (B, C)."""
    channels = table.shape[1]
    out = torch.empty((len(tokens), channels), dtype=table.dtype, device=table.device)
    block = min(1024, triton.next_power_of_2(channels))
    grid = (len(tokens), triton.cdiv(channels, block))
    embed_kernel[grid](tokens, positions, table, places, out, channels, BLOCK=block, num_warps=4)
    return out


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    norm: str = "none",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    eps: float = 0.0,
    activation: str = "none",
    softcap: float | None = None,
    add_to: torch.Tensor | None = None,
) -> torch.Tensor:
    """activation(norm(x) @ weight.T + bias) of x (B, K) and weight (N, K), or that added to `add_to` (B, N) in place.

    K is at most MOST_INPUTS.

    Args:
        norm: none, layer or rms.
        activation: none, gelu, gelu_tanh, relu or relu2.
        softcap: bounds the result.
    """
    outputs, inputs = weight.shape
    out = torch.empty((len(x), outputs), dtype=x.dtype, device=x.device) if add_to is None else add_to
    block_k = triton.next_power_of_2(inputs)
    block_n = triton.next_power_of_2(outputs * len(x) // PROGRAMS + 1) // 2
    block_n = max(1, min(block_n, TILE // block_k))
    linear_kernel[(triton.cdiv(outputs, block_n), len(x))](
        *(x, weight, bias, norm_weight, norm_bias, out, inputs, outputs, eps, softcap),
        NORM=norm,
        ACTIVATION=activation,
        ADD=add_to is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        num_warps=8 if block_n * block_k > 2048 else 4,
    )
    return out


def attend(
    qkv: torch.Tensor,
    kv: torch.Tensor,
    rope: torch.Tensor | None,
    positions: torch.Tensor,
    *,
    heads: int,
    qk_norm: bool,
    eps: float,
) -> torch.Tensor:
    """Attention of a token of each sequence over the cache, which gets its key and value: (B, H * D).

    Args:
        qkv: queries, keys and values side by side, (B, (H + 2 H_kv) D).
        kv: a layer of the cache, (2, B, H_kv, S, D); position p lies in slot p % S.
        rope: what each channel and its partner, half a head away, are times in the rotation, (2, P, D), or None.
        positions: (B,) int64.
        heads: H.
        qk_norm: divide queries and keys by their root mean square.
        eps: of that.
    """
    _, batch_size, kv_heads, slots, head_dim = kv.shape
    out = torch.empty((batch_size, heads * head_dim), dtype=qkv.dtype, device=qkv.device)
    block_d = triton.next_power_of_2(head_dim)
    block_s = min(max(16, TILE // block_d), triton.next_power_of_2(slots))
    rope_length = 0 if rope is None else rope.shape[1]  # P
    attend_kernel[(batch_size * heads,)](
        *(qkv, kv[0], kv[1], rope, positions, out, slots, rope_length, heads, kv_heads, head_dim**-0.5, eps),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_S=block_s,
        QK_NORM=qk_norm,
        ROTATE=rope is not None,
        num_warps=8,
    )
    return out


def draw(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    drawn: torch.Tensor,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    done: torch.Tensor,
    *,
    vocab_size: int,
    temperature: float,
    greedy: bool,
) -> None:
    """Draw from logits (B, V) by row `done` of uniforms (N, B) into that of drawn; all of the step onward.

    `tokens` becomes what was drawn (or the last token where that is none), `positions` and `done` (B,) one more.
    """
    draw_kernel[(len(logits),)](
        *(logits, uniforms, drawn, tokens, positions, done),
        *(len(logits), logits.shape[1], vocab_size, 1.0 if greedy else 1.0 / temperature),
        GREEDY=greedy,
        BLOCK=max(16, triton.next_power_of_2(vocab_size)),
        num_warps=4,
    )
