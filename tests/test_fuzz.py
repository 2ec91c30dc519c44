"""No input makes a reader crash, hang or take much memory: a thousand made up here, 100,000 by `make soak`.

Inputs that once did, found by longer runs, are in KEPT and in the tests of each reader.
"""

import json
import os
import random
import sys
from pathlib import Path

import fuzz
import pytest

COUNT = int(os.environ.get("FASTCHARGPT_FUZZ", "1000"))
SEED = int(os.environ.get("FASTCHARGPT_SOAK_SEED", "0"))

READERS = {
    *("checkpoint_bytes", "config_dict", "config_signed", "gguf", "hf_folder", "lecture", "meta_pickle", "metrics"),
    *("nanogpt_checkpoint", "nanogpt_folder", "plain_safetensors", "safetensors", "text", "tokenizer", "trainer_state"),
}

# reader, seed and number of inputs that went wrong when they were first read: errors of torch's unpickler
# (IndexError, struct.error, OSError, KeyError), a missing part of a config, sentences of 10,000 characters, an integer
# beyond every float, an infinite count in a trainer's state
KEPT = [
    *(("trainer_state", 0, number) for number in (149, 349, 409)),
    *(("config_dict", 0, number) for number in (211, 221, 351)),
    *(("config_signed", 0, number) for number in (172, 692, 992)),
    ("trainer_state", 1, 2099),
]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit on address space")
def test_no_input_crashes_hangs_or_takes_much_memory(tmp_path: Path) -> None:
    found = fuzz.campaign(SEED, COUNT, tmp_path)
    assert found["findings"] == []
    figures = {name: round(found[name], 3) for name in ("slowest_s", "grown_mib")}
    print(f"soak: {sum(found['outcomes'].values())} inputs, {json.dumps(found['outcomes'])}, {json.dumps(figures)}")
    assert sum(found["outcomes"].values()) == COUNT
    # the inputs are worth something: every reader reads some and refuses some
    readers = {name.split(":")[0] for name in found["outcomes"]}
    assert len(readers) == len(READERS)
    for reader in readers - {"metrics"}:  # which leaves out what it cannot read
        assert found["outcomes"][f"{reader}: refused"] > 0
        assert found["outcomes"].get(f"{reader}: read", 0) > 0


def test_kept_inputs(tmp_path: Path) -> None:
    readers = fuzz.Readers(tmp_path)
    for name, seed, number in KEPT:
        assert fuzz.run_one(readers, seed, number, name)[1] in ("read", "refused"), (name, seed, number)


def test_the_fuzzer_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readers = fuzz.Readers(tmp_path)
    assert set(readers.cases) == READERS

    def careless(choose: random.Random) -> None:
        json.loads(choose.choice(fuzz.ODD_TEXTS))

    readers.cases = {"careless": careless}
    assert any("Error" in fuzz.run_one(readers, 0, number)[1] for number in range(20))
