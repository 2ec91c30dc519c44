"""The fair timer: turns, quantiles, and on a GPU its own clock."""

import gc
import time

import pytest
import torch

from fastchargpt.roofline import Roof, measure_bandwidth
from fastchargpt.timing import Timing, quantile, race

CPU = torch.device("cpu")


def test_turns_rotate() -> None:
    calls: list[str] = []
    times = race(
        {name: lambda name=name: calls.append(name) for name in "abc"}, CPU, seconds=0.0, warmup=1, min_rounds=3
    )  # type: ignore[misc]
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert {name: len(timing.seconds) for name, timing in times.items()} == dict.fromkeys("abc", 3)


def test_it_measures_and_stops() -> None:
    start = time.perf_counter()
    times = race({"slow": lambda: time.sleep(0.004), "fast": lambda: time.sleep(0.001)}, CPU, seconds=0.2)
    assert time.perf_counter() - start < 5
    assert 0.004 <= times["slow"].p20 <= times["slow"].median <= times["slow"].p80
    assert times["fast"].median < times["slow"].median
    assert len(race({"x": lambda: None}, CPU, seconds=9.0, max_rounds=4)["x"].seconds) == 4
    assert race({}, CPU, seconds=1.0) == {}


def test_collections_wait() -> None:
    seen: list[bool] = []
    race({"x": lambda: seen.append(gc.isenabled())}, CPU, seconds=0.0, warmup=0, min_rounds=2)
    assert seen == [False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        race({"x": lambda: 1 / 0}, CPU, seconds=0.0, warmup=0)
    assert gc.isenabled()


def test_quantiles() -> None:
    assert [quantile([4.0, 1.0, 2.0, 3.0, 5.0], share) for share in (0.0, 0.25, 0.5, 1.0)] == [1.0, 2.0, 3.0, 5.0]
    assert quantile([1.0, 2.0], 0.8) == pytest.approx(1.8)
    assert quantile([], 0.5) != quantile([], 0.5)  # nan
    timing = Timing(seconds=(3.0, 1.0, 2.0))
    assert (timing.p20, timing.median, timing.p80) == pytest.approx((1.4, 2.0, 2.6))


def test_roof() -> None:
    roof = Roof(flops=100.0, bandwidth=10.0)
    assert roof.least_seconds(50.0, 1.0) == 0.5  # bound by products
    assert roof.least_seconds(50.0, 20.0) == 2.0  # bound by memory


@pytest.mark.slow
def test_bandwidth_is_plausible() -> None:
    assert 1e8 < measure_bandwidth(CPU) < 1e13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_events_agree_with_the_wall_clock() -> None:
    device = torch.device("cuda")
    a = torch.randn(8192, 8192, device=device)
    timing = race({"mm": lambda: a @ a}, device, seconds=1.0)["mm"]
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        a @ a
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / 20
    assert 0.5 < timing.median / wall < 2
