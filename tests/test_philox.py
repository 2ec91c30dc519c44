"""Dropout bits: the published generator, the same on both sides."""

import pytest
import torch
import triton
import triton.language as tl
from strict_interpreter import strict_interpreter

from fastchargpt.kernels import philox
from fastchargpt.kernels.philox_tile import keep_tile


@triton.jit
def keep_kernel(
    out_ptr, seed_ptr, batch, head, first_row, first_column, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    keep = keep_tile(seed_ptr, batch, head, first_row, first_column, threshold, BLOCK_M, BLOCK_N)
    rows, columns = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    tl.store(out_ptr + rows[:, None] * BLOCK_N + columns[None, :], keep.to(tl.int8))


def test_philox_is_the_published_generator() -> None:
    # Known answers of Random123 (kat_vectors, "philox4x32 7").
    def words(counter: list[int], key: list[int]) -> list[int]:
        given = [torch.tensor([x]) for x in (*counter, *key)]
        return [int(x) for x in philox.philox_4x32(tuple(given[:4]), tuple(given[4:]))]  # type: ignore[arg-type]

    ones = 0xFFFFFFFF
    assert philox.ROUNDS == 7
    assert words([0] * 4, [0] * 2) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert words([ones] * 4, [ones] * 2) == [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -987654321012345])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 16), (32, 64)])
def test_a_tile_is_a_window_of_the_mask(seed: int, block_m: int, block_n: int) -> None:
    p, row, column = 0.3, 48, 20
    seed_tensor, out = torch.tensor([seed]), torch.empty(block_m, block_n, dtype=torch.int8)
    with strict_interpreter():
        keep_kernel[(1,)](out, seed_tensor, 1, 2, row, column, philox.dropout_threshold(p), block_m, block_n)
    mask = philox.keep_mask(seed_tensor, 2, 3, block_m, column + block_n, p, first_row=row)
    assert torch.equal(out.bool(), mask[1, 2, :, column:])


def test_rows_can_be_drawn_from_any_first_one() -> None:
    seed = torch.tensor([11])
    whole = philox.keep_mask(seed, 2, 2, 9, 13, 0.5)
    assert torch.equal(whole[:, :, 4:], philox.keep_mask(seed, 2, 2, 5, 13, 0.5, first_row=4))


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.1, 1 - 1e-12])
def test_thresholds_fit_a_kernel_argument(p: float) -> None:
    assert 0 <= philox.dropout_threshold(p) < 2**31
    assert 0.0 < philox.keep_probability(p) <= 1.0
