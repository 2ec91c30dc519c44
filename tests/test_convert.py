"""fastchargpt convert: every pair of formats there and back, and the command."""

import functools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import CHARS, CONFIGS, ENDINGS, EXPRESSES, example, put
from peers import peer
from torch import Tensor

from fastchargpt import GPT, CharTokenizer, load, save_checkpoint
from fastchargpt.checkpoint import Checkpoint
from fastchargpt.cli import main
from fastchargpt.convert import FORMATS, convert
from fastchargpt.convert.readers import detect, read
from fastchargpt.errors import CheckpointError, ConfigError, OutDirError

PAIRS = [(a, b, name) for a in FORMATS for b in FORMATS for name in CONFIGS if name in EXPRESSES[a] & EXPRESSES[b]]


@functools.cache
def expected_logits(name: str) -> Tensor:
    return logits(example(name))


def logits(checkpoint: Checkpoint) -> Tensor:
    x = torch.randint(13, (2, 12), generator=torch.Generator().manual_seed(3))
    return GPT.from_state_dict(checkpoint.model_config, checkpoint.weights).eval().double()(x, x)[0]


@pytest.mark.parametrize(("source", "target", "name"), PAIRS)
def test_there_and_back(source: str, target: str, name: str, tmp_path: Path) -> None:
    first = put(name, source, tmp_path)
    assert detect(first) == source
    there, back = (tmp_path / f"{name}{ENDINGS.get(kind, '')}" for name, kind in (("there", target), ("back", source)))
    done = convert(first, there, to=target)  # type: ignore[arg-type]
    assert (done.source_format, done.target_format) == (source, target)
    convert(there, back, to=source)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted({first.name, there.name, back.name})
    for kind, path in ((source, first), (target, there), (source, back)):
        found = read(path, kind, [])
        torch.testing.assert_close(logits(found), expected_logits(name), rtol=0, atol=1e-12)
        if "lecture" not in (source, target):
            assert found.tokenizer_json == CharTokenizer(CHARS).to_json()


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_format_cannot_express_is_refused(name: str, kind: str, tmp_path: Path) -> None:
    if name in EXPRESSES[kind]:
        return
    source = put(name, "fastchargpt", tmp_path)
    with pytest.raises(ConfigError, match="cannot be written as"):
        convert(source, tmp_path / "out", to=kind)  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("name", sorted(EXPRESSES["hf"]))
