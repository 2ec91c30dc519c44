"""Every entry of every shipped launch table compiles for its target to code that may ship (gate.py has the rules).

What is compiled here on every run is what most people train with, once for each of the compiler's ways to a tensor
core: 16-bit, head_dim 64, every kernel, on sm_80, sm_90, sm_100 and gfx942 (sm_86, sm_89 and sm_120 take sm_80's). For
all other entries the verdict recorded in bench/results/gate.csv counts, as long as source, settings and Triton version
are the same; whatever has no record is compiled too. FASTCHARGPT_GATE=full compiles everything.
"""

import dataclasses
import functools
import itertools
import json
import os
from unittest import mock

import make_tables
import pytest
import torch
from aot import TARGETS
from gate import judge, launches_of
from gate_report import RECORD, everything, key_of, read_record, variant_of
from launches import RAGGED, cases
from make_tables import SHIPPED, choose, winners

from fastchargpt.bench.tune import Measured
from fastchargpt.kernels import tuning
from fastchargpt.kernels.tuning import Config, Entry, known_archs, load_table

FRESH_TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
FULL = os.environ.get("FASTCHARGPT_GATE") == "full"
ENTRIES = list(everything(thorough=False))


def name_of(item):
    target, entry, case = item
    config = entry.config
    kind = (
        str(case.dtype).removeprefix("torch.") + ("-tf32" if case.tf32 else "") + ("-dropout" if case.dropout else "")
    )
    kind += "".join(f"-{word}" for word in variant_of(case).split())
    length = entry.max_length or "any"
    return f"{target}-{config.kernel}-{config.block_m}x{config.block_n}-d{entry.head_dim}-t{length}-{kind}"


@functools.cache
def record():
    return read_record()


def is_fresh(target, entry, case):
    """Whether this is compiled on every run: of the dropout variants the one that needs more registers."""
    hardest = case.dropout == any(other.dropout for other in cases(entry))
    usual = entry.dtype == "half" and entry.head_dim == 64 and target in FRESH_TARGETS and not variant_of(case)
    return FULL or (usual and hardest)


@pytest.mark.parametrize("item", ENTRIES, ids=name_of)
def test_entry(item):
    target, entry, case = item
    verdict = None if is_fresh(target, entry, case) else record().get(key_of(entry.config, case, target))
    if verdict is None:
        judgements = judge(entry.config, case, target)
        assert judgements
        verdict = "; ".join(problem for judgement in judgements for problem in judgement.problems) or "ok"
    assert verdict == "ok"


def test_the_record_is_current():
    """Nothing shipped without a record, and no record of what is not shipped."""
    shipped = {key_of(entry.config, case, target): name_of((target, entry, case)) for target, entry, case in ENTRIES}
    missing = [name for key, name in shipped.items() if key not in record()]
    stale = record().keys() - shipped.keys()
    assert not missing, (
        f"{len(missing)} not in {RECORD.name}, such as {missing[0]}: run python bench/static/gate_report.py"
    )
    assert not stale, f"{len(stale)} in {RECORD.name} are not shipped any more: run python bench/static/gate_report.py"


def test_shipped_targets():
    """Every table is for a target that the gate compiles for; sm_75 has none (test_aot.py: no tensor cores there)."""
    assert set(known_archs()) <= set(SHIPPED) == TARGETS.keys() - {"sm_75"}


def test_every_entry_is_launched_as_it_says():
    """A launch carries its entry's blocks, warps and stages, and the strides of the model's packed projection."""
    target, entry, case = next(item for item in ENTRIES if item[1].config.kernel == "forward")
    (launch,) = launches_of(entry.config, case, target)
    assert launch.constants["BLOCK_M"] == entry.config.block_m
    assert launch.constants["BLOCK_N"] == entry.config.block_n
    assert launch.options["num_warps"] == entry.config.num_warps
    assert launch.options["num_stages"] == entry.config.num_stages
    assert launch.constants["HEAD_DIM"] == case.head_dim
    assert launch.signature["q_ptr"] == {torch.bfloat16: "*bf16", torch.float32: "*fp32"}[case.dtype]
    assert launch.constexprs[launch.kernel.arg_names.index("q_strides"), 3] == 1


