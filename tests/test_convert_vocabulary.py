"""Vocabularies between formats: Hugging Face's tokenizers, nanoGPT's meta."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import CHARS, SHAPE, example, put

from fastchargpt import ByteTokenizer, CharTokenizer, load
from fastchargpt.bpe import BPETokenizer
from fastchargpt.convert import convert
from fastchargpt.convert.readers import read
from fastchargpt.convert.vocabulary import from_hugging_face, read_vocabulary, to_hugging_face
from fastchargpt.errors import CheckpointError, TokenizerError


@pytest.mark.parametrize(
    "tokenizer",
    [
        CharTokenizer(CHARS),
        CharTokenizer(CHARS, "replace"),
        ByteTokenizer(),
        BPETokenizer.train("abcabcabc ab " * 9, 264),
    ],
    ids=["char", "char with replacement", "byte", "bpe"],
)
def test_tokenizers_for_hugging_face(tokenizer: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    path = tmp_path / "tokenizer.json"
    path.write_text(to_hugging_face(tokenizer), encoding="utf-8")
    engine = Tokenizer.from_file(str(path))
    for text in ("ab.\n\n  cab", "a", " é€\n", "abcabc ab\t\n" if tokenizer.name != "char" else "g g"):
        ids = tokenizer.encode(text).tolist()
        assert engine.encode(text).ids == ids
        assert engine.decode(ids) == text
    assert engine.get_vocab_size() == tokenizer.vocab_size
    assert from_hugging_face(path) == tokenizer
    assert read_vocabulary(path) == tokenizer
    changed = json.loads(path.read_text(encoding="utf-8"))
    changed["normalizer"] = {"type": "Lowercase"}
    path.write_text(json.dumps(changed))
    assert from_hugging_face(path) is None  # it would give other ids
    with pytest.raises(TokenizerError, match="not a tokenizer that fastchargpt has"):
        read_vocabulary(path)


@pytest.mark.parametrize("vocab", [[], [10**30], ["a"], [[0]], {"a": 1}, {"a": "b"}, {"ab": 0}, 3, None], ids=str)
@pytest.mark.parametrize("kind", ["WordLevel", "BPE"])
def test_odd_vocabularies_for_hugging_face(vocab: Any, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    model = {"type": kind, "vocab": vocab, "merges": [["a", "b"]], "unk_token": "?"}
    path.write_text(json.dumps({"model": model}))
    assert from_hugging_face(path) is None


def test_a_vocabulary_by_name(tmp_path: Path) -> None:
    lecture = put("lecture", "lecture", tmp_path)
    (tmp_path / "input.txt").write_text(CHARS * 3, encoding="utf-8")
    done = convert(lecture, tmp_path / "plain")
    assert any("name its text (input.txt) with --tokenizer" in note for note in done.notes)
    done = convert(lecture, tmp_path / "named", tokenizer=tmp_path / "input.txt")
    assert not done.notes
    assert load(tmp_path / "named")[1] == CharTokenizer("".join(sorted(CHARS)))
    (tmp_path / "long.txt").write_text("abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(CheckpointError, match="26 tokens and the model 13"):
        convert(lecture, tmp_path / "again", tokenizer=tmp_path / "long.txt")
    with pytest.raises(TokenizerError, match="cannot be read"):
        convert(lecture, tmp_path / "again", tokenizer=tmp_path / "missing.txt")
    nano = put("nanogpt", "nanogpt", tmp_path)
    (tmp_path / "meta.pkl").write_bytes((nano / "meta.pkl").read_bytes())
    convert(nano / "ckpt.pt", tmp_path / "meta", tokenizer=tmp_path / "meta.pkl")
    assert load(tmp_path / "meta")[1] == CharTokenizer(CHARS)


def test_nanogpts_own_place_for_meta(tmp_path: Path) -> None:
    # out/ckpt.pt says dataset, and data/DATASET/meta.pkl lies beside out/
    folder = put("nanogpt", "nanogpt", tmp_path)
    data = tmp_path / "data" / "toy"
    data.mkdir(parents=True)
    (folder / "meta.pkl").rename(data / "meta.pkl")
    content = torch.load(folder / "ckpt.pt", weights_only=True)
    for dataset, found in (("toy", CharTokenizer(CHARS).to_json()), ("../data/toy", None), ("other", None)):
        torch.save({**content, "config": {"dataset": dataset}}, folder / "ckpt.pt")
        notes: list[str] = []
        assert read(folder, "nanogpt", notes).tokenizer_json == found
        assert bool(notes) == (found is None)


def test_nanogpt_prefixes_masks_and_facts(tmp_path: Path) -> None:
    checkpoint = example("biased")
    odd = {f"_orig_mod.module.{name}": tensor.bfloat16() for name, tensor in checkpoint.weights.items()}
    odd |= {f"_orig_mod.module.transformer.h.{i}.attn.bias": torch.ones(1, 1, 12, 12) for i in range(2)}
    args = {name: getattr(checkpoint.model_config, name) for name in (*SHAPE, "bias", "dropout")}
    torch.save({"model": odd, "model_args": args, "iter_num": 3, "best_val_loss": torch.tensor(2.5)}, tmp_path / "c.pt")
    found = read(tmp_path / "c.pt", "nanogpt", [])
    assert found.info == {"converted_from": "nanogpt", "iteration": 3, "val_loss": 2.5}
    assert found.model_config == checkpoint.model_config
    for name, tensor in checkpoint.weights.items():
        assert torch.equal(found.weights[name], tensor.bfloat16().float())
