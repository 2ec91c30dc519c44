"""attn_implementation="fastchargpt" against transformers' own attention, on small models with random weights."""

from typing import Any

import pytest
import torch
from peers import peer
from torch import Tensor, nn

from fastchargpt.errors import AttentionError
from fastchargpt.integrations.transformers import attention, register

transformers = peer("transformers")


def make(kind: str, implementation: str, **fields: Any) -> Any:
    """A small model in float64, the same weights whatever the implementation."""
    register()
    token = {"vocab_size": 61, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    if kind == "gpt2":
        shape = {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        }
        config, model_class = transformers.GPT2Config, transformers.GPT2LMHeadModel
    else:  # Llama has grouped queries; Mistral also a sliding window
        shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
        shape |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        config, model_class = getattr(transformers, f"{kind}Config"), getattr(transformers, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    model = model_class(config(**{**shape, **token, **fields}))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 61, shape, generator=torch.Generator().manual_seed(3))


def padding(side: str) -> Tensor:
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[0, :5] = 0
    mask[2, :1] = 0
    return mask if side == "left" else mask.flip(1)


KINDS = [("gpt2", {}), ("Llama", {}), ("Mistral", {"sliding_window": 4})]


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize(("kind", "fields"), KINDS)
def test_logits_and_gradients(kind: str, fields: dict[str, Any], side: str) -> None:
    ids = tokens(3, 12)
    mask = None if side == "none" else padding(side)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    found = []
    for implementation in ("sdpa", "fastchargpt"):
        model = make(kind, implementation, **fields)
        assert model.config._attn_implementation == implementation
        result = model(ids, attention_mask=mask, labels=labels)
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        found.append((result.logits[real], torch.autograd.grad(result.loss, list(model.parameters()))))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)


def test_padding_is_not_attended_to() -> None:
    # the same text with and without padding in front of it, by the positions that transformers gives it
    ids, mask = tokens(3, 12), padding("left")
    model = make("gpt2", "fastchargpt")
    places = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask, position_ids=places).logits[0, 5:]
    torch.testing.assert_close(padded, model(ids[:1, 5:]).logits[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "fields"), KINDS)
def test_generate_gives_the_same_tokens(kind: str, fields: dict[str, Any]) -> None:
    ids, mask = tokens(3, 12), padding("left")
    greedy, padded, sampled, static = [], [], [], []
    for implementation in ("sdpa", "fastchargpt"):
        model = make(kind, implementation, **fields)
        length = {"max_new_tokens": 6, "pad_token_id": 0}
        greedy.append(model.generate(ids, do_sample=False, **length))
        padded.append(model.generate(ids, attention_mask=mask, do_sample=False, **length))
        torch.manual_seed(5)
        sampled.append(model.generate(ids, do_sample=True, top_k=20, **length))
        if kind != "gpt2":
            static.append(
                model.generate(ids, do_sample=False, cache_implementation="static", disable_compile=True, **length)
            )
    for pair in (greedy, padded, sampled, static):
        assert not pair or torch.equal(pair[0], pair[1])


def test_a_soft_cap_with_and_without_a_mask() -> None:
    # Gemma 2 caps its scores; transformers' own SDPA leaves that out, its eager attention does not
    fields = {"head_dim": 8, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8, "sliding_window": 4}
    ids, mask = tokens(3, 12), padding("left")
    for given in (None, mask):
        found = []
        for implementation in ("eager", "fastchargpt"):
            model = make("Gemma2", implementation, **fields).float()  # its softmax is in fp32, and overflows from fp64
            logits = model(ids, attention_mask=given).logits
            found.append(logits if given is None else logits[given.bool()])
        torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


def test_a_sliding_window_without_a_mask() -> None:
    q, k, v = (torch.randn(2, heads, 9, 8, dtype=torch.float64) for heads in (4, 2, 2))
    seen = torch.ones(9, 9, dtype=torch.bool).tril().triu(-2)  # three keys, its own among them
    found, _ = attention(nn.Identity(), q, k, v, None, sliding_window=3)
    expected, _ = attention(nn.Identity(), q, k, v, seen[None, None], sliding_window=3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    both_ways, _ = attention(nn.Identity(), q, k, v, None, sliding_window=3, is_causal=False)
    torch.testing.assert_close(both_ways, attention(nn.Identity(), q, k, v, None, is_causal=False)[0])


def test_decoding_with_a_cache_equals_one_pass() -> None:
    model, ids = make("Llama", "fastchargpt"), tokens(2, 9)
    whole, cache, parts = model(ids).logits, None, []
    for part in ids.split([4, 3, 1, 1], dim=1):
        result = model(part, past_key_values=cache, use_cache=True)
        cache = result.past_key_values
        parts.append(result.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-10)


def test_dropout_in_training_only() -> None:
    model = make("gpt2", "fastchargpt", attn_pdrop=0.5)
    ids = tokens(2, 12)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    torch.manual_seed(1)
    first = model(ids).logits
    torch.manual_seed(1)
    assert torch.equal(model(ids).logits, first)


def test_an_encoder_sees_both_ways() -> None:
    register()
    fields = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vocab_size": 61,
    }
    model = transformers.BertModel(transformers.BertConfig(**fields)).double().eval()
    model.set_attn_implementation("sdpa")
    expected = model(tokens(2, 7)).last_hidden_state
    model.set_attn_implementation("fastchargpt")
    torch.testing.assert_close(model(tokens(2, 7)).last_hidden_state, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "head_mask", "cu_seq_lens_q", "cache", "output_attentions"])
def test_what_is_not_served_is_refused(name: str) -> None:
    q = torch.ones(1, 1, 2, 4)
    value = True if name == "output_attentions" else torch.ones(2)
    with pytest.raises(AttentionError, match=name):
        attention(nn.Identity(), q, q, q, None, **{name: value})
