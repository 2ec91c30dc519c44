"""The command line: `fastchargpt COMMAND ...`."""

from fastchargpt.cli.main import main

__all__ = ["main"]
