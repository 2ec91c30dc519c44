"""The public attention functions: one signature, honest dispatch, clear refusals, nothing copied."""

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from oracles import notebook_head, qkv_case, worst_error

import fastchargpt.attention as attention
from fastchargpt.attention import causal_attention, causal_attention_packed, choose_backend, explain_attention
from fastchargpt.errors import AttentionError, BackendUnavailableError, FastchargptError
from fastchargpt.kernels import availability

ON_CPU = ("auto", "sdpa", "naive")


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("shape", [(2, 2, 5, 5), (4, 2, 1, 9), (4, 1, 3, 9), (2, 2, 7, 4)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_backends_agree_with_float64(backend: str, shape: tuple[int, ...], causal: bool) -> None:
    heads, kv_heads, tq, tk = shape
    q, k, v = qkv_case(heads=heads, kv_heads=kv_heads, tq=tq, tk=tk)
    want = causal_attention(q.double(), k.double(), v.double(), causal=causal, backend="naive")
    assert worst_error(causal_attention(q, k, v, causal=causal, backend=backend), want) < 2e-6


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize(
    ("scale", "printed"),
    [
        (1.0, [0.6764, -0.5477, -0.2478, 0.3143]),
        (32**-0.5, [0.4103, -0.0919, -0.1171, -0.0358]),
        (None, [0.4397, -0.1423, -0.1316, 0.0029]),
    ],
)
def test_the_notebook_head_on_every_backend(backend: str, scale: float | None, printed: list[float]) -> None:
    out = causal_attention(*notebook_head(), scale=scale, backend=backend)
    assert worst_error(out[0, 0, 1, :4], torch.tensor(printed)) < 6e-5
    assert worst_error(out[0, 0, 0, :3], torch.tensor([-0.1571, 0.8801, 0.1615])) < 6e-5


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("n_kv_head", [None, 2])
def test_packed_is_unpacked(backend: str, n_kv_head: int | None) -> None:
    qkv = torch.randn(2, 7, (4 + 2 * (n_kv_head or 4)) * 8, requires_grad=True)
    kv_width = (n_kv_head or 4) * 8
    q, k, v = (x.unflatten(2, (-1, 8)).transpose(1, 2) for x in qkv.split((32, kv_width, kv_width), dim=2))
    want = causal_attention(q, k, v, backend="naive").transpose(1, 2).reshape(2, 7, 32)
    got = causal_attention_packed(qkv, 4, n_kv_head=n_kv_head, backend=backend)
    assert worst_error(got, want) < 1e-6
    weight = torch.randn_like(got)
    gradients = [torch.autograd.grad((x * weight).sum(), qkv, retain_graph=True)[0] for x in (got, want)]
    assert worst_error(*gradients) < 1e-5


@pytest.mark.parametrize("options", [{"window": 2}, {"softcap": 0.5}, {"window": 0, "softcap": 3.0}], ids=str)
def test_packed_windows_and_soft_caps(options: dict[str, Any]) -> None:
    qkv = torch.randn(2, 7, 3 * 32)
    q, k, v = (x.unflatten(2, (-1, 8)).transpose(1, 2) for x in qkv.split(32, dim=2))
    want = causal_attention(q, k, v, backend="naive", **options).transpose(1, 2).flatten(2)
    assert worst_error(want, causal_attention(q, k, v).transpose(1, 2).flatten(2)) > 0.01
    assert worst_error(causal_attention_packed(qkv, 4, **options), want) < 1e-6


def test_packed_on_a_cpu_returns_a_view_of_what_sdpa_wrote() -> None:
    out = causal_attention_packed(torch.randn(2, 7, 96), 4)
    assert out.is_contiguous()
    assert out._base is not None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lse(dtype: torch.dtype) -> None:
    q, k, v = qkv_case(heads=4, kv_heads=2, tq=7, tk=4, dtype=dtype)
    out, lse = causal_attention(q, k, v, return_lse=True)
    assert lse.shape == (2, 4, 7)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert (lse[:, :, :3] == float("-inf")).all()
    assert (out[:, :, :3] == 0).all()


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 2, 0, 8)], ids=str)
def test_an_empty_batch_or_sequence_gives_an_empty_result(backend: str, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    assert causal_attention(x, x, x, backend=backend).shape == shape
    packed = torch.randn(shape[0], shape[2], 3 * 16)
    assert causal_attention_packed(packed, 2, backend=backend).shape == (shape[0], shape[2], 16)


def test_dropout_follows_the_generator_on_every_backend() -> None:
    q, k, v = qkv_case(tq=9)
    for backend in ON_CPU:
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(causal_attention(q, k, v, dropout_p=0.5, backend=backend))
        again = causal_attention(q, k, v, dropout_p=0.5, backend=backend)
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])
        assert not torch.equal(draws[2], again)


