"""One line of the doctor's report."""

from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Finding", "Status"]

# `note` is worth knowing and harms nothing that the default path needs; `broken` does
Status = Literal["ok", "note", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    # versions, device, compiler, triton, choices, training, attention, speed or corpus
    section: str
    status: Status
    # one line
    text: str
    # what to do about it; empty where nothing is to be done
    remedy: str = ""
    # the same in figures (JSON values)
    facts: dict[str, Any] = field(default_factory=dict)
