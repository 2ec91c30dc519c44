"""The readers of other people's models (`fastchargpt convert`), with inputs for them."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

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

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 13}
CHARS = "\n .,abcdefg€é"[:13]


class ForeignReaders:
    """One method a format: `read_NAME(choose)` writes an input into the folder, reads it, and builds the model."""

    folder: Path

    def write_foreign(self) -> None:
        """The whole files that the inputs are changed from."""
        import torch

        from fastchargpt import GPT, CharTokenizer, GPTConfig
        from fastchargpt.checkpoint import Checkpoint
        from fastchargpt.convert.writers import write

        torch.manual_seed(1)
        self.foreign: dict[str, dict[str, bytes]] = {}
        tanh = GPTConfig(**SHAPE, activation="gelu_tanh")
        for kind, family in (
            ("nanogpt", "nanogpt"),
            ("lecture", "lecture"),
            ("hf", "nanogpt"),
            ("safetensors", "modern"),
            ("gguf", ""),
        ):
            model = GPT(tanh if kind == "gguf" else GPTConfig.family(family, **SHAPE))
            checkpoint = Checkpoint(
                model_config=model.config, weights=model.state_dict(), tokenizer_json=CharTokenizer(CHARS).to_json()
            )
            path = self.folder / f"whole-{kind}"
            if path.is_dir():  # of the process before, which died of its input
                shutil.rmtree(path)
            write(checkpoint, path, kind, [], home=path)
            files = sorted(path.iterdir()) if path.is_dir() else [path]
            self.foreign[kind] = {file.name: file.read_bytes() for file in files}

        # where the tensors begin: the rest of the file is numbers, any of which are weights
        weights = sum(tensor.numel() * 4 for tensor in GPT(tanh).parameters())
        self.gguf_header = len(self.foreign["gguf"]["whole-gguf"]) - weights

    def read_nanogpt_checkpoint(self, choose: random.Random) -> None:
        files = dict(self.foreign["nanogpt"])
        files["ckpt.pt"] = self._torch_file(choose, files["ckpt.pt"], ["model", "model_args", "config"])
        if choose.random() < 0.1:
            files["meta.pkl"] = mutated_bytes(choose, files["meta.pkl"])
        self._read_folder("nanogpt", files, "ckpt.pt" if choose.random() < 0.3 else "")

    def read_lecture(self, choose: random.Random) -> None:
        data = self._torch_file(choose, self.foreign["lecture"]["whole-lecture"], [])
        self._read_folder("lecture", {"model.pt": data}, "model.pt")

    def read_hf_folder(self, choose: random.Random) -> None:
        files = dict(self.foreign["hf"])
        name = choose.choice(["config.json", "model.safetensors", "tokenizer.json"])
        if name == "model.safetensors":
            files[name] = mutated_safetensors(choose, files[name])
        elif choose.random() < 0.7:
            files[name] = dumped(mutated_json(choose, json.loads(files[name]))).encode()
        else:
            files[name] = mutated_text(choose, files[name].decode())
        if choose.random() < 0.05:
            del files[name]
        self._read_folder("hf", files, "")

    def read_plain_safetensors(self, choose: random.Random) -> None:
        data = self.foreign["safetensors"]["whole-safetensors"]
        self._read_folder(
            "safetensors", {"model.safetensors": mutated_safetensors(choose, data, inside=True)}, "model.safetensors"
        )

    def read_gguf(self, choose: random.Random) -> None:
        data = bytearray(self.foreign["gguf"]["whole-gguf"])
        header = self.gguf_header
        kind = choose.randrange(4)
        if kind == 0:
            data[:] = mutated_bytes(choose, bytes(data))
        elif kind == 1:  # the header alone, in a file whose tensors are where they were
            data[:header] = mutated_bytes(choose, bytes(data[:header]))[:header].ljust(header, b"\0")
        else:  # numbers: counts, lengths, types, offsets
            for _ in range(choose.choice([1, 1, 2, 4])):
                at = 4 * choose.randrange(header // 4) if choose.random() < 0.3 else choose.randrange(header)
                size = choose.choice([4, 8])
                number = choose.choice([0, 1, 2, 8, 9, 12, 28, 31, 255, 2**16, 2**31, 2**32 - 1, 2**62, 2**64 - 1])
                data[at : at + size] = (number % 256**size).to_bytes(size, "little")
        self._read_folder("gguf", {"model.gguf": bytes(data)}, "model.gguf")

    def _torch_file(self, choose: random.Random, data: bytes, parts: list[str]) -> bytes:
        """A file of torch.save: its bytes changed, what is inside its archive, or the value that was saved."""
        import io

        import torch

        kind = choose.randrange(4)
        if kind == 0:
            return mutated_bytes(choose, data)
        if kind == 1:
            return mutated_archive(choose, data)
        content = torch.load(io.BytesIO(data), weights_only=True)
        part = choose.choice(parts) if parts and choose.random() < 0.7 else None
        if part is None:
            return archive(mutated_state(choose, content))
        content[part] = mutated_state(choose, content[part])
        return archive(content)

    def _read_folder(self, name: str, files: dict[str, bytes], start: str) -> None:
        """Write the files, and read what lies there as `convert` does."""
        from fastchargpt import GPT
        from fastchargpt.convert.readers import detect, read

        folder = self.folder / f"foreign-{name}"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for file, data in files.items():
            (folder / file).write_bytes(data)
        source = folder / start if start else folder
        notes: list[Any] = []
        checkpoint = read(source, detect(source), notes)
        GPT.from_state_dict(checkpoint.model_config, checkpoint.weights)
