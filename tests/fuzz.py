"""Hostile inputs for every reader of files: made from a seed and a number, so that any of them can be made again.

`python fuzz.py SEED FIRST COUNT FOLDER` runs some under a limit of memory and time, in a process that may die of it;
`campaign` starts such processes, and goes on behind the input that one of them died of.
"""

import copy
import json
import mmap
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS_PER_INPUT = 5
MEMORY_BYTES = 1 << 30  # beside what the process has before the first input

ODD_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        7,
        255,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        10**30,
        10**400,
        0.5,
        -0.0,
        1e-320,
        1e308,
    ),
    *(
        float("inf"),
        float("nan"),
        "",
        "0",
        "\0",
        "..",
        "../../secret",
        "/etc/passwd",
        "C:\\x",
        "\ud800",
        "é",
        "\U0010ffff",
    ),
    *("a" * 10_000, "model.safetensors", "char", "bpe", "rope", [], {}, [[]], [0, 1], {"a": 1}, {"": None}),
]
ODD_TEXTS = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, "\\ud800", "\0", "//", "\ufeff"]
ODD_BYTES = [
    b"\0" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\xff" * 7 + b"\x7f",
    b"\x80",
    b"\x80\x04",
    b"c__builtin__\neval\n",
]


def mutated_bytes(choose: random.Random, data: bytes) -> bytes:
    """A few of: bits flipped, a stretch cut out, doubled, moved or overwritten, the end cut off."""
    found = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4, 16])):
        at, end = sorted(choose.randrange(len(found) + 1) for _ in range(2))
        kind = choose.randrange(7)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << choose.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = choose.randrange(256)
        elif kind == 2:
            odd = choose.choice(ODD_BYTES)
            found[at : at + len(odd)] = odd
        elif kind == 3:
            del found[at : min(end, at + choose.choice([1, 8, 100_000]))]
        elif kind == 4:
            found[at:at] = found[at : min(end, at + 5000)] * choose.choice([1, 2, 5])
        elif kind == 5:
            found[at:at] = choose.randbytes(choose.choice([1, 4, 64]))
        elif choose.random() < 0.3:
            del found[at:]
    return bytes(found[: 4 << 20])


def mutated_json(choose: random.Random, value: Any) -> Any:
    """A few of a JSON value's parts replaced, removed, renamed or nested."""
    value = json.loads(json.dumps(value))
    for _ in range(choose.choice([1, 1, 1, 2, 5])):
        holders: list[Any] = []
        stack = [value]
        while stack:
            part = stack.pop()
            if isinstance(part, dict | list) and part:
                holders.append(part)
                stack.extend(part.values() if isinstance(part, dict) else part[:50])
        if not holders:
            return copy.deepcopy(choose.choice(ODD_VALUES))
        holder = choose.choice(holders)
        key = choose.choice(list(holder)) if isinstance(holder, dict) else choose.randrange(len(holder))
        odd = copy.deepcopy(choose.choice(ODD_VALUES))  # a later change must not reach the inputs that follow
        kind = choose.randrange(6)
        if kind <= 2:
            holder[key] = odd
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            nested: Any = odd
            for _ in range(choose.choice([1, 5, 200, 900])):
                nested = [nested] if choose.random() < 0.5 else {"a": nested}
            holder[key] = nested
        elif isinstance(holder, dict):
            holder[odd if isinstance(odd, str) else "colour"] = holder[key]
        else:
            holder.append(odd)
    return value


def mutated_text(choose: random.Random, text: str) -> bytes:
    """A JSON text with one odd stretch in it, or with its bytes changed."""
    if choose.random() < 0.5:
        at = choose.randrange(len(text) + 1)
        text = text[:at] + choose.choice(ODD_TEXTS) + text[at + choose.choice([0, 1, 5]) :]
        return text.encode("utf-8", "surrogatepass")
    return mutated_bytes(choose, text.encode())


