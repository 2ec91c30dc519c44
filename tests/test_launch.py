"""Launches: what they keep from call to call, and what the driver is handed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from aot import record_launches
from fake_cuda import COMPILER, build, environment
from launches import Case, run_kernel
from strict_interpreter import strict_interpreter

from fastchargpt.kernels import launch
from fastchargpt.kernels.launch import Problem, alignment, heads_together, inverse, overlapping
from fastchargpt.kernels.programs import divided, located
from fastchargpt.kernels.tables import Config

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What launch_probe.py saw, a row a launch."""
    if sys.platform != "linux" or COMPILER is None:
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("driver")
    build(folder)
    command = [sys.executable, HERE / "launch_probe.py", folder]
    variables = environment(folder) | {"TRITON_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if "Python.h" in done.stderr:
        pytest.skip("Triton cannot build its launcher: this Python has no headers")
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def test_the_driver_gets_what_triton_itself_would_hand_it(launched: list[dict[str, Any]]) -> None:
    """Machine code, grid, shared memory and every parameter, with code found anew, kept, and for other addresses."""
    assert [row for row in launched if row["differences"]] == []
    assert {row["kernel"].removesuffix("_kernel") for row in launched} == {
        *("attention_forward", "decode_split", "decode_merge"),
        *("backward_dq", "backward_dkdv", "backward_blocks", "backward_tile"),
    }
    assert all(row["parameters"] >= 10 for row in launched)


def test_code_is_kept_and_misaligned_tensors_get_their_own(launched: list[dict[str, Any]]) -> None:
    for case in {row["case"] for row in launched}:
        first, second, misaligned, third = (
            [row for row in launched if (row["case"], row["attempt"]) == (case, attempt)]
            for attempt in ("first", "second", "misaligned", "third")
        )
        assert all(row["codes"] == 0 for row in first)
        assert all(row["codes"] == 1 for row in second)
        functions = [[row["function"] for row in rows] for rows in (first, second, third)]
        assert functions[0] == functions[1] == functions[2]
        for aligned, other in zip(first, misaligned, strict=True):
            if aligned["kernel"] != "decode_merge_kernel":  # which sees none of the caller's tensors
                assert aligned["function"] != other["function"]


def test_no_code_is_kept_of_a_triton_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, known in (("3.5.0", True), ("3.7.1", True), ("3.8.0", False), ("4.0", False)):
        launch._may_keep_code.cache_clear()
        monkeypatch.setattr(launch, "triton_version", lambda version=version: version)
        assert launch._may_keep_code() == known
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(launch, "triton_version", lambda: "3.7.1")
    launch._may_keep_code.cache_clear()
    assert not launch._may_keep_code()
    launch._may_keep_code.cache_clear()


@pytest.mark.parametrize(
    ("head_dim", "n_head", "expected"), [(64, 1, 16), (52, 4, 4), (100, 3, 4), (24, 2, 8), (10, 1, 2), (59, 2, 1)]
)
def test_the_alignment_of_a_packed_projection(head_dim: int, n_head: int, expected: int) -> None:
    def found(*views: torch.Tensor) -> int:
        return alignment((view.shape, view.stride()) for view in views)

    qkv = torch.zeros(2, 5, 3 * n_head, head_dim).transpose(1, 2)
    assert found(qkv[:, :n_head], qkv[:, n_head:]) == expected
    assert found(torch.zeros(2, 3, 4, 64), qkv) == expected  # the least of all
    assert found(qkv[:1, :1, :1]) == 16  # no stride is used


@triton.jit
def divide_kernel(n_ptr, quotient_ptr, rest_ptr, by, inverse, N: tl.constexpr):  # type: ignore[no-untyped-def]
    lanes = tl.arange(0, N)
    quotient, rest = divided(tl.load(n_ptr + lanes), by, inverse)
    tl.store(quotient_ptr + lanes, quotient)
    tl.store(rest_ptr + lanes, rest)


@pytest.mark.parametrize(
    "by", [1, 2, 3, 5, 6, 7, 12, 16, 31, 96, 641, 1000, 2**16 - 1, 2**16 + 1, 2**30 + 1, 2**31 - 1]
)
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])  # on the second by a product
def test_division_is_exact(target: str, by: int) -> None:
    most = 2**31 - 1
    multiples = [most // by * by, most // by // 2 * by, by]
    near = [n + d for n in (0, most, *multiples) for d in (-1, 0, 1) if 0 <= n + d <= most]
    generator = torch.Generator().manual_seed(by)
    numbers = torch.randint(0, most, (256,), generator=generator, dtype=torch.int64)
    numbers[: len(near)] = torch.tensor(near)
    n = numbers.to(torch.int32)
    quotient, rest = torch.empty_like(n), torch.empty_like(n)
    with strict_interpreter(target=target):
        divide_kernel[(1,)](n, quotient, rest, by, inverse(by), N=256)
    assert torch.equal(quotient.long(), numbers // by)
    assert torch.equal(rest.long(), numbers % by)
    assert 2**31 <= inverse(by) >> 6 < 2**32, "machine code depends on the type of an argument, and it on the size"


@triton.jit
def place_kernel(out_ptr, together, together_inverse, heads, heads_inverse):  # type: ignore[no-untyped-def]
    block, batch, head, batch_head = located(together, together_inverse, heads, heads_inverse)
    place = out_ptr + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * 4
    tl.store(place, block)
    tl.store(place + 1, batch)
    tl.store(place + 2, head)
    tl.store(place + 3, batch_head)


@pytest.mark.parametrize(
    ("blocks", "batch", "heads", "together"), [(4, 3, 2, 6), (5, 3, 2, 3), (3, 1, 7, 1), (1, 2, 2, 4)]
)
def test_every_block_of_every_head_has_a_program(blocks: int, batch: int, heads: int, together: int) -> None:
    count = batch * heads
    out = torch.full((blocks * count, 4), -1, dtype=torch.int32)
    with strict_interpreter():
        grid = (blocks * together, count // together, 1)
        place_kernel[grid](out, together, inverse(together), heads, inverse(heads))
    rows = [tuple(row) for row in out.tolist()]
    want = {(n, b, h, b * heads + h) for n in range(blocks) for b in range(batch) for h in range(heads)}
    assert set(rows) == want
    assert len(rows) == len(want)
    first = rows[:together]  # as many heads, and of each its first block
    assert [block for block, *_ in first] == [0] * together
    assert [batch_head for *_, batch_head in first] == list(range(together))


def _problem(batch: int, heads: int, time: int, head_dim: int = 64) -> Problem:
    shape = (batch, heads, time, head_dim)
    return Problem(shape, shape, torch.bfloat16, torch.device("cpu"), False, 1.0, True, 0.0, None, None)


def test_heads_are_begun_together_as_far_as_the_cache_holds_what_they_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_l2_bytes", lambda _: 50 * 2**20)
    bytes_of_a_head = 2 * 1024 * 64 * 2  # keys and values
    fitting = 25 * 2**20 // bytes_of_a_head
    assert fitting == 100
    assert heads_together(_problem(16, 6, 1024), 6, in_turn=False) == 96
    assert heads_together(_problem(64, 6, 1024), 6, in_turn=False) == 96
    assert heads_together(_problem(101, 1, 1024), 1, in_turn=False) == 101  # a prime, and nearly as many
    assert heads_together(_problem(10_007, 1, 1024), 1, in_turn=False) == 1
    assert heads_together(_problem(1, 70_001, 1024), 70_001, in_turn=False) == 70_001  # more than a grid is wide
    for batch in range(1, 300, 7):
        together = heads_together(_problem(batch, 6, 1024), 6, in_turn=False)
        assert batch * 6 % together == 0


def test_a_table_may_say_that_heads_come_one_after_another() -> None:
    assert heads_together(_problem(64, 6, 256), 6, in_turn=True) == 1
    assert 70_000 // heads_together(_problem(35_000, 2, 128), 2, in_turn=True) < 65_536  # as wide as a grid is


def test_only_hopper_and_later_begin_a_launch_before_the_last_one_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    yes = {"launch_pdl": True}
    for capability, driver, option in (
        ((8, 9), 13_000, {}), ((9, 0), 13_000, yes), ((12, 0), 12_030, yes), ((9, 0), 12_020, {})
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        monkeypatch.setattr(launch, "_driver_version", lambda found=driver: found)
        assert overlapping(torch.device("cuda", 0)) == option
    assert overlapping(torch.device("cpu")) == {}


@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv", "blocks", "tile", "decode"])
def test_sizes_alone_need_no_machine_code_of_their_own(kernel: str) -> None:
    """Neither one head or sequence nor sixteen of them, which Triton would see in an ordinary argument.

    The inverse of 2 is a multiple of 16.
    """
    config = Config(kernel, 64, 64, 4, 1) if kernel != "decode" else Config(kernel, 16, 64, 4, 1)
    codes = []
    for heads, batch, length in ((6, 4, 256), (1, 1, 256), (2, 1, 256), (16, 16, 64), (3, 35_000, 1024)):
        length = 64 if kernel == "tile" else length
        case = Case(dtype=torch.bfloat16, head_dim=64, length=length, heads=heads, kv_heads=heads, batch=batch)
        with record_launches("sm_90") as launches:
            run_kernel(config, case, "meta")
        codes.append([(found.name, found.signature, found.constexprs, found.attributes) for found in launches])
    assert all(code == codes[0] for code in codes)


@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkdv", "blocks"])
def test_the_order_that_settings_ask_for_is_launched(kernel: str, in_turn: bool) -> None:
    case = Case(dtype=torch.bfloat16, head_dim=64, length=256, heads=6, kv_heads=6, batch=4)
    with record_launches("sm_90") as launches:
        run_kernel(Config(kernel, 64, 64, 4, 1, in_turn=in_turn), case, "meta")
    expected = (4, 24, 1) if in_turn else (4 * 24, 1, 1)
    assert [found.grid for found in launches if "forward" in found.name or "backward" in found.name] == (
        [expected] * (2 if kernel in ("dq", "dkdv") else 1)
    )
