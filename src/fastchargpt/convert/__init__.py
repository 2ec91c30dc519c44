"""Models between fastchargpt's checkpoints and other people's files: `convert`, and the formats it knows."""

from fastchargpt.convert.core import FORMATS, Conversion, convert

__all__ = ["FORMATS", "Conversion", "convert"]
