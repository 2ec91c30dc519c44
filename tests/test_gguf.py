"""GGUF: what its own readers make of our files, theirs read here, and files that lie."""

import json
import struct
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peers import peer
from torch import Tensor

from fastchargpt import GPT, ByteTokenizer, CharTokenizer, GPTConfig, load
from fastchargpt.bpe import BPETokenizer
from fastchargpt.checkpoint import Checkpoint, save_checkpoint
from fastchargpt.convert import convert
from fastchargpt.convert.gguf import read_gguf, write_gguf
from fastchargpt.convert.gguf_gpt2 import weights_to_gguf
from fastchargpt.convert.readers import read
from fastchargpt.convert.writers import write
from fastchargpt.errors import CheckpointError, ConfigError
from fastchargpt.tokenizers import Tokenizer

BLOCK = 24
CHARS = CharTokenizer("\n .,abcdefg€é\\\t\r")
BPE = BPETokenizer.train("abcabc abcab ab " * 9, 264)
# a tokenizer, the model's vocabulary, whether its embeddings are tied, and a text
CASES: dict[str, tuple[Tokenizer, int, bool, str]] = {
    "char": (CHARS, CHARS.vocab_size, True, "ab.\n\tc€é \\ b\r"),
    "char, padded and untied": (CharTokenizer("\n .,abcdefg€é"), 20, False, "ab €\n"),
    "byte": (ByteTokenizer(), 256, True, "ab é\n\n  x"),
    "bpe, padded": (BPE, 300, True, "abcabc ab\n é"),
}


def example(tokenizer: Tokenizer | None, vocab_size: int, tied: bool, **fields: Any) -> tuple[GPT, Checkpoint]:
    config = GPTConfig(
        n_layer=2,
        n_head=2,
        n_embd=32,
        block_size=BLOCK,
        vocab_size=vocab_size,
        tie_weights=tied,
        **{"activation": "gelu_tanh", **fields},
    )
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    text = None if tokenizer is None else tokenizer.to_json()
    return model, Checkpoint(model_config=config, weights=model.state_dict(), tokenizer_json=text)


def put(name: str, folder: Path) -> tuple[Path, GPT, Tensor, Checkpoint]:
    """A case's file, its model, and the tokens of its text."""
    tokenizer, vocab_size, tied, text = CASES[name]
    model, checkpoint = example(tokenizer, vocab_size, tied)
    path = folder / "model.gguf"
    write(checkpoint, path, "gguf", [], home=path)
    return path, model, torch.from_numpy(tokenizer.encode(text).astype("int64"))[None], checkpoint


@pytest.mark.parametrize("name", CASES)
def test_back_again(name: str, tmp_path: Path) -> None:
    path, _, _, checkpoint = put(name, tmp_path)
    notes: list[str] = []
    found = read(path, "gguf", notes)
    assert not notes
    assert found.tokenizer_json == checkpoint.tokenizer_json
    assert found.model_config == checkpoint.model_config
    assert found.weights.keys() == checkpoint.weights.keys()
    for weight, tensor in checkpoint.weights.items():
        assert torch.equal(found.weights[weight], tensor)


@pytest.mark.parametrize("name", CASES)
def test_the_gguf_package_reads_it(name: str, tmp_path: Path) -> None:
    gguf = peer("gguf")
    path, model, _, _ = put(name, tmp_path)
    found = gguf.GGUFReader(path)
    tensors = {tensor.name: np.asarray(tensor.data) for tensor in found.tensors}
    state = model.state_dict()
    assert ("output.weight" in tensors) != CASES[name][2]
    assert np.array_equal(tensors["token_embd.weight"], state["transformer.wte.weight"].numpy())
    assert np.array_equal(tensors["blk.1.attn_qkv.weight"], state["transformer.h.1.attn.c_attn.weight"].numpy())
    assert np.array_equal(tensors["blk.0.ffn_down.bias"], state["transformer.h.0.mlp.c_proj.bias"].numpy())
    known = {str(item) for item in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2]}
    assert len(known) == 10  # the architecture still has the parts that we write
    assert found.get_field("general.architecture").contents() == "gpt2"
    assert found.get_field("gpt2.context_length").contents() == BLOCK
    assert len(found.get_field("tokenizer.ggml.tokens").contents()) == model.config.vocab_size
    assert len(set(found.get_field("tokenizer.ggml.tokens").contents())) == model.config.vocab_size


@pytest.mark.parametrize("name", CASES)
def test_transformers_computes_our_logits(name: str, tmp_path: Path) -> None:
    peer("gguf")
    transformers = peer("transformers")
    path, model, idx, _ = put(name, tmp_path)
    # its reader does not take the context length over
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, gguf_file=path.name, n_positions=BLOCK).eval()
    torch.testing.assert_close(theirs(idx).logits, model(idx, idx)[0], rtol=0, atol=1e-5)
    if "char" not in name:  # it has no tokenizer of characters
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
        assert tokenizer.encode(CASES[name][3]) == idx[0].tolist()


