"""fastchargpt convert: every pair of formats there and back, and files that must be refused without running."""

import functools
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import peer
from torch import Tensor

from fastchargpt import GPT, ByteTokenizer, CharTokenizer, GPTConfig, load, save_checkpoint
from fastchargpt.bpe import BPETokenizer
from fastchargpt.checkpoint import Checkpoint
from fastchargpt.cli import main
from fastchargpt.convert import FORMATS, convert
from fastchargpt.convert.readers import detect, read
from fastchargpt.convert.vocabulary import from_hugging_face, read_vocabulary, to_hugging_face
from fastchargpt.convert.writers import write
from fastchargpt.errors import CheckpointError, ConfigError, FastchargptError, OutDirError, TokenizerError

SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 12, "vocab_size": 13}
CHARS = "\n .,abcdefg€é"[:13]
# families that a format can express, and what each format's example is
CONFIGS = {
    "nanogpt": GPTConfig(**SHAPE, bias=False),
    "biased": GPTConfig(**SHAPE, dropout=0.1),
    "gpt2": GPTConfig(**SHAPE, activation="gelu_tanh"),
    "gpt2, bare and untied": GPTConfig(**SHAPE, activation="gelu_tanh", bias=False, tie_weights=False),
    "untied": GPTConfig(**SHAPE, tie_weights=False, bias=False, activation="relu2"),
    "odd biases": GPTConfig(**SHAPE, bias=False, qkv_bias=True),
    "lecture": GPTConfig.family("lecture", **SHAPE),
    "modern": GPTConfig.family("modern", **SHAPE, n_kv_head=1),
}
EXPRESSES = {
    "fastchargpt": set(CONFIGS),
    "safetensors": set(CONFIGS),
    "nanogpt": {"nanogpt", "biased", "odd biases"},
    "hf": {"nanogpt", "biased", "gpt2", "gpt2, bare and untied", "untied", "odd biases"},
    "gguf": {"gpt2", "gpt2, bare and untied"},
    "lecture": {"lecture"},
}
ENDINGS = {"lecture": ".pt", "safetensors": ".safetensors", "gguf": ".gguf"}
PAIRS = [(a, b, name) for a in FORMATS for b in FORMATS for name in CONFIGS if name in EXPRESSES[a] & EXPRESSES[b]]


def example(name: str) -> Checkpoint:
    torch.manual_seed(sum(map(ord, name)))
    model = GPT(CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return Checkpoint(
        model_config=model.config,
        weights=model.state_dict(),
        tokenizer_json=CharTokenizer(CHARS).to_json(),
        info={"iteration": 7, "val_loss": 1.5},
    )


def put(name: str, kind: str, folder: Path) -> Path:
    """The example in a format."""
    path = folder / f"{name}-{kind}{ENDINGS.get(kind, '')}"
    write(example(name), path, kind, [], home=path)
    return path


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


# -------------------------------------------------------------------------------------------------------- vocabulary


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


# ----------------------------------------------------------------------------------------------------------- hostile


class Canary:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.path, "it sang")


