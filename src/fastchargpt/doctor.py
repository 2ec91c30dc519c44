"""`fastchargpt doctor`: what this machine can do, what is missing and what to do about it, to paste into an issue.

Nothing here imports torch until it is known to be installed: the doctor must answer where nothing else does.
"""

import getpass
import importlib.metadata
import json
import os
import platform
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastchargpt import __version__
from fastchargpt.cli.arguments import PlainParser
from fastchargpt.errors import FastchargptError
from fastchargpt.finding import Finding

__all__ = ["redact", "run"]

# What the default path (train, sample) imports, and the lowest version that serves.
NEEDED = {
    "torch": (2, 9),
    "numpy": (1, 26),
    "safetensors": (0, 5),
    "tokenizers": (0, 20),
    "pooch": (1, 8),
    "tqdm": (4, 66),
    "tyro": (0, 9),
}
OPTIONAL = {"triton": "the GPU kernels", "matplotlib": "loss.png", "pytest-benchmark": "fastchargpt bench"}
LEGENDS = {"attention": ": (B, H, T, D), forward and backward; error against float64, 1 is the most allowed"}
MARKS = {"ok": "ok", "note": "note", "broken": "BROKEN"}


def run(argv: Sequence[str]) -> int:
    """Examine and report; 1 where something that the default path needs is broken, else 0.

    Raises:
        ConfigError: the words are not understood.
        BackendUnavailableError: the device asked for is not there.
    """
    options = PlainParser(prog="fastchargpt doctor", description="Say what this machine can do, and what is missing.")
    options.add_argument("--json", action="store_true", help="the same as JSON")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    words = options.parse_args(argv)
    findings: list[Finding] = []
    section = ""
    if not words.json:
        print(f"fastchargpt {__version__} doctor")
    for finding in _findings(words.device):
        clean: Finding = redact(finding)
        findings.append(clean)
        if not words.json:
            if clean.section != section:
                print(f"\n{clean.section}{LEGENDS.get(clean.section, '')}")
            section = clean.section
            print(_lines(clean), flush=True)
    broken = [finding for finding in findings if finding.status == "broken"]
    if words.json:
        report = {"fastchargpt": __version__, "broken": len(broken), "findings": [vars(f) for f in findings]}
        print(json.dumps(report, indent=2))
    else:
        verdict = (
            f"training needs what is BROKEN above ({len(broken)})" if broken else "everything that training needs works"
        )
        print(f"\n{verdict}")
    return 1 if broken else 0


def _findings(device: str) -> Iterator[Finding]:
    versions = list(_versions())
    yield from versions
    if any(finding.status == "broken" for finding in versions):
        return
    try:
        from fastchargpt.diagnosis import examinations
    except Exception as error:  # a torch that is installed and does not load, for whatever reason
        yield _failed("versions", error)
        return
    for section, look in examinations(device):
        try:
            yield from look()
        except Exception as error:  # a look that fails is itself a finding
            yield _failed(section, error)


def _failed(section: str, error: Exception) -> Finding:
    known = isinstance(error, FastchargptError)
    return Finding(
        section=section,
        status="broken",
        text=" ".join((str(error) if known else f"{type(error).__name__}: {error}").split())[:400],
        remedy="" if known else "please report this with the whole of `fastchargpt doctor --json`",
    )


def _versions() -> Iterator[Finding]:
    python = platform.python_version()
    yield Finding(
        section="versions",
        status="ok" if sys.version_info >= (3, 11) else "broken",
        text=f"python {python} on {platform.system()} {platform.machine()}",
        remedy="" if sys.version_info >= (3, 11) else "fastchargpt needs Python 3.11 or later",
        facts={"python": python, "system": platform.system(), "machine": platform.machine()},
    )
    found = {name: _installed(name) for name in (*NEEDED, *OPTIONAL)}
    for name, lowest in NEEDED.items():
        version, wanted = found[name], ".".join(map(str, lowest))
        if version is None or _numbers(version) < lowest:
            yield Finding(
                section="versions",
                status="broken",
                text=f"{name} is not installed" if version is None else f"{name} {version} is older than {wanted}",
                remedy=f"pip install '{name}>={wanted}'",
                facts={name: version},
            )
    here = {name: version for name, version in found.items() if version is not None}
    yield Finding(
        section="versions",
        status="ok",
        text=", ".join(f"{name} {version}" for name, version in here.items()),
        facts=here,
    )
    for name, purpose in OPTIONAL.items():
        if found[name] is None:
            remedy = f"pip install {name}" if name != "triton" or sys.platform == "linux" else ""
            yield Finding(
                section="versions",
                status="note",
                text=f"{name} is not installed: {purpose} is left out",
                remedy=remedy,
                facts={name: None},
            )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:2])


def _lines(finding: Finding) -> str:
    head = f"  {MARKS[finding.status]:<7}"
    lines = textwrap.wrap(finding.text, 110, initial_indent=head, subsequent_indent=" " * 11, break_on_hyphens=False)
    if finding.remedy:
        lines += textwrap.wrap(
            f"-> {finding.remedy}", 110, initial_indent=" " * 9, subsequent_indent=" " * 12, break_on_hyphens=False
        )
    return "\n".join(lines)


def redact(value: Any) -> Any:
    """The same value (text, containers, a finding) without home directories and user names."""
    if isinstance(value, str):
        home = str(Path.home())
        if len(home) > 1:
            value = value.replace(home, "~")
        value = re.sub(r"(?<=[/\\])(home|Users)([/\\])[^/\\\s'\"]+", r"\1\2<user>", value)
        user = _user()
        return re.sub(rf"(?<=[/\\]){re.escape(user)}(?=[/\\]|\b)", "<user>", value) if user else value
    if isinstance(value, dict):
        return {redact(key): redact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item) for item in value]
    if isinstance(value, Finding):
        return Finding(**redact(vars(value)))
    return value


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return os.environ.get("USERNAME", "")