def _ask(address: str, path: str, **body: Any) -> Any:
    """What a llama.cpp server on this machine answers."""
    request = urllib.request.Request(address + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_runs_it(name: str, tmp_path: Path) -> None:
    xllamacpp = peer("xllamacpp", "xllamacpp")
    path, model, idx, _ = put(name, tmp_path)
    text, tokens = CASES[name][3], idx[0].tolist()
    asked = xllamacpp.CommonParams()
    asked.model.path, asked.n_ctx, asked.n_parallel, asked.port, asked.verbosity = str(path), BLOCK, 1, 0, -1
    asked.cpuparams.n_threads, asked.warmup, asked.fit_params = 1, False, False
    server = xllamacpp.Server(asked)
    address = server.listening_address
    assert _ask(address, "/tokenize", content=text, add_special=False)["tokens"] == tokens
    assert _ask(address, "/detokenize", tokens=tokens)["content"] == text
    ours = model(idx, idx)[0][0].log_softmax(-1)
    for count in range(1, len(tokens) + 1):
        # the token that it writes is chosen here, as it tells no figures of one that is half a character
        words = {"n_predict": 1, "n_probs": 1000, "temperature": 0, "logit_bias": [[tokens[0], 1000]]}
        said = _ask(address, "/completion", prompt=tokens[:count], **words)
        theirs = {row["id"]: row["logprob"] for row in said["completion_probabilities"][0]["top_logprobs"]}
        found = torch.tensor([theirs[token] for token in range(model.config.vocab_size)])
        # its GELU is a table of half-precision numbers, and so is its key/value cache
        torch.testing.assert_close(found, ours[count - 1], rtol=0, atol=5e-3)
        assert found.argmax() == ours[count - 1].argmax()


def test_without_a_vocabulary_or_biases(tmp_path: Path) -> None:
    model, checkpoint = example(None, 13, True, bias=False, dropout=0.25)
    save_checkpoint(tmp_path / "ours", checkpoint)
    done = convert(tmp_path / "ours", tmp_path / "model.gguf", check=True)
    assert done.target_format == "gguf"
    assert [note.split(":")[0].split(",")[0] for note in done.notes] == [
        "no vocabulary in the file",
        "the dropout rate of 0.25 is left behind",
    ]
    convert(tmp_path / "model.gguf", tmp_path / "back", check=True)
    idx = torch.arange(13)[None]
    torch.testing.assert_close(load(tmp_path / "back")[0](idx, idx)[0], model(idx, idx)[0], rtol=0, atol=1e-6)
    fields = read_gguf(tmp_path / "model.gguf")[0]
    assert (fields["tokenizer.ggml.model"], fields["gpt2.vocab_size"]) == ("none", 13)


def test_other_activations_are_refused_with_the_way_out(tmp_path: Path) -> None:
    for activation in ("gelu", "relu", "relu2"):
        _, checkpoint = example(None, 13, True, activation=activation)
        with pytest.raises(ConfigError, match=rf"activation='{activation}'.*train it with --activation gelu_tanh"):
            write(checkpoint, tmp_path / "model.gguf", "gguf", [], home=tmp_path)
    assert not list(tmp_path.iterdir())


def foreign(gguf: Any, path: Path, dtype: torch.dtype, **changes: Any) -> dict[str, Tensor]:
    """A file that the `gguf` package wrote, as llama.cpp's converter does."""
    _, checkpoint = example(None, 13, True)
    fields, tensors = weights_to_gguf(checkpoint.model_config, checkpoint.weights, None)
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_custom_alignment(64)
    for name, value in {**fields, **changes}.items():
        if name != "general.architecture":
            {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](name, value)
    writer.add_array("some.numbers", [1, 2, 3])
    writer.add_array("some.words", ["a", "bc"])
    for name, tensor in tensors.items():
        if tensor.dim() == 1 or dtype == torch.float32:
            writer.add_tensor(name, tensor.numpy())
        elif dtype == torch.float16:
            writer.add_tensor(name, tensor.half().numpy())
        else:
            raw = tensor.bfloat16().view(torch.uint8).numpy()
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dict(checkpoint.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_what_the_gguf_package_wrote(dtype: torch.dtype, tmp_path: Path) -> None:
    gguf = peer("gguf")
    weights = foreign(gguf, tmp_path / "theirs.gguf", dtype)
    notes: list[str] = []
    found = read(tmp_path / "theirs.gguf", "gguf", notes)
    assert "no vocabulary" in notes[0]
    for name, tensor in weights.items():
        expected = tensor.to(dtype).float() if tensor.dim() == 2 else tensor
        assert torch.equal(found.weights[name], expected)


# ----------------------------------------------------------------------------------------------------------- hostile

FIELDS = {"general.architecture": "gpt2"}


def head(tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def tensor_info(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


LIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "damaged or not a GGUF"),
    "another magic": (lambda: b"GGML" + bytes(60), "does not begin with GGUF"),
    "version 1": (lambda: head(version=1), "version 1, and fastchargpt reads 3"),
    "the other byte order": (lambda: b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 50331648"),
    "its head alone": (lambda: b"GGUF\3\0", "damaged"),
    "2^63 fields": (lambda: head(fields=2**63), "expected at 24"),
    "2^63 tensors": (lambda: head(tensors=2**63), "expected at 24"),
    "a text of 2^63 bytes": (lambda: head(fields=1) + struct.pack("<Q", 2**63), "9223372036854775808 bytes"),
    "an array of 2^60 numbers": (lambda: head(fields=1) + text("a") + struct.pack("<IIQ", 9, 4, 2**60), "bytes are"),
    "an array of 2^60 texts": (lambda: head(fields=1) + text("a") + struct.pack("<IIQ", 9, 8, 2**60), "bytes are"),
    "an array of arrays": (lambda: head(fields=1) + text("a") + struct.pack("<IIQ", 9, 9, 1), "array of the type 9"),
    "an unknown type": (lambda: head(fields=1) + text("a") + struct.pack("<I", 77), "unknown type 77"),
    "no UTF-8": (lambda: head(fields=1) + struct.pack("<Q", 2) + b"\xff\xff" + bytes(12), "damaged"),
    "no alignment": (
        lambda: head(fields=1) + text("general.alignment") + struct.pack("<II", 4, 0),
        "an alignment of 0",
    ),
    "9 dimensions": (lambda: head(tensors=1) + tensor_info("a", *[1] * 9), "tensor of 9 dimensions"),
    "no elements": (lambda: head(tensors=1) + tensor_info("a", 4, 0) + bytes(99), "empty tensor 'a'"),
    "2^120 elements": (lambda: head(tensors=1) + tensor_info("a", 2**60, 2**60), "more bytes than it has"),
    "beyond the end": (lambda: head(tensors=1) + tensor_info("a", 4, offset=2**63) + bytes(99), "beyond the end"),
    "one name twice": (lambda: head(tensors=2) + 2 * tensor_info("a", 4) + bytes(99), "stands twice"),
    "numbers that are shared": (
        lambda: head(tensors=99) + b"".join(tensor_info(f"t{i}", 64) for i in range(99)) + bytes(1000),
        "more bytes than it has",
    ),
    "quantised": (lambda: head(tensors=1) + tensor_info("a", 32, kind=2) + bytes(99), "GGUF's type 2, quantised"),
    "another model": (
        lambda: head(fields=1) + text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        "general.architecture='llama'",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_files_that_lie(name: str, tmp_path: Path) -> None:
    make, sentence = LIES[name]
    (tmp_path / "model.gguf").write_bytes(make())
    with pytest.raises(CheckpointError, match=sentence) as caught:
        convert(tmp_path / "model.gguf", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(tmp_path))
    assert not (tmp_path / "out").exists()


def test_cut_off_anywhere(tmp_path: Path) -> None:
    path = put("char", tmp_path)[0]
    whole = path.read_bytes()
    for length in [*range(0, 2600, 37), len(whole) - 32, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read(path, "gguf", [])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"gpt2.block_count": 10**6}, "describes 1000000 layers and holds the weights of 2"),
        ({"gpt2.block_count": "2"}, "n_layer must be a whole number"),
        ({"gpt2.context_length": 25}, r"transformer.wpe.weight has the shape \(24, 32\)"),
        ({"gpt2.attention.head_count": 5}, "n_embd must be a multiple of n_head"),
        ({"gpt2.attention.layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06|layer_norm_epsilon=9.9"),
        ({"gpt2.attention.layer_norm_epsilon": float("nan")}, "layer_norm_epsilon=nan"),
        ({"gpt2.feed_forward_length": 64}, "feed_forward_length=64"),
        ({"fastchargpt.tokenizer": "x"}, "no usable vocabulary"),
        ({"fastchargpt.tokenizer": '{"kind": "byte"}'}, "no usable vocabulary|256 tokens and the model 13"),
    ],
)
def test_fields_that_do_not_fit(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    _, checkpoint = example(None, 13, True)
    fields, tensors = weights_to_gguf(checkpoint.model_config, checkpoint.weights, None)
    write_gguf(tmp_path / "model.gguf", {**fields, **changes}, tensors)
    with pytest.raises(CheckpointError, match=sentence):
        read(tmp_path / "model.gguf", "gguf", [])


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    _, checkpoint = example(None, 13, True)
    fields, tensors = weights_to_gguf(checkpoint.model_config, checkpoint.weights, None)
    for changed, sentence in (
        ({**tensors, "blk.0.attn_q.weight": torch.ones(4)}, "'blk.0.attn_q.weight' that llama.cpp's gpt2 does not"),
        (
            {name: tensor for name, tensor in tensors.items() if name != "output_norm.bias"},
            "lacks the weight transformer.ln",
        ),
        (
            {name: tensor for name, tensor in tensors.items() if name != "token_embd.weight"},
            "lacks the weight token_embd",
        ),
        ({**tensors, "blk.01.ffn_up.bias": torch.ones(4)}, "'blk.01.ffn_up.bias' that llama.cpp's"),
    ):
        write_gguf(tmp_path / "model.gguf", fields, changed)
        with pytest.raises(CheckpointError, match=sentence):
            read(tmp_path / "model.gguf", "gguf", [])
