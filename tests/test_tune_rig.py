"""The tuner's candidates, and what runs and judges them, in the strict interpreter."""

from collections.abc import Mapping

import pytest
import torch
from strict_interpreter import strict_interpreter

from fastchargpt.bench import tune_space
from fastchargpt.bench.tune import BrokenDevice
from fastchargpt.bench.tune_launches import GpuRig
from fastchargpt.bench.tune_space import Place, candidates, places
from fastchargpt.kernels import tuning
from fastchargpt.kernels.tuning import Config, Plan
from fastchargpt.timing import Timing


def test_every_candidate_is_a_launch_and_none_is_named_twice() -> None:
    for kernels, dtype in ((tune_space.HALF, "half"), (tune_space.FP32, "fp32")):
        assert set(kernels) == set(tuning.KERNELS)
        for settings in kernels.values():
            assert len(set(settings)) == len(settings)
        for place in places([dtype], [64]):
            for kernel in kernels:
                for config in candidates(kernel, place):
                    if kernel != "tile" or place.max_length is not None:
                        entry = tuning.Entry(
                            config=config, dtype=dtype, head_dim=64, max_length=place.max_length, dropout=False
                        )
                        assert tuning.Entry.from_json(entry.to_json()) == entry


def test_registers_are_capped_on_nvidia_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place("half", 64, 128, False)
    for hip, capped in ((None, True), ("6.4", False)):
        monkeypatch.setattr(torch.version, "hip", hip)
        for kernel in ("forward", "dq", "dkdv"):
            assert any(config.max_registers for config in candidates(kernel, place)) == capped


def small(**changes: object) -> Place:
    return Place(**{"dtype": "half", "head_dim": 16, "max_length": 18, "dropout": False, **changes})  # type: ignore[arg-type]


def plan_of(*backward: Config) -> Plan:
    return Plan(Config("forward", 16, 16, 4, 1), backward, Config("decode", 16, 16, 4, 1))


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("dtype", ["half", "fp32"])
def test_the_rig_runs_and_judges(dtype: str, dropout: bool) -> None:
    asked: list[str] = []

    def racer(calls: Mapping[str, object], device: torch.device, **_: object) -> dict[str, Timing]:
        for name, call in calls.items():
            asked.append(name)
            call()  # type: ignore[operator]
        return {name: Timing(seconds=(3.0, 1.0, 2.0)) for name in calls}

    rig = GpuRig(torch.device("cpu"), tokens=20, width=16, racer=racer)
    place = small(dtype=dtype, dropout=dropout)
    pair = plan_of(Config("dq", 16, 16, 4, 1), Config("dkdv", 16, 16, 4, 1))
    with strict_interpreter():
        for plan in (pair, plan_of(Config("blocks", 16, 16, 4, 1)), plan_of(Config("tile", 32, 32, 4, 1))):
            assert rig.problem(place, plan, "backward") is None
        assert rig.problem(place, pair, "forward") is None
        if not dropout:
            assert rig.problem(place, pair, "decode") is None
        for what in ("forward", "backward", *(() if dropout else ("decode",))):
            assert rig.race(place, {"a": pair}, what) == {"a": 2.0}
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_rig_refuses_what_is_wrong_or_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastchargpt.kernels import flash_short

    rig = GpuRig(torch.device("cpu"), tokens=20)
    blocks = plan_of(Config("blocks", 16, 16, 4, 1))
    with strict_interpreter():
        tile_too_small = plan_of(Config("tile", 16, 16, 4, 1))
        assert "one tile does not hold the sequence" in str(rig.problem(small(), tile_too_small, "backward"))
        right = flash_short.backward

        def wrong(*arguments: object) -> None:
            right(*arguments)  # type: ignore[arg-type]
            arguments[8][..., -1, :] += 1.0  # type: ignore[index, operator]  # dk's last row

        monkeypatch.setattr(flash_short, "backward", wrong)
        assert "its errors against float64" in str(rig.problem(small(), blocks, "backward"))

        class OutOfResources(Exception):
            required, limit, name = 1, 2, "shared memory"

            def __init__(self) -> None:
                vars(self).update(required=300_000, limit=166_912, name="shared memory")

        def hungry(*_: object) -> None:
            raise OutOfResources

        monkeypatch.setattr(flash_short, "backward", hungry)
        assert rig.problem(small(), blocks, "backward") == (
            "needs 300000 of shared memory, and this GPU has 166912 for a program"
        )
        monkeypatch.setattr(torch, "ones", hungry_device)
        with pytest.raises(BrokenDevice, match="computes no more"):
            rig.problem(small(), blocks, "backward")


def hungry_device(*_: object, **__: object) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")
