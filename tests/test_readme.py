"""Every Python example of README.md runs as it stands, from another folder."""

import re
from pathlib import Path

import pytest
from peers import ROOT, peer

EXAMPLES = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 9


@pytest.mark.parametrize("program", EXAMPLES, ids=lambda program: program.split("\n", 1)[0])
def test_example(program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for package in re.findall(r"^(?:from|import) (transformers)\b", program, re.MULTILINE):
        peer(package)
    exec(compile(program, "README.md", "exec"), {"__name__": "__main__"})
