"""GPT and causal_attention as ordinary PyTorch: whatever takes a module or a function takes these."""

import copy
import math
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import peer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastchargpt import GPT, GPTConfig, causal_attention

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "vocab_size": 13}
FAMILIES = ["lecture", "nanogpt", "modern"]


def make(family: str = "nanogpt", **fields: Any) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig.family(family, **{**SHAPE, **fields}))  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


def batch(size: int = 4) -> tuple[Tensor, Tensor]:
    x = torch.randint(13, (size, 16), generator=torch.Generator().manual_seed(2))
    return x, x.roll(-1, 1)


def gradients(model: nn.Module, *data: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(*data)[1], list(model.parameters())))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies(family: str, copied: Callable[[GPT], GPT]) -> None:
    model = make(family)
    again = copied(model)
    assert again.config == model.config
    assert not {id(p) for p in model.parameters()} & {id(p) for p in again.parameters()}
    assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tie_weights
    torch.testing.assert_close(gradients(again, *batch()), gradients(model, *batch()), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_functional_call_and_per_sample_gradients(family: str) -> None:
    model, (x, y) = make(family), batch()
    parameters = dict(model.named_parameters())

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (x, y))[1]

    torch.testing.assert_close(loss(parameters, x, y), model(x, y)[1], rtol=0, atol=0)
    whole = torch.func.grad(loss)(parameters, x, y)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x[:, None], y[:, None])
    for name, expected in zip(parameters, gradients(model, x, y), strict=True):
        torch.testing.assert_close(whole[name], expected)
        torch.testing.assert_close(each[name].mean(0), expected, rtol=1e-4, atol=1e-6)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    assert loss(zeros, x, y).item() == pytest.approx(math.log(13))


@pytest.mark.parametrize("family", FAMILIES)
def test_export(family: str, tmp_path: Path) -> None:
    model, (x, _) = make(family).eval(), batch()
    # torch.export sets a slice as long as its table apart, so block_size itself needs a model exported at that length
    sizes = {"idx": {0: torch.export.Dim("B", max=64), 1: torch.export.Dim("T", min=2, max=15)}}
    torch.export.save(torch.export.export(model, (x[:3, :7],), dynamic_shapes=sizes), tmp_path / "model.pt2")
    exported = torch.export.load(tmp_path / "model.pt2").module()
    for part in (x[:, :15], x[:2, :5]):
        torch.testing.assert_close(exported(part)[0], model(part)[0])


def test_export_attention() -> None:
    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_attention(q, k, v)

    q, k, v = torch.randn(3, 2, 4, 9, 8)
    exported = torch.export.export(Attention(), (q, k, v)).module()
    torch.testing.assert_close(exported(q, k, v), causal_attention(q, k, v))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing(family: str, reentrant: bool) -> None:
    # dropout must fall on the same places when a block is computed again
    model, (x, y) = make(family, dropout=0.2), batch()
    torch.manual_seed(4)
    expected = gradients(model, x, y)
    for block in model.transformer.h:
        inner = block.forward
        block.forward = lambda *a, inner=inner: checkpoint(inner, *a, use_reentrant=reentrant)
    torch.manual_seed(4)
    model(x, y)[1].backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast(family: str) -> None:
    model, (x, y) = make(family), batch()
    expected = gradients(model, x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, loss = model(x, y)
        q = torch.randn(1, 2, 5, 8)
        assert causal_attention(q, q, q).dtype == torch.bfloat16
    assert logits.dtype == torch.bfloat16
    found = torch.autograd.grad(loss, list(model.parameters()))
    assert all(a.dtype == torch.float32 for a in found)
    cosine = torch.cosine_similarity(
        torch.cat([a.flatten() for a in found]), torch.cat([b.flatten() for b in expected]), 0
    )
    assert cosine > 0.99


@pytest.mark.parametrize("family", FAMILIES)
def test_other_optimisers_and_hooks(family: str) -> None:
    # parameter groups by hand, a scheduler, gradient hooks, EMA: the things that loops do
    model, (x, y) = make(family), batch()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD([{"params": model.transformer.parameters()}], lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    seen: list[Tensor] = []
    handle = model.transformer.h[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    first = model(x, y)[1].item()
    for _ in range(10):
        loss = model(x, y)[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update_parameters(model)
    handle.remove()
    assert len(seen) == 11
    assert model(x, y)[1].item() < first
    assert average(x, y)[1].item() < first


def worker(rank: int, world: int, folder: str) -> None:
    """One process of a data-parallel step; the first writes the gradients."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    model = nn.parallel.DistributedDataParallel(make(), static_graph=False)
    x, y = (part.chunk(world)[rank] for part in batch())
    with model.no_sync():  # as nanoGPT does: gradients are averaged in the last micro-step alone
        model(x[:1], y[:1])[1].backward()
    model(x[1:], y[1:])[1].backward()
    if rank == 0:
        torch.save([parameter.grad / 2 for parameter in model.module.parameters()], f"{folder}/grads.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # Python's own end can meet a thread of gloo's that wants the interpreter, which aborts the process


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_ddp(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(worker, (2, str(tmp_path)), nprocs=2)
    for found, expected in zip(torch.load(tmp_path / "grads.pt"), gradients(make(), *batch()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def step_with(
    wrap: Callable[[nn.Module, Any], tuple[nn.Module, Any]], backward: Callable[[Tensor], None]
) -> list[Tensor]:
    """The weights after three steps of a loop that wraps its model."""
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    wrapped, wrapped_optimizer = wrap(model, optimizer)
    for _ in range(3):
        loss = wrapped(*batch())[1]
        backward(loss)
        wrapped_optimizer.step()
        wrapped_optimizer.zero_grad()
    return [parameter.detach() for parameter in model.parameters()]


def test_fabric() -> None:
    fabric = peer("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    expected = step_with(lambda model, optimizer: (model, optimizer), Tensor.backward)
    torch.testing.assert_close(step_with(fabric.setup, fabric.backward), expected, rtol=0, atol=0)


def test_accelerate() -> None:
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    accelerator = peer("accelerate").Accelerator(cpu=True)
    expected = step_with(lambda model, optimizer: (model, optimizer), Tensor.backward)
    torch.testing.assert_close(step_with(accelerator.prepare, accelerator.backward), expected, rtol=0, atol=0)
