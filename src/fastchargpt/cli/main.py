"""Which command was meant, and how its errors reach the user: one line, exit status 2."""

import contextlib
import errno
import importlib
import io
import os
import sys
import time
from collections.abc import Sequence

from fastchargpt import __version__
from fastchargpt.errors import FastchargptError, nearest

__all__ = ["COMMANDS", "main"]

# torchrun ends the other processes within a second of the first one's failure; one that is still there after this long
# has an error of its own
LAUNCHER_SECONDS = 10.0

# command -> (module with `run(argv) -> exit status`, one line of help)
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("fastchargpt.cli.train", "train a GPT on a text"),
    "sample": ("fastchargpt.cli.sample", "write text with a trained model"),
    "eval": ("fastchargpt.cli.evaluate", "measure a trained model's loss on a whole split"),
    "convert": ("fastchargpt.cli.convert", "bring a model in from another format, or take one out"),
    "bench": ("fastchargpt.cli.bench", "measure this machine against peers, draw the report"),
    "doctor": ("fastchargpt.doctor", "say what this machine can do, and what is missing"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: its words, those of the process by default.

    Returns:
        The exit status: 0; 2 for a user's mistake, told in one line; 130 or 143 for a run that a signal ended.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not _rank():
        return _main(words)
    with contextlib.redirect_stdout(_Nowhere()):  # of the processes that share a run the first one speaks
        return _main(words)


def _main(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"fastchargpt {__version__}")
        return 0
    command, rest = words[0], words[1:]
    try:
        if command not in COMMANDS:
            known = ", ".join(COMMANDS)
            return _fail(f"there is no command {command!r}{nearest(command, COMMANDS)}; there are {known}")
        status: int = importlib.import_module(COMMANDS[command][0]).run(rest)
        sys.stdout.flush()
        return status
    except FastchargptError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # the reader (head, less) has what it wanted; nothing may be written any more, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        # a disk that is full or a file that may not be written; what is not about a file is a fault of ours
        if error.filename is None and error.errno != errno.ENOSPC:
            raise
        return _fail(f"{error.filename or 'a file'} cannot be read or written: {error.strerror}")


def _fail(sentence: str) -> int:
    """Tell the user; of several processes that all fail alike, the first one does, and its launcher ends the others."""
    rank = _rank()
    if rank and "TORCHELASTIC_RUN_ID" in os.environ:
        time.sleep(LAUNCHER_SECONDS)
    print(f"fastchargpt: {f'process {rank}: ' if rank else ''}{sentence}", file=sys.stderr)
    return 2


def _rank() -> int:
    """This process's number among those that a launcher started to share a run; 0 where it is alone."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() and os.environ.get("WORLD_SIZE", "1") != "1" else 0


class _Nowhere(io.TextIOBase):
    """A stream that keeps nothing."""

    def write(self, text: str) -> int:
        """Take the text."""
        return len(text)


def _usage() -> str:
    lines = ["usage: fastchargpt COMMAND [OPTIONS]", ""]
    lines += [f"  {name:<10}{about}" for name, (_, about) in COMMANDS.items()]
    lines += ["", "fastchargpt COMMAND --help shows a command's options; fastchargpt --version the version."]
    return "\n".join(lines)
