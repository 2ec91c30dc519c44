"""A text larger than memory would like: read, split and encoded in a bounded share of it.

`make soak` raises FASTCHARGPT_SOAK_TEXT_MB (150 here) to 1,000.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEGABYTES = int(os.environ.get("FASTCHARGPT_SOAK_TEXT_MB", "150"))
LIMIT_MIB = 160  # beyond what the process had: chunks of 16 MiB in a few forms at once, never the text
LINES = {
    "ascii": "To be, or not to be, that is the question\n",
    "unicode": "Съешь ещё этих мягких булок, 中文字符 🙂\n",
}
PROGRAM = """
import json, sys, threading
from pathlib import Path
from fastchargpt import corpus
from fastchargpt.batches import TokenBatches

def own():  # what is not a page of a file, in MiB
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1024

corpus.STREAM_BYTES = 1
corpus.load_corpus(sys.argv[2], tokenizer=sys.argv[1])  # imports and tables are made
before, peak, over = own(), 0.0, threading.Event()

def watch():
    global peak
    while not over.wait(0.003):
        peak = max(peak, own())

watcher = threading.Thread(target=watch)
watcher.start()
loaded = corpus.load_corpus(sys.argv[3], tokenizer=sys.argv[1])
batches = TokenBatches(loaded.train, batch_size=8, block_size=64, seed=0)
for _ in range(50):
    batches.next_batch()
over.set()
watcher.join()
print(json.dumps({"grown_mib": peak - before, "tokens": len(loaded.train) + len(loaded.val)}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "script"), [("char", "unicode"), ("byte", "ascii")])
def test_a_large_text_takes_little_memory(kind: str, script: str, tmp_path: Path) -> None:
    line, large = LINES[script], tmp_path / "large.txt"
    count = MEGABYTES * 1_000_000 // len(line.encode()) + 1
    (tmp_path / "small.txt").write_text(line * 20, encoding="utf-8")
    with large.open("w", encoding="utf-8") as file:
        for start in range(0, count, 10_000):
            file.write(line * min(10_000, count - start))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM, kind, tmp_path / "small.txt", large]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["tokens"] == count * len(line if kind == "char" else line.encode())
    print(f"soak: {large.stat().st_size} bytes of {script} as {kind}: {said['grown_mib']:.0f} MiB of memory")
    assert 0 < said["grown_mib"] < LIMIT_MIB
