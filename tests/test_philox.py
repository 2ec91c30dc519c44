"""Dropout bits: the published generator, the same on both sides."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from strict_interpreter import strict_interpreter

from fastchargpt.kernels import philox
from fastchargpt.kernels.philox_tile import Dropout, keep_tile


@triton.jit
def keep_kernel(
    out_ptr, seed_ptr, batch, head, first_row, first_column, threshold, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    keep = keep_tile(Dropout(seed_ptr, batch, head, threshold, 1.0), first_row, first_column, BLOCK_M, BLOCK_N)
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
    p, row, column = 0.3, 48, 16
    seed_tensor, out = torch.tensor([seed]), torch.empty(block_m, block_n, dtype=torch.int8)
    with strict_interpreter():
        keep_kernel[(1,)](out, seed_tensor, 1, 2, row, column, philox.dropout_threshold(p), block_m, block_n)
    mask = philox.keep_mask(seed_tensor, 2, 3, block_m, column + block_n, p, first_row=row)
    assert torch.equal(out.bool(), mask[1, 2, :, column:])


def test_rows_can_be_drawn_from_any_first_one() -> None:
    seed = torch.tensor([11])
    whole = philox.keep_mask(seed, 2, 2, 9, 13, 0.5)
    assert torch.equal(whole[:, :, 4:], philox.keep_mask(seed, 2, 2, 5, 13, 0.5, first_row=4))


def test_a_call_gives_eight_draws_of_a_block() -> None:
    """The documented places, one by one: rows r and r + 8, columns c, c + 1, c + 8 and c + 9 of each 16 x 16 block."""
    seed, p = torch.tensor([5]), 0.3
    mask = philox.keep_mask(seed, 1, 1, 35, 37, p)[0, 0]
    expected = torch.zeros(48, 48, dtype=torch.bool)
    for block_row, block_column, r, pair in itertools.product(range(3), range(3), range(8), range(4)):
        counter = (4 * block_column + pair, 8 * block_row + r, 0, 0)
        words = philox.philox_4x32(tuple(torch.tensor([c]) for c in counter), (seed, torch.tensor([0])))  # type: ignore[arg-type]
        draws = [half for word in words for half in (int(word) & 0xFFFF, int(word) >> 16)]
        for draw, (lower, right, odd) in zip(draws, itertools.product(range(2), repeat=3), strict=True):
            row, column = 16 * block_row + 8 * lower + r, 16 * block_column + 8 * right + 2 * pair + odd
            expected[row, column] = draw >= p * 2**16
    assert torch.equal(mask, expected[:35, :37])


def test_draws_that_share_a_call_are_independent() -> None:
    """Every pair of the eight, over many calls: kept together as often as p says, within five deviations."""
    p, count = 0.3, 512
    keep = philox.keep_mask(torch.tensor([77]), 1, 1, count, count, p)[0, 0].double()
    calls = keep.view(count // 16, 2, 8, count // 16, 2, 4, 2).permute(1, 4, 6, 0, 2, 3, 5).reshape(8, -1)
    centred = calls - philox.keep_probability(p)
    correlations = centred @ centred.T / calls.shape[1] / (p * (1 - p))
    off = correlations - torch.diag(correlations.diag())
    assert float(off.abs().max()) < 5 / calls.shape[1] ** 0.5


@pytest.mark.parametrize("p", [0.1, 0.2, 1 / 3])
def test_the_probability_is_within_a_step_of_the_one_asked_for(p: float) -> None:
    assert abs(1 - p - philox.keep_probability(p)) <= 2**-17


@pytest.mark.parametrize("p", [0.0, 1e-12, 0.1, 1 - 1e-12])
def test_thresholds_fit_a_kernel_argument(p: float) -> None:
    assert 0 <= philox.dropout_threshold(p) < 2**16
    assert 0.0 < philox.keep_probability(p) <= 1.0
