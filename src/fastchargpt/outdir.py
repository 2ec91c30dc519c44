"""A run's out dir: claimed by one run at a time, never overwritten unasked."""

import contextlib
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fastchargpt.errors import OutDirError

__all__ = ["claim_out_dir"]

RUN_FILES = ("metrics.jsonl", "loss.png", "sample.txt", "metrics.jsonl.new")
RUN_FOLDERS = ("last", "best", "last.new", "last.old", "last.damaged", "best.new", "best.old", "tensorboard")
LOCK = ".lock"


@contextlib.contextmanager
def claim_out_dir(out_dir: Path, mode: Literal["new", "resume", "overwrite"]) -> Iterator[Path]:
    """Hold an out dir for the length of a run.

    Args:
        out_dir: the folder, made if it is not there.
        mode: `new` refuses a folder with a run in it; `overwrite` removes that run; `resume` needs one.

    Raises:
        OutDirError: the folder holds a run, or none, against the mode; another run holds it; it cannot be written; or
            it is to be overwritten and holds files that are not a run's.
    """
    try:
        taken = out_dir.is_dir() and any(path.name != LOCK for path in out_dir.iterdir())
    except OSError as error:
        raise OutDirError(f"out dir {out_dir} cannot be read ({error.strerror}): name another with --out-dir") from None
    if out_dir.exists() and not out_dir.is_dir():
        raise OutDirError(f"out dir {out_dir} is a file: name a folder with --out-dir")
    if mode == "new" and taken:
        raise OutDirError(
            f"out dir {out_dir} is not empty: go on with --resume, replace it with --overwrite, or name another"
        )
    if mode == "resume" and not taken:
        raise OutDirError(f"out dir {out_dir} holds no run to resume: leave --resume out to start one")
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        lock = (out_dir / LOCK).open("w")
    except OSError as error:
        raise OutDirError(
            f"out dir {out_dir} cannot be written ({error.strerror}): name another with --out-dir"
        ) from None
    with lock:
        if not _lock(lock.fileno()):
            raise OutDirError(
                f"out dir {out_dir} is in use by another run: wait for it, or name another with --out-dir"
            )
        if mode == "overwrite" and taken:
            _remove_run(out_dir)
        yield out_dir


def _remove_run(out_dir: Path) -> None:
    foreign = sorted(path.name for path in out_dir.iterdir() if path.name not in (*RUN_FILES, *RUN_FOLDERS, LOCK))
    if foreign:
        raise OutDirError(
            f"out dir {out_dir} holds {foreign[0]!r}, which no run wrote, so --overwrite leaves it alone: "
            "name another folder"
        )
    for name in RUN_FOLDERS:
        shutil.rmtree(out_dir / name, ignore_errors=True)
    for name in RUN_FILES:
        (out_dir / name).unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Whether the lock could be had; the system gives it back when the process ends, however it ends."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