def test_cases_cover_what_an_entry_serves():
    def entry(dtype, dropout=True, kernel="forward"):
        config = Config(kernel, 64, 64, 4, 2)
        return Entry(config=config, dtype=dtype, head_dim=64, max_length=None, dropout=dropout)

    def plain(*arguments, **options):
        return [case for case in cases(*arguments, **options) if not variant_of(case)]  # nor is it ragged

    def rare(*arguments, **options):
        return [variant_of(case) for case in cases(*arguments, **options) if not case.plain]

    half = entry("half")
    assert [(case.dtype, case.dropout) for case in plain(half)] == [(torch.bfloat16, False), (torch.bfloat16, True)]
    assert [case.dropout for case in plain(half, (half, entry("half", dropout=False)))] == [True]
    assert [case.dropout for case in plain(entry("half", kernel="decode"))] == [False]
    for kernel in RAGGED:
        lengths = {(case.length % 64 == 0, case.dropout) for case in cases(entry("half", kernel=kernel)) if case.plain}
        assert lengths == set(itertools.product((False, True), repeat=2))
    assert [(case.tf32, case.dropout) for case in plain(entry("fp32", dropout=False))] == [
        (False, False),
        (True, False),
    ]
    for thorough, variants in ((False, ["", "window softcap"]), (True, ["", "softcap", "window", "window softcap"])):
        found = {(case.dropout, variant_of(case)) for case in cases(half, thorough=thorough) if case.plain}
        lengths = ("", " ragged")
        assert found == {(drop, (v + ragged).strip()) for drop in (False, True) for v in variants for ragged in lengths}
    for unvaried in (dataclasses.replace(half, variants="none"), entry("half", kernel="tile")):
        ragged = [dataclasses.replace(case, length=case.length - 1) for case in plain(unvaried)]
        wanted = plain(unvaried) + (ragged if unvaried.config.kernel in RAGGED else [])
        assert [case for case in cases(unvaried) if case.plain] == wanted
    some = dataclasses.replace(half, variants="no dropout")
    assert [case.dropout for case in cases(some) if case.plain and case.window] == [False, False]  # even and ragged
    only = dataclasses.replace(half, calls="plain")
    assert rare(half) == ["unmasked", "grouped", "narrow"] * 2
    assert rare(only) == []
    without = entry("half", dropout=False)
    assert rare(half, (half, without)) == ["unmasked", "grouped", "narrow"]  # the other one serves them without dropout
    assert rare(half, (half, dataclasses.replace(without, calls="plain"))) == rare(half)  # unless it does not
    thorough = cases(half, thorough=True)
    assert {case.dtype for case in thorough} == {torch.bfloat16, torch.float16}
    assert any(not case.causal for case in thorough)
    assert any(case.kv_heads < case.heads for case in thorough)
    assert {case.head_dim for case in thorough} == {64, 52, 32, 16}


def test_a_table_can_be_filled_without_a_gpu():
    (entry,) = choose("sm_90", "tile", "half", 64, 32)
    assert entry.dropout
    assert entry.config.block_m == entry.config.block_n == 32


def test_what_a_tuner_measured_becomes_a_table(monkeypatch):
    tuned = json.loads((RECORD.parent / "h200-tuning.json").read_text(encoding="utf-8"))
    measured = [Measured.from_json(row) for row in tuned["measurements"]]
    before = [entry for entry in load_table("sm_90") if entry.calls != "other"]
    refused = Config("tile", 128, 128, 8, 1)  # though it won at head_dim 128
    monkeypatch.setattr(make_tables, "_passes", lambda config, _wanted, _target: config != refused)
    table = winners(tuned, before)
    assert [entry for entry in table if entry.dtype == "fp32"] == [entry for entry in before if entry.dtype == "fp32"]
    tuning.forget()
    with mock.patch.object(tuning, "load_table", return_value=tuple(table)):
        for found in measured:
            place = found.place
            plan = tuning.plan_for("sm_90", place.dtype, place.head_dim, place.length, place.dropout)
            chosen = {"forward": (plan.forward,), "backward": plan.backward, "decode": (plan.decode,)}[found.what]
            assert chosen == found.configs or refused in found.configs, place
            assert refused not in chosen
    tuning.forget()
    assert len(table) < sum(len(found.configs) for found in measured)  # what serves several places stands there once