def qkv(**changes: object) -> dict[str, object]:
    q, k, v = qkv_case(heads=4, kv_heads=2)
    return {"q": q, "k": k, "v": v, **changes}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (qkv(q=torch.randn(4, 5, 16)), r"q must have 4 dimensions.*\(4, 5, 16\)"),
        (qkv(v=torch.randn(2, 2, 6, 16)), r"v must have k's shape.*6"),
        (qkv(q=torch.randn(3, 4, 5, 16)), "same batch size; got 3 and 2"),
        (qkv(q=torch.randn(2, 3, 5, 16)), "multiple of k's"),
        (qkv(q=torch.randn(2, 4, 5, 8)), "same head_dim; got 8 and 16"),
        (qkv(q=torch.zeros(2, 4, 5, 16, dtype=torch.int64)), "dtype.*int64"),
        (qkv(q=torch.zeros(2, 4, 5, 16, dtype=torch.float64)), "one dtype.*float64"),
        (qkv(q=torch.zeros(2, 4, 5, 16, device="meta")), "one device.*meta"),
        (qkv(dropout_p=1.0), r"dropout_p must be in \[0, 1\); got 1.0"),
        (qkv(dropout_p=-0.1), "dropout_p"),
        (qkv(scale=float("nan")), "scale must be a finite number"),
        (qkv(window=-1), "window must be a whole number of keys, 0 or more, or None for no window; got -1"),
        (qkv(window=2.0), "window must be a whole number.*got 2.0"),
        (qkv(window=True), "window must be a whole number.*got True"),
        (qkv(window=2, causal=False), "needs causal=True; got window=2, causal=False"),
        (qkv(softcap=0.0), "softcap must be a finite number above 0, or None for no soft-cap; got 0.0"),
        (qkv(softcap=-1.0), "softcap must be.*got -1.0"),
        (qkv(softcap=float("inf")), "softcap must be.*got inf"),
        (qkv(backend="trition"), "did you mean 'triton'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(arguments: dict[str, object], words: str) -> None:
    for function in (causal_attention, explain_attention):
        with pytest.raises(AttentionError, match=words) as raised:
            function(**arguments)  # type: ignore[arg-type, operator]
        assert isinstance(raised.value, ValueError)
        assert isinstance(raised.value, FastchargptError)


@pytest.mark.parametrize(
    ("shape", "n_head", "n_kv_head", "words"),
    [
        ((2, 48), 2, None, "3 dimensions"),
        ((2, 5, 50), 2, None, "multiple of n_head"),
        ((2, 5, 48), 0, None, "positive multiple"),
        ((2, 5, 48), 3, 2, "positive multiple"),
    ],
)
def test_bad_packed_arguments_are_named(shape: tuple[int, ...], n_head: int, n_kv_head: int | None, words: str) -> None:
    with pytest.raises(AttentionError, match=words):
        causal_attention_packed(torch.randn(shape), n_head, n_kv_head=n_kv_head)


def test_a_backend_asked_for_by_name_serves_or_says_why_not() -> None:
    q, k, v = qkv_case()
    with pytest.raises(BackendUnavailableError, match="log-sum-exp"):
        causal_attention(q, k, v, backend="sdpa", return_lse=True)
    with pytest.raises(BackendUnavailableError, match="'sdpa' has no soft-cap of the scores"):
        causal_attention(q, k, v, backend="sdpa", softcap=2.0)
    with pytest.raises(BackendUnavailableError, match="float64"):
        causal_attention(q.double(), k.double(), v.double(), backend="triton")
    wide = torch.randn(1, 1, 2, 512)
    with pytest.raises(BackendUnavailableError, match="head_dim from 8 to 256, and it is 512"):
        causal_attention(wide, wide, wide, backend="triton")


class _OnGpu:
    """A stand-in for a CUDA tensor, for the choice alone."""

    is_cuda = True
    dtype = torch.bfloat16
    shape = (1, 1, 8, 64)
    device = torch.device("cuda", 0)

    def numel(self) -> int:
        return 512


@pytest.mark.parametrize(
    ("problem", "return_lse", "softcap", "expected"),
    [
        (None, False, None, "triton"),
        (None, True, None, "triton"),
        (None, False, 2.0, "triton"),
        ("no", False, None, "sdpa"),
        ("no", True, None, "naive"),
        ("no", False, 2.0, "naive"),
    ],
)
def test_auto_takes_triton_on_a_gpu_that_it_serves(
    monkeypatch: pytest.MonkeyPatch, problem: str | None, return_lse: bool, softcap: float | None, expected: str
) -> None:
    monkeypatch.setattr(attention, "triton_problem", lambda *_: problem)
    monkeypatch.setattr(attention, "widest_head", lambda *_: 64)
    monkeypatch.setattr(attention, "serves_variants", lambda *_: True)
    x = _OnGpu()
    name, reason = choose_backend(
        x,
        x,
        x,
        causal=True,
        dropout_p=0.0,
        return_lse=return_lse,
        backend="auto",  # type: ignore[arg-type]
        softcap=softcap,
    )
    assert name == expected
    assert reason


@pytest.mark.parametrize(
    ("dtype", "head_dim", "words"),
    [
        (torch.float64, 64, "the Triton kernels have no float64"),
        (torch.bfloat16, 4, "take a head_dim from 8 to 256, and it is 4"),
        (torch.bfloat16, 320, "take a head_dim from 8 to 256, and it is 320"),
        (torch.float32, 72, r"has no torch.float32 kernels without spills for a head_dim of 72"),
    ],
    ids=str,
)
def test_what_the_kernels_do_not_serve_goes_to_sdpa_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, head_dim: int, words: str
) -> None:
    monkeypatch.setattr(attention, "triton_problem", lambda *_: None)
    monkeypatch.setattr(attention, "widest_head", lambda *_: 64)
    monkeypatch.setattr(attention, "serves_variants", lambda *_: True)
    x = _OnGpu()
    x.dtype, x.shape = dtype, (1, 1, 8, head_dim)
    asked = {"causal": True, "dropout_p": 0.0, "return_lse": False}
    name, reason = choose_backend(x, x, x, backend="auto", **asked)  # type: ignore[arg-type]
    assert name == "sdpa"
    assert words in reason
    with pytest.raises(BackendUnavailableError, match=words):
        choose_backend(x, x, x, backend="triton", **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize(("capability", "model"), [((7, 0), "Tesla V100"), ((7, 5), "Tesla T4")])
def test_a_gpu_on_which_triton_has_no_tensor_cores_takes_sdpa_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], model: str
) -> None:
    monkeypatch.setattr(availability, "_ANSWERS", {})
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: model)
    x = _OnGpu()
    x.dtype = torch.float16
    asked = {"causal": True, "dropout_p": 0.0, "return_lse": False}
    words = f"Triton uses no tensor cores on {model} (compute capability below 8.0)"
    with pytest.warns(UserWarning, match="attention runs on torch's SDPA, because Triton uses no tensor cores"):
        name, reason = choose_backend(x, x, x, backend="auto", **asked)  # type: ignore[arg-type]
    assert (name, reason) == ("sdpa", words)
    with pytest.raises(BackendUnavailableError, match="Triton uses no tensor cores"):
        choose_backend(x, x, x, backend="triton", **asked)  # type: ignore[arg-type]