def dumped(value: Any) -> str:
    """JSON as a hostile writer gives it, whatever the value's depth."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000


class Readers:
    """Every reader of the package, each with a way to make an input for it: `case(choose)` writes it and reads it."""

    def __init__(self, folder: Path) -> None:
        import numpy as np
        import torch
        from test_trainer import CONFIG, MODEL, corpus

        from fastchargpt.bpe import BPETokenizer
        from fastchargpt.tokenizers import ByteTokenizer, CharTokenizer
        from fastchargpt.trainer import Trainer

        self.folder = folder
        self.out = folder / "out"
        self.last = self.out / "last"
        folder.mkdir(parents=True, exist_ok=True)
        self.trainer = Trainer(MODEL, CONFIG, corpus(), out_dir=self.out, log=lambda line: None)
        x = torch.zeros(4, 8, dtype=torch.int64)
        self.trainer.step(x, x)
        self.trainer._save_last()
        self.files = {path.name: path.read_bytes() for path in self.last.iterdir()}
        self.config = json.loads(self.files["config.json"])
        self.state = torch.load(self.last / "trainer.pt", weights_only=True)
        self.tokenizers = [
            json.loads(tokenizer.to_json())
            for tokenizer in (CharTokenizer("abcdé\n"), ByteTokenizer(), BPETokenizer([(97, 98), (256, 99), (32, 257)]))
        ]
        meta = {"vocab_size": 3, "itos": {0: "a", 1: "é", 2: "\n"}, "stoi": {"a": 0, "é": 1, "\n": 2}}
        self.metas = [pickle.dumps(meta, protocol) for protocol in range(6)]
        self.tokens = np.array([0, 1, 2, 1] * 20, "<u2").tobytes()
        self.metrics = b"".join(
            json.dumps({"step": step, "loss": 3.0, "lr": 1e-3, "val_loss": 2.5}).encode() + b"\n" for step in range(4)
        )
        self.cases: dict[str, Callable[[random.Random], None]] = {
            name.removeprefix("read_"): getattr(self, name) for name in sorted(dir(self)) if name.startswith("read_")
        }

    def write_checkpoint(self, config: Any = None, **files: bytes) -> None:
        """A checkpoint with some files replaced, its checksums made to fit, as whoever wants it read would."""
        import hashlib

        from fastchargpt.checkpoint import _digest

        content = dict(self.config if config is None else config)
        for name in files:
            content["files"] = {**content["files"], name: hashlib.sha256(files[name]).hexdigest()}
        content.pop("sha256", None)
        try:
            text = json.dumps({**content, "sha256": _digest(content)})
        except RecursionError:
            text = "[" * 5000
        self.write_files({**files, "config.json": text.encode()})

    def write_files(self, files: dict[str, bytes]) -> None:
        """The checkpoint's folder, with some files replaced."""
        self.last.mkdir(exist_ok=True)
        for name, data in {**self.files, **files}.items():
            (self.last / name).write_bytes(data)

    def read_config_signed(self, choose: random.Random) -> None:
        from fastchargpt.loading import load

        config = mutated_json(choose, {name: value for name, value in self.config.items() if name != "sha256"})
        self.write_checkpoint(config if isinstance(config, dict) else {"x": config})
        load(self.last)

    def read_checkpoint_bytes(self, choose: random.Random) -> None:
        from fastchargpt.checkpoint import load_checkpoint, load_last_good

        name = choose.choice(list(self.files))
        changed = mutated_text(choose, self.files[name].decode()) if name.endswith("json") else None
        self.write_files({name: mutated_bytes(choose, self.files[name]) if changed is None else changed})
        reader: Callable[..., object] = choose.choice([load_checkpoint, load_last_good])
        reader(choose.choice([self.last, self.out]), with_trainer=True)

    def read_safetensors(self, choose: random.Random) -> None:
        from fastchargpt.loading import load

        data = self.files["model.safetensors"]
        if choose.random() < 0.6:
            length = int.from_bytes(data[:8], "little")
            header = dumped(mutated_json(choose, json.loads(data[8 : 8 + length]))).encode("utf-8", "replace")
            claimed = choose.choice([len(header), len(header), len(header), 2**63, 10**8, 0, len(header) + 1])
            data = claimed.to_bytes(8, "little") + header + data[8 + length :]
        else:
            data = mutated_bytes(choose, data)
        self.write_checkpoint(**{"model.safetensors": data})
        load(self.last)

    def read_trainer_state(self, choose: random.Random) -> None:
        import io
        import zipfile

        import torch

        from fastchargpt.checkpoint import load_checkpoint

        data = self.files["trainer.pt"]
        kind = choose.randrange(3)
        if kind == 0:
            data = mutated_bytes(choose, data)
        elif kind == 1:  # what is inside the archive, in an archive that is whole
            target = io.BytesIO()
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
                spoil = choose.choice([name for name in old.namelist() if name.endswith(("data.pkl", "version", "/0"))])
                for name in old.namelist():
                    new.writestr(name, mutated_bytes(choose, old.read(name)) if name == spoil else old.read(name))
            data = target.getvalue()
        else:  # a state of another shape, which is read and then refused by whoever takes it up
            state = self._mutated_state(choose)
            buffer = io.BytesIO()
            torch.save(state, buffer)
            data = buffer.getvalue()
        self.write_checkpoint(**{"trainer.pt": data})
        if kind == 2:
            self.trainer.resume()
        else:
            load_checkpoint(self.last, with_trainer=True)

    def _mutated_state(self, choose: random.Random) -> Any:
        import torch

        state = copy.deepcopy(self.state)
        holder: Any = state
        while True:
            key = choose.choice(list(holder)) if isinstance(holder, dict) else choose.randrange(len(holder))
            if isinstance(holder[key], dict | list) and holder[key] and choose.random() < 0.8:
                holder = holder[key]
                continue
            odd = [value for value in ODD_VALUES if not (isinstance(value, str) and "\ud800" in value)]
            odd += [torch.zeros(0), torch.zeros(3, dtype=torch.uint8), torch.full((2, 2), float("nan")), (1, 2)]
            holder[key] = copy.deepcopy(choose.choice(odd))
            if isinstance(holder, dict) and choose.random() < 0.2:
                del holder[key]
            return state

    def read_tokenizer(self, choose: random.Random) -> None:
        from fastchargpt.tokenizers import load_tokenizer

        value = choose.choice(self.tokenizers)
        if choose.random() < 0.4:  # whole but for its vocabulary
            value = dict(value)
            if "merges" in value:
                highest = choose.choice([97, 256, 300])
                value["merges"] = [
                    [choose.randrange(97, highest + 2 + i), choose.randrange(97, highest + 2 + i)]
                    for i in range(choose.choice([1, 3, 40]))
                ]
            elif "chars" in value:
                value["chars"] = "ab" + "".join(
                    chr(choose.randrange(0x110000)) for _ in range(choose.choice([0, 1, 300]))
                )
            raw = dumped(value).encode()
        elif choose.random() < 0.6:
            raw = dumped(mutated_json(choose, value)).encode()
        else:
            raw = mutated_text(choose, json.dumps(value))
        path = self.folder / "tokenizer.json"
        path.write_bytes(raw)
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("ab"))

    def read_meta_pickle(self, choose: random.Random) -> None:
        from fastchargpt.nanogpt_data import read_meta

        path = self.folder / "meta.pkl"
        path.write_bytes(mutated_bytes(choose, choose.choice(self.metas)))
        read_meta(path)

    def read_nanogpt_folder(self, choose: random.Random) -> None:
        from fastchargpt.corpus import load_corpus

        folder = self.folder / "nanogpt"
        folder.mkdir(exist_ok=True)
        files = {"train.bin": self.tokens, "val.bin": self.tokens, "meta.pkl": choose.choice(self.metas)}
        name = choose.choice(list(files))
        files[name] = mutated_bytes(choose, files[name])
        for name, data in files.items():
            (folder / name).unlink(missing_ok=True)  # a map of the file before may still be open
            (folder / name).write_bytes(data)
        if choose.random() < 0.1:
            (folder / choose.choice(list(files))).unlink()
        load_corpus(folder)

    def read_text(self, choose: random.Random) -> None:
        from fastchargpt.corpus import load_corpus

        path = self.folder / "text.txt"
        text = "To be, or not to be é 日本 \U0001f600 \r\n\0\ufeff" * choose.choice([0, 1, 5])
        path.write_bytes(mutated_bytes(choose, text.encode()) if choose.random() < 0.8 else choose.randbytes(50))
        load_corpus(path, tokenizer=choose.choice(["char", "byte", "char", "byte", "bpe"]), bpe_vocab_size=260)

    def read_config_dict(self, choose: random.Random) -> None:
        from fastchargpt.config import GPTConfig, TrainConfig, config_from_dict

        kind, name = choose.choice([(GPTConfig, "model"), (TrainConfig, "train")])
        fields = mutated_json(choose, self.config[name])
        if isinstance(fields, dict):
            config_from_dict(kind, fields)  # type: ignore[type-var]

    def read_metrics(self, choose: random.Random) -> None:
        from fastchargpt.metrics import JsonlMetrics, read_metrics

        path = self.folder / "metrics.jsonl"
        lines = mutated_bytes(choose, self.metrics)
        if choose.random() < 0.5:
            lines += dumped(mutated_json(choose, {"step": 4, "loss": 2.0, "val_loss": 1.0})).encode() + b"\n"
        path.write_bytes(lines)
        read_metrics(path)
        JsonlMetrics(path, resume_step=choose.randrange(5))
        assert all(row["step"] <= 4 and isinstance(sum(row.values()), int | float) for row in read_metrics(path))


