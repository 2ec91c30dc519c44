"""The shared step against a loop written with torch's own parts."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from fastchargpt.choices import choose_compile
from fastchargpt.config import GPTConfig
from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.model import GPT
from fastchargpt.native_step import native_step_problem
from fastchargpt.precision import choose_device, choose_precision
from fastchargpt.step import make_train_step

CONFIG = GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=11)


def batches(count: int, size: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        tuple(torch.randint(11, (2, size, 8), generator=generator))  # type: ignore[misc]
        for _ in range(count)
    ]


def fresh() -> GPT:
    torch.manual_seed(2)
    return GPT(CONFIG)


def plain_losses(model: GPT, data: list[tuple[torch.Tensor, torch.Tensor]], clip: float, rate: float) -> list[float]:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99), foreach=False, fused=False)
    losses = []
    for x, y in data:
        loss = model(x, y)[1]
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("parts", [1, 2])
def test_equals_a_plain_loop(clip: float, parts: int) -> None:
    data = batches(20)
    expected = plain_losses(fresh(), data, clip, 1e-2)
    step = make_train_step(
        fresh(), learning_rate=1e-2, grad_clip=clip, gradient_accumulation_steps=parts, precision="fp32"
    )
    found = [step(x, y).item() for x, y in data]
    assert found == pytest.approx(expected, abs=2e-5)
    if parts == 1:  # and a rate that is a tenth too high would show
        wrong = plain_losses(fresh(), data, clip, 1.1e-2)
        assert max(abs(a - b) for a, b in zip(wrong, expected, strict=True)) > 1e-3
    assert step.iteration == 20
    assert (step.grad_norm is None) == (clip == 0.0)


def test_schedule_sets_each_steps_rate() -> None:
    seen = []
    step = make_train_step(fresh(), learning_rate=lambda i: seen.append(i) or 0.0, weight_decay=0.0)  # type: ignore[func-returns-value]
    before = [p.clone() for p in step.model.parameters()]
    for x, y in batches(3):
        step(x, y)
    assert seen[-3:] == [0, 1, 2]
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_state_goes_on_bit_for_bit() -> None:
    data = batches(6)
    whole = make_train_step(fresh(), learning_rate=lambda i: 1e-2 / (i + 1))
    expected = [whole(x, y).item() for x, y in data]
    first = make_train_step(fresh(), learning_rate=lambda i: 1e-2 / (i + 1))
    for x, y in data[:3]:
        first(x, y)
    second = make_train_step(fresh(), learning_rate=lambda i: 1e-2 / (i + 1))
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    assert [second(x, y).item() for x, y in data[3:]] == expected[3:]


def test_compiled_equals_eager() -> None:
    if not choose_compile("auto", torch.device("cpu")).pending:
        pytest.skip("needs a C++ compiler")
    data = batches(3)
    eager, compiled = make_train_step(fresh()), make_train_step(fresh(), compile=True)
    for x, y in data:
        assert compiled(x, y).item() == pytest.approx(eager(x, y).item(), abs=1e-5)


def test_bf16_is_close_and_the_weights_stay_fp32() -> None:
    data = batches(5)
    exact, rough = make_train_step(fresh(), precision="fp32"), make_train_step(fresh(), precision="bf16")
    for x, y in data:
        assert rough(x, y).item() == pytest.approx(exact(x, y).item(), abs=0.02)
    assert {p.dtype for p in rough.model.parameters()} == {torch.float32}


def test_torchs_settings_are_left_as_found() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        make_train_step(fresh(), precision="fp32")(*batches(1)[0])
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="a batch of 3 sequences cannot be split into 2 equal micro-batches"):
        make_train_step(fresh(), gradient_accumulation_steps=2)(*batches(1, size=3)[0])
    with pytest.raises(ConfigError, match="gradient_accumulation_steps must be at least 1, not 0"):
        make_train_step(fresh(), gradient_accumulation_steps=0)
    with pytest.raises(BackendUnavailableError, match="precision fp16 is slow and unsafe on a CPU"):
        make_train_step(fresh(), precision="fp16")
    with pytest.raises(BackendUnavailableError, match="tf32 exists on NVIDIA GPUs only"):
        make_train_step(fresh(), precision="tf32")
    with pytest.raises(ConfigError, match=r"device must be auto, cpu, .* not 'gpu'"):
        choose_device("gpu")


def test_auto_precision_follows_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    for capability, name in (((12, 0), "bf16"), ((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        choice = choose_precision("auto", gpu, torch_width=16)
        assert choice.name == name
        assert choice.needs_scaler == (name == "fp16")
        assert choice.reason
        with choice.matmuls():  # fp32 products, such as those outside autocast
            assert torch.get_float32_matmul_precision() == "high"
        with choose_precision("fp32", gpu).matmuls():  # asked for by name, they are not rounded
            assert torch.get_float32_matmul_precision() == "highest"
        for asked in ("bf16", "tf32"):
            if capability[0] >= 8:
                assert choose_precision(asked, gpu).name == asked
            else:
                with pytest.raises(BackendUnavailableError, match=f"{asked} needs compute capability 8.0.*=fp16"):
                    choose_precision(asked, gpu)


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("avx512", [False, True])
def test_auto_precision_follows_the_cpu_the_width_and_the_engine(
    amx: bool, avx512: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    wide = "bf16" if amx or avx512 else "fp32"
    for width, name in ((None, "fp32"), (64, "fp32"), (128, wide), (384, wide)):
        choice = choose_precision("auto", cpu, torch_width=width)
        assert choice.name == name
        assert choice.reason
    for recompute, engine, name in ((False, "auto", "fp32"), (False, "torch", wide), (True, "auto", wide)):
        model = GPT(dataclasses.replace(CONFIG, n_embd=128, n_layer=1))
        model.checkpoint_activations = recompute  # which the native step does not do
        by_torch = recompute or engine == "torch"
        if not by_torch and native_step_problem(model) is not None:
            continue  # no compiler, so torch takes this one too
        step = make_train_step(model, engine=engine)  # type: ignore[arg-type]
        assert step.precision.name == name
        assert (step.native is None) == by_torch


def test_auto_compile_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert str(choose_compile("auto", cpu)).startswith("compile auto: decided once some steps have been timed")
    for settled, says in (
        (choose_compile("auto", cpu, native=True), "native"),
        (choose_compile("auto", cpu, deterministic=True), "deterministic"),
        (choose_compile("off", cpu), "asked for"),
        (choose_compile("auto", torch.device("mps")), "mps"),
    ):
        assert not settled.on
        assert not settled.pending
        assert says in settled.reason
    assert str(choose_compile("on", cpu)) == "compile on: asked for"
    with pytest.raises(ConfigError, match="compile must be auto, on or off"):
        choose_compile("yes", cpu)  # type: ignore[arg-type]
    monkeypatch.setattr("shutil.which", lambda name: None)
    lacking = choose_compile("auto", cpu)
    assert not lacking.on
    assert not lacking.pending
    assert "C++ compiler" in lacking.reason
    with pytest.raises(BackendUnavailableError, match="C\\+\\+ compiler"):
        choose_compile("on", cpu)


def test_any_module_with_logits_and_loss_trains() -> None:
    layer = torch.nn.Linear(2, 1)
    model = torch.nn.Module()
    model.layer = layer
    model.forward = lambda x, y: (None, (layer(x) - y).square().mean())  # type: ignore[method-assign]
    step = make_train_step(model, learning_rate=0.1, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    data = SimpleNamespace(x=torch.randn(8, 2), y=torch.randn(8, 1))
    assert step(data.x, data.y) > step(data.x, data.y)
