"""Generation: tokens a second from a prompt, with the cache, without it, and nanoGPT's."""

from typing import Any

import pytest

from fastchargpt.bench.generation import CONTESTANTS, entrants, errands
from fastchargpt.bench.settings import Settings, settings_from


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    chosen = settings_from(
        device=config.getoption("--device"),
        quick=config.getoption("--quick"),
        peers=[],
        model=config.getoption("--model"),
    )
    metafunc.parametrize("errand", errands(chosen), ids=lambda e: f"{e.name}-b{e.batch}")
    metafunc.parametrize("contestant", CONTESTANTS)


def test_generation(rank: Any, settings: Settings, contestant: str, errand: Any) -> None:
    rank(
        f"generation {errand.name} B{errand.batch}",
        contestant,
        lambda: entrants(errand, settings),
        rounds=errand.rounds,
        subject="generation",
        batch=errand.batch,
    )
