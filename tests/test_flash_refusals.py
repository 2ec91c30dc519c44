"""What the Triton backend does with arguments it cannot serve, and with nothing at all: no launch either way."""

import pytest
import torch
from aot import record_launches
from flash_cases import plan_of
from oracles import qkv_case
from strict_interpreter import strict_interpreter

from fastchargpt import GPT, GPTConfig, attention
from fastchargpt.attention import causal_attention, causal_attention_packed
from fastchargpt.errors import AttentionError, FastchargptError
from fastchargpt.kernels.tuning import forced


@pytest.fixture(autouse=True)
def _a_gpu_to_all_appearances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "triton_problem", lambda *_: None)


def qkv(**changes: object) -> dict[str, object]:
    q, k, v = qkv_case(heads=4, kv_heads=2)
    return {"q": q, "k": k, "v": v, **changes}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (qkv(k=torch.randn(2, 5, 16)), r"k must have 4 dimensions.*\(2, 5, 16\)"),
        (qkv(v=torch.randn(2, 2, 6, 16)), r"v must have k's shape.*6"),
        (qkv(q=torch.randn(3, 4, 5, 16)), "same batch size; got 3 and 2"),
        (qkv(q=torch.randn(2, 3, 5, 16)), "multiple of k's"),
        (qkv(q=torch.randn(2, 4, 5, 8)), "same head_dim; got 8 and 16"),
        (qkv(q=torch.zeros(2, 4, 5, 16, dtype=torch.int32)), "dtype.*int32"),
        (qkv(v=torch.zeros(2, 2, 5, 16, dtype=torch.float16)), "one dtype.*float16"),
        (qkv(k=torch.zeros(2, 2, 5, 16, device="meta"), v=torch.zeros(2, 2, 5, 16, device="meta")), "one device.*meta"),
        (qkv(dropout_p=1.0), r"dropout_p must be in \[0, 1\); got 1.0"),
        (qkv(dropout_p=-0.1), r"dropout_p must be in \[0, 1\); got -0.1"),
        (qkv(scale=float("inf")), "scale must be a finite number.*inf"),
        (qkv(q=torch.randn(2, 4, 5, 300), k=torch.randn(2, 2, 5, 300), v=torch.randn(2, 2, 5, 300)), "it is 300"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_named_before_any_launch(arguments: dict[str, object], words: str) -> None:
    with (
        record_launches("sm_80") as launches,
        forced(plan_of("blocks")),
        pytest.raises(FastchargptError, match=words),
    ):
        causal_attention(**arguments, backend="triton")  # type: ignore[call-overload]
    assert launches == []


def test_a_right_argument_is_launched() -> None:
    """Else the test above would see nothing whatever happened."""
    with record_launches("sm_80") as launches, forced(plan_of("blocks")):
        causal_attention(**qkv(), backend="triton")  # type: ignore[call-overload]
    assert len(launches) == 1


@pytest.mark.parametrize(
    ("batch", "tq", "tk"), [(0, 3, 3), (2, 0, 0), (2, 0, 3), (2, 3, 0)], ids=["batch", "T", "Tq", "Tk"]
)
def test_nothing_to_attend_to_is_an_empty_result_and_no_launch(batch: int, tq: int, tk: int) -> None:
    q, k, v = (torch.randn(batch, 2, time, 8, requires_grad=True) for time in (tq, tk, tk))
    with record_launches("sm_80") as launches:
        out, lse = causal_attention(q, k, v, backend="triton", return_lse=True)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert launches == []
    assert out.shape == q.shape
    assert lse.shape == q.shape[:3]
    assert not out.any()  # queries without a key see nothing
    assert (lse == float("-inf")).all()
    assert [x.shape for x in gradients] == [x.shape for x in (q, k, v)]
    assert not any(x.any() for x in gradients)


@pytest.mark.parametrize("shape", [(0, 3, 48), (2, 0, 48)])
def test_nothing_packed_is_an_empty_result_and_no_launch(shape: tuple[int, ...]) -> None:
    qkv = torch.randn(shape, requires_grad=True)
    with record_launches("sm_80") as launches:
        out = causal_attention_packed(qkv, 2, backend="triton")
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert launches == []
    assert out.shape == (*shape[:2], 16)
    assert gradient.shape == qkv.shape


@pytest.mark.parametrize("backend", ["triton", "naive", "sdpa"])
def test_double_backward_serves_or_says_who_does(backend: str) -> None:
    q, k, v = qkv_case(batch=1, tq=6, requires_grad=True)
    with strict_interpreter(), forced(plan_of("blocks")):
        out = causal_attention(q, k, v, backend=backend)
        first = torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]
        if backend == "triton":
            with pytest.raises(AttentionError, match=r"no second derivative.*use backend 'naive'"):
                first.sum().backward()
        elif backend == "naive":
            first.sum().backward()
            assert q.grad is not None
            assert q.grad.isfinite().all()


def test_a_models_training_step_copies_nothing_around_attention() -> None:
    """Forward and backward of a whole model: two launches a layer, the projections' own memory in and out."""
    config = GPTConfig(vocab_size=16, block_size=32, n_layer=2, n_head=2, n_embd=32, bias=False, dropout=0.0)
    model = GPT(config)
    for block in model.transformer.h:
        block.attn.backend = "triton"
    idx = torch.randint(16, (2, 32))
    profiler = torch.profiler.profile(record_shapes=True)
    with record_launches("sm_90") as launches, forced(plan_of("blocks")), profiler as profile:
        model(idx, idx)[1].backward()
    names = [launch.name for launch in launches]
    assert names == ["attention_forward_kernel"] * 2 + ["backward_blocks_kernel"] * 2
    copies = ("aten::copy_", "aten::cat", "aten::contiguous", "aten::clone", "aten::_to_copy")
    events = [(event.name, event.input_shapes) for event in profile.events()]
    assert any(name == "aten::mm" for name, _ in events)
    # the gradient of the positions' table, (T, C), is; of activations, (B, T, C) or more, nothing may be
    assert [event for event in events if event[0] in copies and event[1][:1] != [[32, 32]]] == []
