"""The memory equipment of the strict interpreter: NaN in what was never written, guard bytes, and what a view owns."""

import numpy as np
import pytest
import torch
from strict_interpreter import StrictError, poisoned_empty, strict_interpreter, with_margins
from strict_memory import LaunchMemory
from strict_toys import launch, partial_write_kernel


def test_poisoned_empty_covers_every_way_to_allocate():
    with poisoned_empty():
        base = torch.zeros(3, 4)
        floats = [torch.empty(3), torch.empty_like(base), torch.empty_strided((2, 2), (4, 1)), base.new_empty(2)]
        floats += [torch.empty(3, dtype=torch.bfloat16), base.new_empty_strided((2,), (2,)), base.T.new_empty(5)]
        integers = torch.empty(3, dtype=torch.int64)
    assert all(t.isnan().all() for t in floats)
    assert (integers == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_interpreter_scope_poisons_what_is_never_written():
    with strict_interpreter():
        y = torch.empty(8)
        partial_write_kernel[(1,)](y, 8, BLOCK=8)
    assert y.isnan().tolist() == [False] * 7 + [True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_guard_margins_see_one_byte(dtype):
    source = torch.arange(24).to(dtype).view(4, 6)[:, :5]
    guarded = with_margins(source)
    assert torch.equal(guarded.tensor, source)
    assert guarded.tensor.stride() == source.stride()
    guarded.assert_intact()
    guarded.tensor.zero_()
    guarded.assert_intact()
    for byte in (0, 255, 256 + 5 * guarded.tensor.element_size(), -1):  # margins, and the gap after the first row
        guarded.buffer[byte] ^= 1
        with pytest.raises(StrictError, match="1 guard byte"):
            guarded.assert_intact()
        guarded.buffer[byte] ^= 1


def test_guard_margins_know_what_was_written():
    guarded = with_margins(torch.empty(2, 8), fill=False)
    launch(partial_write_kernel, (1,), guarded.tensor, 8, BLOCK=8)
    with pytest.raises(StrictError, match="9 of 16 elements"):
        guarded.assert_written()
    guarded.tensor.fill_(0.0)
    guarded.assert_written()
    guarded.assert_intact()


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()])
def test_guard_margins_of_odd_shapes(shape):
    guarded = with_margins(torch.zeros(shape))
    guarded.assert_intact()
    assert guarded.tensor.shape == shape


def test_every_load_and_store_agrees_with_numpy_on_a_random_view():
    """The bounds check marks exactly the elements of a view: compared with numpy's own idea of the same view."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        buffer = torch.zeros(512, dtype=(torch.float32, torch.bfloat16)[int(rng.integers(2))])
        shape, stride = rng.integers(1, 5, 3), rng.integers(0, 30, 3)
        offset = int(rng.integers(0, 40))
        view = buffer.as_strided(shape.tolist(), stride.tolist(), offset)
        memory = LaunchMemory("k", [("x", view)])
        expected = {offset + int((np.array(i) * stride).sum()) for i in np.ndindex(*shape)}
        (region,) = memory.regions
        assert set(np.flatnonzero(region.owner >= 0).tolist()) == expected