def zipped(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def compressed(raw: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def nano(**changes: Any) -> dict[str, Any]:
    checkpoint = example("nanogpt")
    args = {name: getattr(checkpoint.model_config, name) for name in (*SHAPE, "bias", "dropout")}
    return {"model": dict(checkpoint.weights), "model_args": args, **changes}


def with_weight(name: str, value: Any) -> dict[str, Any]:
    content = nano()
    content["model"] = {**content["model"], name: value}
    return content


def without(name: str) -> dict[str, Any]:
    content = nano()
    del content["model"][name]
    return content


def arguments(**changes: Any) -> dict[str, Any]:
    return nano(model_args={**nano()["model_args"], **changes})


QKV = "transformer.h.0.attn.c_attn.weight"
HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "a pickle with code": (
        lambda canary: pickle.dumps(Canary(canary)),
        "nothing in it was run|not a file of torch.save",
    ),
    "code in an archive": (lambda canary: zipped(nano(config=Canary(canary))), "it names .*nothing in it was run"),
    "code as a weight": (lambda canary: zipped(with_weight(QKV, Canary(canary))), "nothing in it was run"),
    "a truncated archive": (lambda _: zipped(nano())[:-700], "damaged"),
    "a compressed archive": (lambda _: compressed(zipped(nano())), "compressed archive"),
    "nothing": (lambda _: b"", "damaged"),
    "a text": (lambda _: b"hello " * 99, "pickle of more than weights|damaged"),
    "a list": (lambda _: zipped([1, 2]), "must hold a dict"),
    "other names": (lambda _: zipped({"weight": torch.ones(2)}), "neither nanoGPT's ckpt.pt"),
    "no weights": (lambda _: zipped(nano(model={})), "holds no weights"),
    "weights that are a number": (lambda _: zipped(nano(model=3)), "needs the dicts"),
    "arguments that are a list": (lambda _: zipped(nano(model_args=[1])), "needs the dicts"),
    "a missing weight": (lambda _: zipped(without(QKV)), "lacks the weight transformer.h.0.attn.c_attn.weight"),
    "another shape": (
        lambda _: zipped(with_weight(QKV, torch.ones(3, 3))),
        r"has the shape \(3, 3\), where .* needs \(48, 16\)",
    ),
    "one weight more": (
        lambda _: zipped(with_weight("extra", torch.ones(1))),
        "has a weight extra that the model does not",
    ),
    "an untied pair": (
        lambda _: zipped(with_weight("lm_head.weight", torch.ones(13, 16))),
        "differ, and the model ties them",
    ),
    "integers": (lambda _: zipped(with_weight(QKV, torch.ones(48, 16).long())), "dense floating-point"),
    "a sparse tensor": (lambda _: zipped(with_weight(QKV, torch.ones(48, 16).to_sparse())), "dense floating-point"),
    "a tensor without numbers": (
        lambda _: zipped(with_weight(QKV, torch.ones(48, 16, device="meta"))),
        "dense floating-point",
    ),
    "a stretched tensor": (
        lambda _: zipped(with_weight(QKV, torch.ones(1, 1).expand(48, 16))),
        "more numbers than the file",
    ),
    "a text as weight": (lambda _: zipped(with_weight(QKV, "x")), "is no tensor"),
    "a million layers": (
        lambda _: zipped(arguments(n_layer=10**6)),
        "describes 1000000 layers and holds the weights of 2",
    ),
    "heads that do not fit": (lambda _: zipped(arguments(n_head=3)), "n_embd must be a multiple of n_head"),
    "a text as size": (lambda _: zipped(arguments(n_embd="16")), "n_embd must be a whole number"),
    "a tensor as size": (lambda _: zipped(arguments(n_embd=torch.ones(2, 2))), "has a Tensor for the model argument"),
    "sizes beyond every memory": (lambda _: zipped(arguments(n_embd=2**32, n_head=1)), "beyond every memory"),
    "a fork's argument": (lambda _: zipped(arguments(rotary=True)), "model argument 'rotary'"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_torch_files(name: str, tmp_path: Path) -> None:
    make, sentence = HOSTILE[name]
    canary = tmp_path / "canary"
    path = tmp_path / "ckpt.pt"
    path.write_bytes(make(canary))
    for source in (path, tmp_path):  # as a file, and as nanoGPT's folder
        if name == "other names" and source == tmp_path:
            continue
        with pytest.raises(CheckpointError, match=sentence) as caught:
            convert(source, tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not canary.exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt"]


def test_the_canary_sings_where_it_is_loaded(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").read_text() == "it sang"


def test_hostile_meta(tmp_path: Path) -> None:
    folder = put("nanogpt", "nanogpt", tmp_path)
    (folder / "meta.pkl").write_bytes(pickle.dumps({"itos": Canary(tmp_path / "canary"), "stoi": {}}))
    with pytest.raises(FastchargptError, match=r"not a meta\.pkl"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "canary").exists()
    big = {"vocab_size": 20, "itos": {i: chr(97 + i) for i in range(20)}, "stoi": {chr(97 + i): i for i in range(20)}}
    (folder / "meta.pkl").write_bytes(pickle.dumps(big))
    with pytest.raises(CheckpointError, match="20 tokens and the model 13"):
        convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"activation_function": "silu"}, "activation_function='silu'"),
        ({"activation_function": ["gelu"]}, "activation_function="),
        ({"n_inner": 7}, "n_inner=7"),
        ({"n_layer": 3}, "describes 3 layers"),
        ({"n_layer": "2"}, "n_layer must be a whole number"),
        ({"n_embd": None}, "n_embd must be a whole number"),
        ({"vocab_size": 14}, r"has the shape \(13, 16\)"),
    ],
)
def test_gpt2_configs_that_are_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = put("gpt2", "hf", tmp_path)
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**fields, **changes}))
    with pytest.raises(CheckpointError, match=sentence):
        convert(folder, tmp_path / "out")


def test_damaged_folders_of_transformers(tmp_path: Path) -> None:
    folder = put("gpt2", "hf", tmp_path)
    raw, config = (folder / "model.safetensors").read_bytes(), (folder / "config.json").read_text()
    for damaged in (raw[:-8], raw[:100], b"\xff" * 8 + raw, b""):
        (folder / "model.safetensors").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="damaged or not a safetensors file"):
            convert(folder, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        convert(folder, tmp_path / "out")
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="in several files"):
        convert(folder, tmp_path / "out")
    for damaged in (config[:-3], "[1]", "[" * 100_000, "\udcff".encode("utf-8", "surrogatepass")):
        (folder / "config.json").write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
        with pytest.raises(CheckpointError, match=r"config\.json"):
            convert(folder, tmp_path / "out")


def test_plain_safetensors_that_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    weights = {"a": torch.ones(2)}
    long = json.dumps(
        {"position": "rope", "n_layer": 1, "n_head": 1, "n_embd": 2, "vocab_size": 2, "block_size": 10**12}
    )
    one_layer = {"transformer.h.0.mlp.c_fc.weight": torch.ones(8, 2)}
    for metadata, tensors, sentence in (
        (None, weights, "does not say what model it is"),
        ({"fastchargpt.config": "[1]"}, weights, "is no JSON object"),
        ({"fastchargpt.config": "{"}, weights, "is damaged"),
        ({"fastchargpt.config": '{"n_layers": 2}'}, weights, "did you mean 'n_layer'"),
        ({"fastchargpt.config": "{}"}, weights, "describes 12 layers and holds the weights of 0"),
        ({"fastchargpt.config": long}, one_layer, "claims a block_size of 1000000000000"),
        ({"fastchargpt.config": "{}", "fastchargpt.tokenizer": '{"format": 1}'}, weights, "not a tokenizer"),
    ):
        save_file(tensors, tmp_path / "model.safetensors", metadata=metadata)
        with pytest.raises(CheckpointError, match=sentence):
            convert(tmp_path / "model.safetensors", tmp_path / "out")


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
