"""Launch tables: read, complete, and refused in words."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from strict_interpreter import strict_interpreter

from fastchargpt.attention import causal_attention, explain_attention
from fastchargpt.errors import BackendUnavailableError, ConfigError
from fastchargpt.kernels import tables, tuning
from fastchargpt.kernels.tuning import Config, Entry, known_archs, load_table, plan_for, widest_head
from fastchargpt.parity import attention_inputs, check_attention

HEAD_DIMS = (8, 16, 59, 64, 128)


def test_the_targets_have_tables() -> None:
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"} <= set(known_archs())


@pytest.mark.parametrize("arch", known_archs())
def test_a_table_serves_what_small_gpts_need_at_every_length(arch: str) -> None:
    for head_dim in HEAD_DIMS:
        for length in (1, 8, 64, 65, 256, 512, 513, 1024, 100_000):
            for dropout in (False, True):
                plan = plan_for(arch, "half", head_dim, length, dropout)
                assert plan.forward.kernel == "forward"
                if len(plan.backward) == 1:
                    backward = plan.backward[0]
                    assert backward.kernel in ("tile", "blocks")
                    if backward.kernel == "tile":
                        assert length <= min(backward.block_m, backward.block_n)
                else:
                    assert [config.kernel for config in plan.backward] == ["dq", "dkdv"]


@pytest.mark.parametrize("arch", known_archs())
def test_what_a_table_serves_in_fp32(arch: str) -> None:
    """Up to head_dim 128 at every length; beyond, exact products leave dq no registers on any target."""
    for length in (1, 64, 1000):
        assert plan_for(arch, "fp32", 128, length, False).backward
    with pytest.raises(ConfigError, match="entry for fp32, head_dim 129"):
        plan_for(arch, "fp32", 129, 1000, False)


@pytest.mark.parametrize(("head_dim", "precision"), [(100, "highest"), (128, "highest"), (128, "high")])
def test_wide_heads_in_fp32_are_right_with_the_tables_settings(head_dim: int, precision: str) -> None:
    inputs = attention_inputs(1, 2, 70, head_dim, device=torch.device("cpu"), dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with strict_interpreter():
            eps = 2.0**-10 if precision == "high" else None
            parity = check_attention(lambda q, k, v: causal_attention(q, k, v, backend="triton"), inputs, eps=eps)
    finally:
        torch.set_float32_matmul_precision(before)
    assert parity.right, parity


@pytest.mark.parametrize("arch", known_archs())
def test_entries_are_well_formed_and_none_is_said_twice(arch: str) -> None:
    entries = load_table(arch)
    keys = [(e.config.kernel, e.dtype, e.head_dim, e.max_length, e.dropout, e.calls == "other") for e in entries]
    assert len(set(keys)) == len(keys)
    for entry in entries:
        assert entry.config.kernel in tuning.KERNELS
        assert entry.dtype in ("half", "fp32")
        for size in (entry.config.block_m, entry.config.block_n, entry.config.num_warps):
            assert size & (size - 1) == 0
        assert min(entry.config.block_m, entry.config.block_n) >= 16  # the least that a tensor core takes


def test_a_table_survives_being_written(tmp_path: Path) -> None:
    entries = [
        Entry(config=Config("forward", 64, 32, 4, 2), dtype="half", head_dim=64, max_length=None, dropout=True),
        Entry(config=Config("tile", 64, 64, 4, 1, 128), dtype="half", head_dim=64, max_length=64, dropout=False),
    ]
    path = tmp_path / "sm_80.json"
    tables.save_table(path, "sm_80", entries, facts={"gpu": "A100"}, lists={"measurements": [{"us": 1.5}], "none": []})
    assert json.loads(path.read_text())["measurements"] == [{"us": 1.5}]
    assert list(tables.read_table(path, "sm_80")) == entries
    assert [path.name for path in tmp_path.iterdir()] == ["sm_80.json"]


def test_a_table_measured_on_another_gpu_of_the_architecture_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tables.USER_FOLDER, str(tmp_path))
    tuning.forget()
    entry = Entry(config=Config("forward", 64, 32, 4, 3), dtype="half", head_dim=64, max_length=None, dropout=True)
    path = tables.user_path("sm_90", "NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "sm_90-nvidia-h100-80gb-hbm3.json"
    tables.save_table(path, "sm_90", [entry])
    try:
        assert tables.user_table("sm_90", "NVIDIA H200") is None
        found = tables.user_table("sm_90", "NVIDIA H100 80GB HBM3")
        assert found == (path, (entry,))
        tables.save_table(tmp_path / "sm_90.json", "sm_90", [])  # without a GPU's name: for every one
        tuning.forget()
        assert tables.user_table("sm_90", "NVIDIA H200") == (tmp_path / "sm_90.json", ())
        assert tables.user_table("sm_90", "NVIDIA H100 80GB HBM3") == found
    finally:
        monkeypatch.undo()
        tuning.forget()


def test_measured_tables_lie_in_the_cache_unless_the_environment_names_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(tables.USER_FOLDER, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tables.user_path("gfx942", "AMD Instinct MI300X") == (
        tmp_path / "fastchargpt" / "tuning" / "gfx942-amd-instinct-mi300x.json"
    )


def test_a_variant_takes_two_launches() -> None:
    assert len(plan_for("sm_80", "half", 64, 64, False).backward) == 1
    assert [c.kernel for c in plan_for("sm_80", "half", 64, 64, False, variant=True).backward] == ["dq", "dkdv"]


def test_an_entry_for_plain_attention_serves_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry(kernel: str, block_n: int, head_dim: int, calls: str, dropout: bool) -> Entry:
        config = Config(kernel, 32, block_n, 4, 1)
        return Entry(config=config, dtype="half", head_dim=head_dim, max_length=None, dropout=dropout, calls=calls)

    # A wider head has the settings that fit at 64, which must not cost 64 its own; and what is there for other calls
    # without dropout must not serve plain ones, although it has no idle dropout.
    ways = ((64, 64, "plain", True), (32, 64, "other", False), (32, 128, "plain", True))
    table = tuple(entry(kernel, *way) for kernel in ("forward", "dq", "dkdv") for way in ways)
    assert [Entry.from_json(x.to_json()) for x in table] == list(table)
    monkeypatch.setattr(tuning, "load_table", functools.lru_cache(lambda arch: table))
    tuning.forget()
    try:
        assert plan_for("x", "half", 64, 99, False).forward.block_n == 64
        assert plan_for("x", "half", 64, 99, False, plain=False).forward.block_n == 32
        with pytest.raises(ConfigError, match="no 'forward' entry"):  # what fits at 128 did not at 64
            plan_for("x", "half", 64, 99, True, plain=False)
        assert plan_for("x", "half", 128, 99, False).forward.block_n == 32
        with pytest.raises(ConfigError, match="no 'forward' entry for half, head_dim 128"):
            plan_for("x", "half", 128, 99, False, plain=False)
        assert widest_head("cpu", 0, torch.bfloat16, False) == 128
        assert widest_head("cpu", 0, torch.bfloat16, False, False) == 64
        qkv = torch.zeros(1, 2, 8, 128, dtype=torch.bfloat16)
        grouped = (qkv, qkv[:, :1], qkv[:, :1])
        with strict_interpreter():
            assert explain_attention(qkv, qkv, qkv, backend="triton").startswith("triton")
            with pytest.raises(BackendUnavailableError, match="without spills for a head_dim of 128"):
                explain_attention(*grouped, backend="triton")
            with pytest.raises(BackendUnavailableError, match="without spills for a head_dim of 128"):
                explain_attention(qkv, qkv, qkv, causal=False, backend="triton")
            narrow = qkv[..., :100]
            with pytest.raises(BackendUnavailableError, match="without spills for a head_dim of 100"):
                explain_attention(narrow, narrow, narrow, backend="triton")
    finally:
        tuning.forget()


@pytest.mark.parametrize("arch", known_archs())
def test_grouped_and_narrow_heads_are_served_wherever_plain_ones_are(arch: str) -> None:
    """But in fp32 beside dropout, where some targets have no registers: SDPA, with the reason."""
    for dtype, head_dims in (("half", (8, 64, 128, 256)), ("fp32", (8, 64, 128))):
        for head_dim in head_dims:
            for length in (64, 300, 5000):
                for dropout in (False, True) if dtype == "half" else (False,):
                    assert plan_for(arch, dtype, head_dim, length, dropout, plain=False).backward


def test_what_no_table_serves_is_said() -> None:
    assert widest_head("cpu", 0, torch.bfloat16, False) >= 128
    with pytest.raises(ConfigError, match="table of sm_80 has no 'forward' entry for half, head_dim 512"):
        plan_for("sm_80", "half", 512, 64, False)


def test_a_broken_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "sm_80.json").write_text('{"arch": "sm_80", "entries": [{"kernel": "forward"}]}')
    with pytest.raises(ConfigError, match=r"sm_80\.json cannot be read: KeyError"):
        tables.read_table(tmp_path / "sm_80.json", "sm_80")
    capped = Entry(config=Config("dq", 64, 32, 4, 2, 96), dtype="half", head_dim=64, max_length=None, dropout=True)
    tables.save_table(tmp_path / "gfx942.json", "gfx942", [capped])
    with pytest.raises(ConfigError, match=r"gfx942\.json.*max_registers is for NVIDIA"):
        tables.read_table(tmp_path / "gfx942.json", "gfx942")


def test_an_entry_for_other_calls_serves_variants_of_plain_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def pair(kernel: str) -> tuple[Entry, ...]:
        keys: dict[str, Any] = {"dtype": "half", "head_dim": 64, "max_length": None, "dropout": False}
        fast = Entry(config=Config(kernel, 64, 64, 4, 2), variants="none", calls="plain", **keys)
        return fast, Entry(config=Config(kernel, 32, 32, 4, 1), calls="other", **keys)

    monkeypatch.setattr(tuning, "load_table", lambda arch: pair("forward") + pair("dq") + pair("dkdv"))
    tuning._choose.cache_clear()
    try:
        for variant, plain, block in ((False, True, 64), (False, False, 32), (True, True, 32), (True, False, 32)):
            plan = plan_for("sm_80", "half", 64, 1000, False, variant, plain)
            assert {config.block_m for config in (plan.forward, *plan.backward)} == {block}
    finally:
        tuning._choose.cache_clear()
