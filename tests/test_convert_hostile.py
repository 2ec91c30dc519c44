"""Files of other formats that must be refused, in a sentence and without running."""

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_cases import SHAPE, example, put

from fastchargpt.convert import convert
from fastchargpt.errors import CheckpointError, FastchargptError


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
