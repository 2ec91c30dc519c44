"""README.md's examples under "Use it from your code", run as they stand."""

import re
from pathlib import Path

import pytest
from peers import ROOT, peer

HEADING = "## Use it from your code\n"


def examples() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if HEADING not in text:
        return []
    section = re.split(r"^## ", text.split(HEADING, 1)[1], maxsplit=1, flags=re.M)[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.M | re.S)


def test_there_are_examples() -> None:
    if HEADING not in (ROOT / "README.md").read_text(encoding="utf-8"):
        pytest.skip("README.md has no section 'Use it from your code' yet")
    assert len(examples()) >= 7


@pytest.mark.parametrize("program", examples(), ids=lambda program: program.split("\n", 1)[0])
def test_example(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"^(?:from|import) (transformers)\b", program, re.M):
        peer(package)
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