def test_transformers_loads_what_was_written(name: str, tmp_path: Path) -> None:
    transformers = peer("transformers")
    folder = put(name, "hf", tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    x = torch.randint(13, (2, 12), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(theirs(x).logits, expected_logits(name), rtol=0, atol=1e-10)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
    ids = CharTokenizer(CHARS, "replace").encode("ab .\n\ngg,").tolist()
    assert tokenizer.encode("ab .\n\ngg,") == ids
    assert tokenizer.decode(ids) == "ab .\n\ngg,"
    assert tokenizer.model_max_length == 12


def test_a_folder_that_transformers_saved(tmp_path: Path) -> None:
    transformers = peer("transformers")
    fields = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 12, "vocab_size": 13}
    for i, extra in enumerate(({}, {"tie_word_embeddings": False}, {"activation_function": "relu", "n_inner": 64})):
        config = transformers.GPT2Config(**fields, **extra, bos_token_id=None, eos_token_id=None)
        theirs = transformers.GPT2LMHeadModel(config).eval()
        theirs.save_pretrained(tmp_path / f"theirs{i}")
        done = convert(tmp_path / f"theirs{i}", tmp_path / f"ours{i}", check=True)
        assert done.checked is not None
        assert done.checked[1] == "transformers too"
        x = torch.randint(13, (2, 12))
        ours, tokenizer = load(tmp_path / f"ours{i}")
        assert tokenizer is None
        torch.testing.assert_close(ours(x, x)[0], theirs(x).logits, rtol=0, atol=1e-5)
    # OpenAI's own layout: pytorch_model.bin, names without a prefix, masks among them
    old = tmp_path / "old"
    old.mkdir()
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**fields)).eval()
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 12, 12).byte(), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(state, old / "pytorch_model.bin")
    (old / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    convert(old, tmp_path / "ours-old")
    torch.testing.assert_close(load(tmp_path / "ours-old")[0](x, x)[0], theirs(x).logits, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the native decoder:RuntimeWarning")
@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_what_came_in_generates(name: str, tmp_path: Path) -> None:
    # every kind of model that a conversion can give, through whichever decoder serves it
    convert(put(name, "safetensors", tmp_path), tmp_path / "ours")
    model = load(tmp_path / "ours")[0]
    idx = torch.zeros(1, 1, dtype=torch.int64)
    found, expected = model.generate(idx, 8, temperature=0.0), idx
    for _ in range(8):
        expected = torch.cat((expected, model(expected)[0][:, -1].argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(found, expected)


def test_from_pretrained_downloads_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = peer("transformers")
    from fastchargpt.integrations.gpt2 import read_gpt2

    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=12)
    ).eval()
    monkeypatch.setattr(transformers.GPT2LMHeadModel, "from_pretrained", lambda name: theirs)
    config, weights = read_gpt2("gpt2")
    x = torch.randint(50257, (1, 12))
    torch.testing.assert_close(
        GPT.from_state_dict(config, weights).eval()(x, x)[0], theirs(x).logits, rtol=0, atol=1e-5
    )


# ------------------------------------------------------------------------------------------- the command, whole or not


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nano = put("nanogpt", "nanogpt", tmp_path)
    out, gpt2, plain = tmp_path / "out", tmp_path / "gpt2", tmp_path / "model.safetensors"
    assert main(["convert", str(nano), str(out), "--check"]) == 0
    printed = capsys.readouterr().out
    assert "checked: the logits of both agree to" in printed
    assert f"converted {nano} (nanogpt) to {out} (fastchargpt)" in printed
    assert main(["convert", str(out), str(gpt2), "--to=hf"]) == 0
    assert main(["convert", str(gpt2), str(plain)]) == 0
    assert detect(plain) == "safetensors"
    capsys.readouterr()
    for words, sentence in (
        ([str(out), str(tmp_path / "new")], "say with --to what"),
        ([str(nano), str(out)], "exists, and convert overwrites nothing"),
        ([str(tmp_path / "nowhere"), str(tmp_path / "new")], "there is nothing at"),
        ([str(out), str(tmp_path / "new.pt"), "--to=nanogpt"], "nanogpt is a folder"),
        ([str(tmp_path), str(tmp_path / "new")], "holds no checkpoint"),
        ([str(out), str(tmp_path / "new"), "--to=onnx"], "--to"),
    ):
        assert main(["convert", *words]) == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1
    with pytest.raises(ConfigError, match="did you mean 'nanogpt'"):
        convert(out, tmp_path / "new", to="nanogtp")  # type: ignore[arg-type]


def test_nothing_is_left_of_a_failed_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastchargpt.convert import core

    source = put("nanogpt", "nanogpt", tmp_path)
    (tmp_path / "out.part").mkdir()  # of a conversion that was killed
    real = core.write

    def spoil(checkpoint: Checkpoint, target: Path, kind: str, notes: list[str], *, home: Path) -> None:
        weights = {name: tensor + 1e-3 for name, tensor in checkpoint.weights.items()}
        real(Checkpoint(model_config=checkpoint.model_config, weights=weights), target, kind, notes, home=home)

    with monkeypatch.context() as patch:
        patch.setattr(core, "write", spoil)
        with pytest.raises(CheckpointError, match=r"differ by .* nothing was written"):
            convert(source, tmp_path / "out", check=True)

    assert [path.name for path in tmp_path.iterdir()] == [source.name]

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(core, "write", fail)
        with pytest.raises(OutDirError, match="No space left"):
            convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [source.name]
    convert(source, tmp_path / "new" / "deep" / "out", check=True)


def test_a_runs_out_dir_is_its_best(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "run" / "best", example("nanogpt"))
    save_checkpoint(tmp_path / "run" / "last", example("biased"))
    convert(tmp_path / "run", tmp_path / "out", to="nanogpt")
    torch.testing.assert_close(logits(read(tmp_path / "out", "nanogpt", [])), logits(example("nanogpt")))
    content = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    assert (content["iter_num"], content["best_val_loss"]) == (7, 1.5)
    assert content["config"] == {"dataset": str((tmp_path / "out").resolve())}
    assert content["optimizer"]["state"] == {}