def test_a_gpu_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "_ANSWERS", {})
    monkeypatch.setattr(availability, "_probe", lambda *_: "Triton is not installed")
    with pytest.warns(UserWarning, match="SDPA, because Triton is not installed"):
        assert availability.triton_problem("cuda", 0) == "Triton is not installed"
    with warnings.catch_warnings(action="error"):
        assert availability.triton_problem("cuda", 0) == "Triton is not installed"


def test_explain_says_which_and_why() -> None:
    q, k, v = qkv_case()
    assert explain_attention(q, k, v).startswith("sdpa: the tensors are not on a CUDA")
    assert explain_attention(q, k, v, return_lse=True).startswith("naive: the log-sum-exp is asked for")
    assert explain_attention(q, k, v, backend="naive") == "naive: it was asked for by name"
    assert explain_attention(q, k, v, softcap=2.0).startswith(
        "naive: a soft-cap is asked for, which SDPA does not have"
    )
    assert explain_attention(q, k, v, window=2).endswith("(the window of 2 as a mask of Tq x Tk)")
    assert "mask" not in explain_attention(q, k, v, window=4)  # five keys: it hides none of them
    assert "mask" not in explain_attention(q[:, :, :1], k, v, window=2)  # decoding: the keys are cut


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("window", [None, 2])
def test_compiles_without_a_graph_break(backend: str, window: int | None) -> None:
    q, k, v = qkv_case(requires_grad=True)
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    out = compiled(q, k, v, backend=backend, window=window)
    assert worst_error(out, causal_attention(q, k, v, backend=backend, window=window)) < 1e-6
    out.sum().backward()


def test_the_cpu_needs_no_triton() -> None:
    code = "import sys, torch, fastchargpt.attention as a; x = torch.ones(1, 1, 2, 8); a.causal_attention(x, x, x); "
    code += "sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