def run_one(readers: Readers, seed: int, number: int) -> tuple[str, str]:
    """Make and read one input: the reader's name, and `read`, `refused` or what went wrong."""
    from fastchargpt.errors import FastchargptError

    names = list(readers.cases)
    name = names[number % len(names)]
    try:
        readers.cases[name](random.Random(f"{seed}:{number}"))
    except FastchargptError as error:
        said = str(error)
        return name, "refused" if "\n" not in said and len(
            said
        ) < 1500 else f"a sentence of {len(said)} characters: {said[:300]!r}"
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return name, f"{type(error).__name__}: {str(error)[:300]} ({Path(where.filename).name}:{where.lineno})"
    return name, "read"


def work(seed: int, first: int, count: int, folder: Path) -> None:
    """Run some inputs under the limits; the last line printed is the outcome as JSON, findings come line by line."""
    import torch

    torch.set_num_threads(1)
    readers = Readers(folder)
    for number in range(len(readers.cases)):  # imports, and whatever else is made on first use
        run_one(readers, -1, number)
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + MEMORY_BYTES, virtual + MEMORY_BYTES))
    with (folder / "progress").open("r+b") as file:
        progress = mmap.mmap(file.fileno(), 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes: Counter[str] = Counter()
    slowest = 0.0
    for number in range(first, first + count):
        progress[:] = number.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_REAL, SECONDS_PER_INPUT)  # nobody handles it: the process dies of it
        start = time.process_time()
        name, outcome = run_one(readers, seed, number)
        slowest = max(slowest, time.process_time() - start)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if outcome not in ("read", "refused"):
            print(json.dumps({"number": number, "reader": name, "finding": outcome}), flush=True)
            outcome = "finding"
        outcomes[f"{name}: {outcome}"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(json.dumps({"outcomes": outcomes, "slowest_s": slowest, "grown_mib": grown}), flush=True)


def campaign(seed: int, count: int, folder: Path) -> dict[str, Any]:
    """Run `count` inputs: how many were read and refused, and every finding, the deadly ones included."""
    findings: list[dict[str, Any]] = []
    outcomes: Counter[str] = Counter()
    slowest = grown = 0.0
    first, end = 0, count
    folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "FASTCHARGPT_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    while first < end:
        (folder / "progress").write_bytes(first.to_bytes(8, "little"))
        command = [sys.executable, str(Path(__file__).resolve()), str(seed), str(first), str(end - first), str(folder)]
        with (folder / f"outcome-{first}.jsonl").open("w+") as said:  # to be looked at while it grows
            done = subprocess.run(command, stdout=said, stderr=subprocess.PIPE, text=True, env=environment)
            said.seek(0)
            lines = [json.loads(line) for line in said]
        findings += [line for line in lines if "finding" in line]
        if done.returncode == 0:
            outcomes.update(lines[-1]["outcomes"])
            slowest, grown = max(slowest, lines[-1]["slowest_s"]), max(grown, lines[-1]["grown_mib"])
            break
        died = int.from_bytes((folder / "progress").read_bytes(), "little")
        findings.append({"number": died, "finding": f"died with status {done.returncode}: {done.stderr[-600:]}"})
        if len(findings) > 200:
            break
        first = died + 1
    return {"outcomes": dict(sorted(outcomes.items())), "findings": findings, "slowest_s": slowest, "grown_mib": grown}


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
