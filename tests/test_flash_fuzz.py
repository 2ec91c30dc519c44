"""Random cases of every kernel against float64, under the strict interpreter.

200 cases by default; FASTCHARGPT_FUZZ_CASES=5000 for more, FASTCHARGPT_FUZZ_FIRST=1234 to begin elsewhere. A failing
case prints its `Case(...)`, which `flash_cases.judge` runs again, alone.
"""

import os

import pytest
from flash_cases import judge, random_case

CASES = int(os.environ.get("FASTCHARGPT_FUZZ_CASES", "200"))
FIRST = int(os.environ.get("FASTCHARGPT_FUZZ_FIRST", "0"))
CHUNK = 10  # cases a test: fewer names to print, and work that xdist can share out


@pytest.mark.parametrize("first", range(FIRST, FIRST + CASES, CHUNK))
def test_fuzz(first: int) -> None:
    for seed in range(first, min(first + CHUNK, FIRST + CASES)):
        case = random_case(seed)
        try:
            judge(case)
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} in {case}") from error
