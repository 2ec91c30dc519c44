"""A save that is killed, or that the disk fails, at each of its calls into the C library in turn; a process of its own.

`LD_PRELOAD=save_faults.so python save_faults.py FOLDER` prints what became of every save as one JSON object.
"""

import ctypes
import dataclasses
import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

import test_checkpoint
import torch

from fastchargpt.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from fastchargpt.errors import OutDirError

# how the call fails (save_faults.c), and whether the save before is kept
CAMPAIGNS = {
    "killed": (1, False),
    "killed in the middle of a write": (2, True),
    "an error": (3, True),
    "full from here on": (4, False),
}
KILLED, REFUSED, OTHER = 77, 3, 4  # exit statuses of a child; the first is save_faults.c's


def checkpoint(seed: int) -> Checkpoint:
    """A small one whose trainer's state takes several writes."""
    return dataclasses.replace(test_checkpoint.checkpoint(seed), trainer_state={"moments": [torch.ones(5000)] * 3})


def child(folder: Path, number: int, mode: int, keep_previous: bool) -> int:
    """Save once more with the number-th call failing; the exit status of the process that did."""
    content = checkpoint(2)
    shim = ctypes.CDLL(None)
    if (pid := os.fork()) == 0:
        status = 0
        try:
            shim.arm(number, mode)
            save_checkpoint(folder, content, keep_previous=keep_previous)
        except OutDirError:
            status = REFUSED
        except BaseException as error:
            shim.disarm()
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            status = OTHER
        os._exit(100 if shim.disarm() < number else status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def campaign(home: Path, mode: int, keep_previous: bool) -> dict[str, int]:
    """Fail each call in turn until a save makes fewer; how often each thing was seen, `wrong` among them."""
    before = home / "before"
    save_checkpoint(before / "last", checkpoint(0))
    save_checkpoint(before / "last", checkpoint(1), keep_previous=keep_previous)
    seen: Counter[str] = Counter()
    for number in range(1, 1000):
        folder = home / str(number)
        shutil.copytree(before, folder)
        status = child(folder / "last", number, mode, keep_previous)
        if status == 100:
            seen["calls"] = number - 1
            shutil.rmtree(folder)
            break
        found = load_checkpoint(folder / "last", with_trainer=True).info["iteration"]
        seen[f"left {found}"] += 1
        seen[{KILLED: "killed", REFUSED: "refused", 0: "saved"}.get(status, "wrong")] += 1
        seen["wrong"] += found not in (1, 2) or (status == 0 and found != 2)
        save_checkpoint(folder / "last", checkpoint(3))
        seen["wrong"] += load_checkpoint(folder / "last", with_trainer=True).info["iteration"] != 3
        seen["wrong"] += sorted(path.name for path in folder.iterdir()) != ["last"]
        shutil.rmtree(folder)
    shutil.rmtree(before)
    return dict(seen)


if __name__ == "__main__":
    home = Path(sys.argv[1])
    print(json.dumps({name: campaign(home, mode, keep) for name, (mode, keep) in CAMPAIGNS.items()}))
