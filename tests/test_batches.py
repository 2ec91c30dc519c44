"""Batches: the notebook's first one, every window and every token exactly once, exact resume, disjoint ranks."""

import io
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastchargpt.batches import TokenBatches, eval_batches, place_tokens
from fastchargpt.config import IGNORE_INDEX
from fastchargpt.errors import CheckpointError, ConfigError, CorpusError

ORDERS = pytest.mark.parametrize("order", ["random", "epochs"])


def numbered(n: int) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Tokens that are their own position, so a batch says where it was cut."""
    return np.arange(n, dtype=np.uint16)


def test_the_notebooks_first_batch() -> None:
    path = Path(os.environ.get("FASTCHARGPT_DATA_DIR", ""), "tinyshakespeare.txt")
    if not path.is_file():
        pytest.skip("needs tinyshakespeare.txt in $FASTCHARGPT_DATA_DIR")
    text = path.read_text(encoding="utf-8")
    stoi = {char: i for i, char in enumerate(sorted(set(text)))}
    data = torch.tensor([stoi[char] for char in text[: int(0.9 * len(text))]])
    batches = TokenBatches(data.numpy().astype(np.uint8), batch_size=4, block_size=8)
    torch.manual_seed(1337)
    x, y = batches.next_batch()
    assert x[:, :4].tolist() == [[24, 43, 58, 5], [44, 53, 56, 1], [52, 58, 1, 58], [25, 17, 27, 10]]
    torch.manual_seed(1337)
    starts = torch.randint(len(data) - 8, (4,))
    assert torch.equal(x, torch.stack([data[i : i + 8] for i in starts]))
    assert torch.equal(y, torch.stack([data[i + 1 : i + 9] for i in starts]))
    torch.manual_seed(1337)
    again = TokenBatches(data, batch_size=4, block_size=8, generator=torch.default_generator).next_batch()
    assert torch.equal(again[0], x)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.int64, ">u2"])
@ORDERS
def test_every_dtype_comes_out_as_contiguous_int64(dtype: Any, order: Any) -> None:
    top = {1: 255, 2: 65_535}.get(np.dtype(dtype).itemsize, 100_000)
    tokens = np.linspace(0, top, 50).astype(dtype)
    x, y = TokenBatches(tokens, batch_size=16, block_size=10, order=order, seed=3).next_batch()
    assert x.dtype == y.dtype == torch.int64
    assert x.shape == y.shape == (16, 10)
    assert x.is_contiguous()
    assert y.is_contiguous()
    assert {*x.flatten().tolist(), *y.flatten().tolist()} <= {*tokens.tolist()}
    assert torch.equal(x[:, 1:], y[:, :-1])
    (ex, ey), *_ = eval_batches(tokens, 49, 1)
    assert ex.flatten().tolist() + ey.flatten().tolist()[-1:] == tokens.tolist()


def test_tokens_are_kept_narrow_and_not_copied(tmp_path: Path) -> None:
    tokens = np.arange(1000, dtype=np.uint8)
    assert place_tokens(tokens).data_ptr() == tokens.ctypes.data
    assert place_tokens(tokens.astype(np.uint16)).element_size() == 2
    numbered(500).tofile(tmp_path / "train.bin")
    mapped = np.memmap(tmp_path / "train.bin", np.uint16, "r")
    x, _ = TokenBatches(mapped, batch_size=2, block_size=4, seed=0).next_batch()
    assert x.tolist() == [list(range(row[0], row[0] + 4)) for row in x.tolist()]


def test_random_offsets_reach_the_first_and_the_last_window() -> None:
    x, y = TokenBatches(numbered(9), batch_size=300, block_size=4, seed=0).next_batch()
    assert {row[0] for row in x.tolist()} == set(range(5))
    assert y.max() == 8


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 200), st.integers(1, 40), st.integers(1, 12), st.integers(0, 99))
def test_epochs_visit_every_window_once(n: int, block: int, batch: int, seed: int) -> None:
    if n < block + 1:
        return
    batches = TokenBatches(numbered(n), batch_size=batch, block_size=block, order="epochs", seed=seed)
    flat: list[int] = []
    while batches.epoch < 4:
        flat += [row[0] for row in batches.next_batch()[0].tolist()]
    for _ in range(3):  # the first three epochs are complete
        phase = flat[0] % block
        count = (n - 1 - phase) // block
        epoch, flat = flat[:count], flat[count:]
        assert sorted(epoch) == list(range(phase, phase + count * block, block))
        assert phase + count * block <= n - 1 < phase + (count + 1) * block


def test_epochs_are_shuffled_and_their_phases_differ() -> None:
    batches = TokenBatches(numbered(1000), batch_size=10, block_size=10, order="epochs", seed=5)
    starts = [[row[0] for row in batches.next_batch()[0].tolist()] for _ in range(100)]
    assert starts[0] != sorted(starts[0])
    assert len({row[0] % 10 for row in starts}) > 3


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 300), st.integers(1, 40), st.integers(1, 9))
def test_evaluation_predicts_every_token_once(n: int, block: int, batch: int) -> None:
    inputs, targets, shapes = [], [], set()
    for x, y in eval_batches(numbered(n), block, batch):
        shapes.add((tuple(x.shape), tuple(y.shape)))
        inputs += x[y != IGNORE_INDEX].tolist()
        targets += y[y != IGNORE_INDEX].tolist()
        assert (x[y == IGNORE_INDEX] < n).all()
    assert targets == list(range(1, n))
    assert inputs == list(range(n - 1))
    assert len(shapes) == 1


@ORDERS
@pytest.mark.parametrize("taken", [0, 1, 7, 25])
def test_resume_is_exact_even_in_mid_epoch(order: Any, taken: int) -> None:
    def make(seed: int) -> TokenBatches:
        return TokenBatches(numbered(200), batch_size=6, block_size=7, order=order, seed=seed)

    first = make(11)
    for _ in range(taken):
        first.next_batch()
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    expected = [first.next_batch() for _ in range(30)]
    file.seek(0)
    second = make(99)
    second.next_batch()
    second.load_state_dict(torch.load(file, weights_only=True))
    for (x, y), (x2, y2) in zip(expected, [second.next_batch() for _ in range(30)], strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)
    assert first.epoch == second.epoch


def test_resume_from_the_global_generator_leaves_it_alone() -> None:
    def make() -> TokenBatches:
        return TokenBatches(numbered(200), batch_size=6, block_size=7, order="epochs")

    first = make()
    first.next_batch()
    state, mine = first.state_dict(), torch.get_rng_state()
    expected = [first.next_batch()[0] for _ in range(9)]
    second = make()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    second.load_state_dict(state)
    assert torch.equal(torch.get_rng_state(), before)
    torch.set_rng_state(mine)  # as a trainer does
    assert all(torch.equal(x, second.next_batch()[0]) for x in expected)


@ORDERS
def test_ranks_share_out_the_batch_of_one_process(order: Any) -> None:
    def make(rank: int, world_size: int) -> TokenBatches:
        return TokenBatches(
            numbered(500), batch_size=12, block_size=8, order=order, seed=1, rank=rank, world_size=world_size
        )

    whole, ranks = make(0, 1), [make(rank, 4) for rank in range(4)]
    for _ in range(8):
        x, y = whole.next_batch()
        parts = [rank.next_batch() for rank in ranks]
        assert torch.equal(torch.cat([part[0] for part in parts]), x)
        assert torch.equal(torch.cat([part[1] for part in parts]), y)
    resumed = make(1, 2)
    resumed.load_state_dict(ranks[3].state_dict())
    assert torch.equal(resumed.next_batch()[0], whole.next_batch()[0][6:])


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"batch_size": 0}, "batch_size must be"),
        ({"block_size": -1}, "block_size must be"),
        ({"block_size": 2.0}, "block_size must be"),
        ({"order": "sorted"}, "order must be"),
        ({"seed": 1, "generator": torch.Generator()}, "not both"),
        ({"rank": 2, "world_size": 2, "seed": 0}, "rank must lie"),
        ({"world_size": 3, "seed": 0}, "divisible"),
        ({"world_size": 2}, "same seed"),
    ],
)
def test_arguments_are_checked(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TokenBatches(numbered(50), **{"batch_size": 4, "block_size": 8, **bad})


def test_a_text_shorter_than_a_block_names_both_lengths() -> None:
    with pytest.raises(CorpusError, match=r"split of 8 tokens .*block_size 8.* at least 9"):
        TokenBatches(numbered(8), batch_size=1, block_size=8)
    TokenBatches(numbered(9), batch_size=1, block_size=8, order="epochs").next_batch()
    assert len(list(eval_batches(numbered(8), 64, 4))) == 1  # evaluation pads instead
    with pytest.raises(CorpusError, match="nothing to predict"):
        eval_batches(numbered(1), 8, 4)
    for bad in (np.zeros((2, 9), np.uint8), np.zeros(9), torch.zeros(9)):
        with pytest.raises(CorpusError, match="must be"):
            TokenBatches(bad, batch_size=1, block_size=8)


@pytest.mark.parametrize(
    "change",
    [
        {"order": "random"},
        {"n_tokens": 99},
        {"block_size": 3},
        {"cursor": 10**6},
        {"cursor": -1},
        {"epoch": "1"},
        {"rng": None},
        {"rng": torch.zeros(3, dtype=torch.uint8)},
        {"rng": "x"},
        {"extra": 1},
    ],
)
def test_a_foreign_or_damaged_state_is_refused(change: dict[str, Any]) -> None:
    batches = TokenBatches(numbered(100), batch_size=4, block_size=8, order="epochs", seed=0)
    batches.next_batch()
    with pytest.raises(CheckpointError, match="data cursor"):
        batches.load_state_dict({**batches.state_dict(), **change})


def test_cuda_without_a_number_is_the_gpu_that_the_tokens_are_on() -> None:
    # torch calls "cuda" and "cuda:0" unequal; taken for another device, tokens on the GPU were to be pinned, an error
    from fastchargpt.batches import _is_on

    for have, want, same in (
        ("cuda:0", "cuda", True),
        ("cuda:1", "cuda:1", True),
        ("cuda:0", "cuda:1", False),
        ("cpu", "cuda", False),
        ("cpu", "cpu", True),
    ):
        tokens = SimpleNamespace(device=torch.device(have))
        assert _is_on(tokens, torch.device(want)) == same  # type: ignore[arg-type]
    meta = TokenBatches(numbered(100), batch_size=4, block_size=8, device="meta", seed=1)
    assert meta.resident
    assert {tensor.device.type for tensor in meta.next_batch()} == {"meta"}
