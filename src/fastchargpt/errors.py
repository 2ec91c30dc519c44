"""Every error a user can cause, one class per kind of mistake.

Each message is one sentence that names the thing, the rule it broke and the way out. The command line prints the
sentence and exits with status 2; a library user can catch `FastchargptError`, or the built-in class each one also is.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "AttentionError",
    "BackendUnavailableError",
    "CheckpointError",
    "ConfigError",
    "CorpusError",
    "FastchargptError",
    "OutDirError",
    "SamplingError",
    "TokenizerError",
    "TrainingError",
    "nearest",
]


class FastchargptError(Exception):
    """Base of every error of this package."""


class ConfigError(FastchargptError, ValueError):
    """A configuration value breaks a rule."""


class TokenizerError(FastchargptError, ValueError):
    """Text or tokens that a tokenizer cannot serve, or a tokenizer file that is not one."""


class CorpusError(FastchargptError, ValueError):
    """A corpus that cannot be had, read or used."""


class AttentionError(FastchargptError, ValueError):
    """Arguments that no attention backend accepts: a wrong rank, shape, dtype, device or range."""


class BackendUnavailableError(FastchargptError, RuntimeError):
    """A backend asked for by name that cannot serve here."""


class CheckpointError(FastchargptError, ValueError):
    """A checkpoint that is missing, damaged, foreign or from another version."""


class OutDirError(FastchargptError, OSError):
    """An output directory that cannot be written, or must not be overwritten."""


class TrainingError(FastchargptError, RuntimeError):
    """Training that cannot go on: a non-finite loss, no memory left."""


class SamplingError(FastchargptError, ValueError):
    """A sampling knob out of range, or knobs that contradict each other."""


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name closest to `name`, or an empty string when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
