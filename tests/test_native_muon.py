"""The Muon that the native step follows: against float64, against torch's own, and which weights it takes."""

import torch
from native_cases import make_model, needs_the_library  # noqa: F401 (a fixture, used by every test)

from fastchargpt.optim import Muon, make_muon, orthogonalise, shape_factor


def test_orthogonalising_equals_the_iteration_in_float64():
    for shape in ((3, 64, 64), (2, 64, 256), (2, 256, 64)):
        matrices = torch.randn(shape, dtype=torch.float64)
        found = orthogonalise(matrices.float()).double()
        expected = orthogonalise(matrices)
        assert (found - expected).norm() / expected.norm() < 1e-4
        values = torch.linalg.svdvals(expected)
        assert values.max() < 1.3
        assert (values > 0.3).double().mean() > 0.95  # the iteration takes most of them into about [0.7, 1.2]


def test_muon_is_torchs_own_for_one_matrix():
    torch.manual_seed(0)
    for shape in ((96, 48), (48, 96), (64, 64)):
        ours, theirs = (torch.nn.Parameter(torch.linspace(-1, 1, shape[0] * shape[1]).reshape(shape)) for _ in range(2))
        mine = Muon([(ours, (shape[0],))], [], lr=1.0, matrix_lr=0.02, momentum=0.95, weight_decay=0.1)
        other = torch.optim.Muon([theirs], lr=0.02, momentum=0.95, weight_decay=0.1, nesterov=True)
        for _ in range(4):
            ours.grad = torch.randn(shape)
            theirs.grad = ours.grad.clone()
            before = theirs.detach().clone()
            mine.step()
            other.step()
            # torch's iterates in bfloat16
            change = (theirs - before).norm()
            assert (ours - theirs).norm() < 0.03 * change * 4


def test_stacked_matrices_are_orthogonalised_one_by_one():
    model = make_model("modern", n_kv_head=2)
    optimizer = make_muon(
        model, learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.0, betas=(0.9, 0.95), momentum=0.0
    )
    weight = model.transformer.h[0].attn.c_attn.weight
    assert optimizer.blocks(weight) == (64, 32, 32)
    before = weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for part, grad in zip((before - weight.detach()).split((64, 32, 32)), weight.grad.split((64, 32, 32)), strict=True):
        expected = 0.02 * shape_factor(*part.shape) * orthogonalise(grad[None])[0]
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-5)


def test_muon_takes_the_blocks_matrices_and_nothing_else():
    model = make_model("lecture")
    optimizer = make_muon(model, learning_rate=1e-3, matrix_learning_rate=0.02, weight_decay=0.1, betas=(0.9, 0.95))
    matrices = {id(p) for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in matrices}
    assert names == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(3)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    others = {id(p) for group in optimizer.param_groups if not group["muon"] for p in group["params"]}
    assert others | matrices == {id(p) for p in model.parameters()}
