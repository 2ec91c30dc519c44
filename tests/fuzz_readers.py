"""Every reader of the package, with inputs for it."""

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz_foreign import ForeignReaders
from fuzz_inputs import (
    archive,
    dumped,
    mutated_archive,
    mutated_bytes,
    mutated_json,
    mutated_safetensors,
    mutated_state,
    mutated_text,
)


class Readers(ForeignReaders):
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
        self.write_foreign()
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

        self.write_checkpoint(**{"model.safetensors": mutated_safetensors(choose, self.files["model.safetensors"])})
        load(self.last)

    def read_trainer_state(self, choose: random.Random) -> None:
        from fastchargpt.checkpoint import load_checkpoint

        data = self.files["trainer.pt"]
        kind = choose.randrange(3)
        if kind == 0:
            data = mutated_bytes(choose, data)
        elif kind == 1:
            data = mutated_archive(choose, data)
        else:  # a state of another shape, which is read and then refused by whoever takes it up
            data = archive(mutated_state(choose, self.state))
        self.write_checkpoint(**{"trainer.pt": data})
        if kind == 2:
            self.trainer.resume()
        else:
            load_checkpoint(self.last, with_trainer=True)

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
