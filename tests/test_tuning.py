"""Launch tables: read, complete, and refused in words."""

import json
from pathlib import Path

import pytest
import torch

from fastchargpt.errors import ConfigError
from fastchargpt.kernels import tuning
from fastchargpt.kernels.tuning import Config, Entry, known_archs, load_table, plan_for, save_table, widest_head

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
def test_entries_are_well_formed_and_none_is_said_twice(arch: str) -> None:
    entries = load_table(arch)
    keys = [(e.config.kernel, e.dtype, e.head_dim, e.max_length, e.dropout) for e in entries]
    assert len(set(keys)) == len(keys)
    for entry in entries:
        assert entry.config.kernel in tuning.KERNELS
        assert entry.dtype in ("half", "fp32")
        for size in (entry.config.block_m, entry.config.block_n, entry.config.num_warps):
            assert size & (size - 1) == 0
        assert min(entry.config.block_m, entry.config.block_n) >= 16  # the least that a tensor core takes


def test_a_table_survives_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        Entry(config=Config("forward", 64, 32, 4, 2), dtype="half", head_dim=64, max_length=None, dropout=True),
        Entry(config=Config("tile", 64, 64, 4, 1), dtype="half", head_dim=64, max_length=64, dropout=False),
    ]
    save_table(tmp_path / "sm_80.json", "sm_80", entries)
    assert json.loads((tmp_path / "sm_80.json").read_text())["arch"] == "sm_80"
    monkeypatch.setenv(tuning.USER_FOLDER, str(tmp_path))
    load_table.cache_clear()
    try:
        assert list(load_table("sm_80")) == entries
    finally:
        load_table.cache_clear()


def test_what_no_table_serves_is_said() -> None:
    assert widest_head("cpu", 0, torch.bfloat16, False) >= 128
    with pytest.raises(ConfigError, match="table of sm_80 has no 'forward' entry for half, head_dim 512"):
        plan_for("sm_80", "half", 512, 64, False)


def test_a_broken_table_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sm_80.json").write_text('{"entries": [{"kernel": "forward"}]}')
    monkeypatch.setenv(tuning.USER_FOLDER, str(tmp_path))
    load_table.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"sm_80\.json cannot be read: KeyError"):
            load_table("sm_80")
    finally:
        load_table.cache_clear()
