"""fastchargpt's attention inside transformers (5 or later), for any model that lets its attention be chosen.

    from fastchargpt.integrations.transformers import register
    register()
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="fastchargpt")

Causal attention without padding runs on `fastchargpt.causal_attention`, with the model's soft-cap and sliding window.
Where transformers hands over a mask (padding, more keys than a sliding window shows, a static cache), attention runs
under that mask, which has the window in it: on torch's SDPA, or with the scores written out where they are capped.
"""

from typing import Any

from torch import Tensor, nn

from fastchargpt.attention import causal_attention
from fastchargpt.errors import AttentionError, BackendUnavailableError
from fastchargpt.integrations.masked import masked_attention

__all__ = ["attention", "register"]

# keywords that change the result and that we do not serve; others are information for other implementations
REFUSED = {
    "s_aux": "attention sinks",
    "position_bias": "a bias on the scores",
    "head_mask": "a mask on the heads",
    "cu_seq_lens_q": "packed sequences given by their lengths (leave them to the position ids)",
    "cache": "a paged cache",
}


def register(name: str = "fastchargpt") -> None:
    """Make `attn_implementation=name` known to transformers, with its masks. Calling it again changes nothing.

    Raises:
        BackendUnavailableError: transformers is not installed, or is older than 5.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, __version__
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        raise BackendUnavailableError(
            "transformers 5 or later is not installed: pip install 'fastchargpt[integrations]'"
        ) from None
    if int(__version__.split(".")[0]) < 5:
        raise BackendUnavailableError(f"transformers is {__version__}, and register needs 5 or later")
    AttentionInterface.register(name, attention)
    # without its own entry here a registered attention gets no mask at all, and padding would be attended to
    AttentionMaskInterface.register(name, sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it.

    Args:
        module: the attention layer; its `is_causal` counts where the argument is None.
        query: (B, Hq, Tq, D).
        key, value: (B, Hkv, Tk, D), Hq a multiple of Hkv.
        attention_mask: (B, 1 or Hq, Tq, Tk), boolean (True is seen) or added to the scores; causality is then in it.
        scaling: what the scores are multiplied by; None is D**-0.5.
        dropout: probability of dropping a weight; transformers gives 0 in evaluation.
        is_causal: overrides the module's.
        sliding_window: how many keys a query of a causal layer sees, its own among them; a mask has it in it already.
        softcap: what bounds the scaled scores, as softcap * tanh(score / softcap).
        kwargs: what transformers passes to every implementation; those that we would have to serve are refused.

    Returns:
        (B, Tq, Hq, D), and None in place of the weights.

    Raises:
        AttentionError: a keyword that changes the result and is not served.
    """
    for name, meaning in REFUSED.items():
        if kwargs.get(name) is not None:
            raise AttentionError(
                f"fastchargpt's attention does not serve {name} ({meaning}): use attn_implementation='eager'"
            )
    if kwargs.get("output_attentions"):
        raise AttentionError(
            "fastchargpt's attention returns no weights (output_attentions): use attn_implementation='eager'"
        )
    if attention_mask is not None:
        out = masked_attention(query, key, value, attention_mask, scale=scaling, dropout_p=dropout, softcap=softcap)
        return out.transpose(1, 2).contiguous(), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    length = query.shape[2]
    if causal and length > 1:
        # no mask with more keys than queries is the first pass into a static cache: the rest of it is still empty
        key, value = key[:, :, :length], value[:, :, :length]
    window = None if sliding_window is None or not causal else sliding_window - 1
    out = causal_attention(
        query, key, value, scale=scaling, causal=causal, dropout_p=dropout, window=window, softcap=softcap
    )
    return out.transpose(1, 2).contiguous(), None
