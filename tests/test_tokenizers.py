"""Tokenizers: the notebook's ids, exact round trips, whole characters from a stream, hostile text and files."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers, trainers

from fastchargpt import bpe
from fastchargpt.errors import TokenizerError
from fastchargpt.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer

SAMPLE = "First Citizen:\nBefore we proceed, hear me speak.\n\nAll:\nSpeak, speak. It's   you'll 42 naïve 中文 🙂\n"
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
bounded = settings(max_examples=50, deadline=None)


@pytest.fixture(scope="module")
def shakespeare() -> str:
    path = Path(os.environ.get("FASTCHARGPT_DATA_DIR", ""), "tinyshakespeare.txt")
    if not path.is_file():
        pytest.skip("needs tinyshakespeare.txt in $FASTCHARGPT_DATA_DIR")
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def trained() -> BPETokenizer:
    return BPETokenizer.train(SAMPLE * 20, 300)


# --- characters ---------------------------------------------------------------------------------------------------


def test_notebook_ids(shakespeare: str) -> None:
    tokenizer = CharTokenizer.from_text(shakespeare)
    ids = tokenizer.encode("Hello World this is GPT")
    assert (len(shakespeare), tokenizer.vocab_size) == (1_115_394, 65)
    assert ids.tolist() == [20, 43, 50, 50, 53, 1, 35, 53, 56, 50, 42, 1, 58, 46, 47, 57, 1, 47, 57, 1, 19, 28, 32]
    assert ids.dtype == np.uint8
    assert tokenizer.encode(shakespeare)[:18].tolist() == [
        *(18, 47, 56, 57, 58, 1, 15, 47, 58),
        *(47, 64, 43, 52, 10, 0, 14, 43, 44),
    ]
    assert tokenizer.decode(tokenizer.encode(shakespeare)) == shakespeare


@bounded
@given(UNICODE.filter(bool))
def test_char_equals_the_notebooks_dict(text: str) -> None:
    chars = sorted(set(text))
    stoi = {char: i for i, char in enumerate(chars)}
    tokenizer = CharTokenizer.from_text(text)
    assert tokenizer.chars == "".join(chars)
    assert tokenizer.encode(text).tolist() == [stoi[char] for char in text]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("size", [1, 2, 255, 256, 257, 300, 65_535, 65_536, 65_537])
def test_char_dtype_and_every_id_at_the_borders(size: int) -> None:
    chars = [chr(i + (0x800 if i >= 0xD800 else 0)) for i in range(size)]
    tokenizer = CharTokenizer(list(reversed(chars)))
    ids = tokenizer.encode("".join(chars))
    assert ids.dtype == (np.uint8 if size <= 256 else np.uint16 if size <= 65_536 else np.uint32)
    assert ids.tolist() == list(reversed(range(size)))
    assert tokenizer.decode(ids) == "".join(chars)
    plain = tokenizer.encode(chars[0] * 3)  # latin text under a vocabulary that bytes cannot number
    assert plain.tolist() == [size - 1] * 3
    assert plain.dtype == ids.dtype


@pytest.mark.parametrize("filler", ["a", "é", "ж"])
@pytest.mark.parametrize("at", [0, 5, 200_000])
@pytest.mark.parametrize("unknown", ["~", "ÿ", "中", "\U0010ffff"])
def test_unknown_character_is_named_with_its_place(filler: str, at: int, unknown: str) -> None:
    tokenizer = CharTokenizer("a?éж")
    text = filler * at + unknown + filler * 7 + "0"
    with pytest.raises(TokenizerError, match=rf"U\+{ord(unknown):04X}\) at position {at} .*unknown='replace'"):
        tokenizer.encode(text)
    assert tokenizer.with_unknown("replace").decode(tokenizer.with_unknown("replace").encode(text)) == (
        filler * at + "?" + filler * 7 + "?"
    )


@pytest.mark.parametrize(("chars", "stand_in"), [("a?\ufffd ", "\ufffd"), ("a? ", "?"), ("a ", " "), ("ab", "a")])
def test_replacement_is_well_defined(chars: str, stand_in: str) -> None:
    tokenizer = CharTokenizer(chars, unknown="replace")
    assert tokenizer.replacement == stand_in
    assert tokenizer.decode(tokenizer.encode("aZ")) == "a" + stand_in


@pytest.mark.parametrize("chars", ["", [], "aba", ["ab"], [""], [1], "a\ud800", "b" * 1_000_000])
def test_a_bad_vocabulary_is_refused(chars: object) -> None:
    with pytest.raises(TokenizerError):
        CharTokenizer(chars)  # type: ignore[arg-type]


def test_encoded_arrays_are_writable_and_torch_takes_them() -> None:
    for tokenizer in (CharTokenizer.from_text(SAMPLE), CharTokenizer.from_text("cia"), ByteTokenizer()):
        ids = tokenizer.encode("cia")
        ids[0] = ids[1]
        torch.from_numpy(ids)


# --- every tokenizer ----------------------------------------------------------------------------------------------


def every_tokenizer() -> list[Tokenizer]:
    return [CharTokenizer.from_text(SAMPLE), ByteTokenizer(), BPETokenizer.train(SAMPLE * 20, 300)]


EVERY = pytest.mark.parametrize("tokenizer", every_tokenizer(), ids=lambda t: t.name)


@EVERY
def test_round_trip_through_json_and_disk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    for again in (load_tokenizer(path), load_tokenizer(str(tmp_path)), load_tokenizer(tokenizer.to_json())):
        assert again == tokenizer
        assert hash(again) == hash(tokenizer)
        assert again.encode(SAMPLE).tolist() == tokenizer.encode(SAMPLE).tolist()
    header = json.loads(tokenizer.to_json())
    assert (header["format"], header["version"], header["kind"]) == ("fastchargpt.tokenizer", 1, tokenizer.name)
    assert pickle.loads(pickle.dumps(tokenizer)) == tokenizer


@EVERY
def test_decode_takes_sequences_arrays_and_tensors(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(SAMPLE)
    for form in (ids.tolist(), tuple(ids.tolist()), ids, ids.astype(np.int64), torch.tensor(ids.tolist())):
        assert tokenizer.decode(form) == SAMPLE
    assert tokenizer.decode([]) == tokenizer.decode(torch.tensor([])) == ""
    assert tokenizer.encode("").size == 0
    assert tokenizer.encode("").dtype == ids.dtype


@EVERY
@pytest.mark.parametrize("bad", [[0, 10**6], [-1], [2**70], [0.5], [True], [[0, 1]], [[0], [1, 2]], ["a"], 3])
def test_decode_refuses_what_is_no_token(tokenizer: Tokenizer, bad: object) -> None:
    with pytest.raises(TokenizerError, match="token"):
        tokenizer.decode(bad)  # type: ignore[arg-type]


@EVERY
@pytest.mark.parametrize("prefix", ["", "First", "中" * 3, "a" * 300_000])
def test_lone_surrogates_are_refused_with_their_place(tokenizer: Tokenizer, prefix: str) -> None:
    known = CharTokenizer("aFirst中") if tokenizer.name == "char" else tokenizer
    with pytest.raises(TokenizerError, match=f"surrogate .* at position {len(prefix)},"):
        known.encode(prefix + "\udc80" + prefix)
    with pytest.raises(TokenizerError, match=f"surrogate .* at position {len(prefix)},"):
        CharTokenizer.from_text(prefix + "\udc80")


@EVERY
def test_text_must_be_str(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="must be a str"):
        tokenizer.encode(b"abc")  # type: ignore[arg-type]


@bounded
@given(UNICODE)
def test_bytes_and_bpe_round_trip_any_text(text: str) -> None:
    small = BPETokenizer([[104, 101], [256, 108], [195, 169]])
    for tokenizer in (ByteTokenizer(), small):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert ByteTokenizer().encode(text).tobytes() == text.encode()


@bounded
@given(st.lists(st.integers(0, 258)), st.text(max_size=30))
def test_the_stream_equals_decode_and_never_cuts_a_character(noise: list[int], text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    for tokenizer in (ByteTokenizer(), BPETokenizer([[104, 101], [195, 169], [169, 195]])):
        ids = [i for i in noise if i < tokenizer.vocab_size]
        stream = tokenizer.stream_decoder()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
        pieces = [stream.push(token) for token in tokenizer.encode(text).tolist()]
        assert "".join(pieces) == text  # nothing is left for flush, and nothing was replaced
        assert stream.flush() == ""


def test_stream_of_characters_and_its_refusals() -> None:
    stream = CharTokenizer("aé🙂").stream_decoder()
    assert [stream.push(i) for i in (2, 1, 0)] == ["🙂", "é", "a"]
    assert stream.push(torch.tensor(1)) == "é"  # type: ignore[arg-type]
    with pytest.raises(TokenizerError, match="token id 3"):
        stream.push(3)
    with pytest.raises(TokenizerError, match="token id -1"):
        stream.push(-1)


# --- BPE ----------------------------------------------------------------------------------------------------------


def test_bpe_equals_hugging_face(trained: BPETokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same text into the library's own training and encoding gives the same pieces, however the text is cut."""
    peer = HFTokenizer(models.BPE())
    peer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    peer.train_from_iterator(
        [SAMPLE * 20], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    assert trained.vocab_size == 300
    text = SAMPLE * 3 + "  tabs\t\n\n \n we're 3.14 \r\n x" * 5
    byte_of = {char: byte for byte, char in enumerate(bpe._byte_characters())}
    expected = [bytes(byte_of[char] for char in piece) for piece in peer.encode(text).tokens]
    assert [trained._table[i] for i in trained.encode(text)] == expected
    monkeypatch.setattr(bpe, "PIECE_CHARS", 20)
    assert [trained._table[i] for i in trained.encode(text)] == expected
    monkeypatch.setattr(bpe, "PIECE_CHARS", 3)
    assert trained.decode(trained.encode(text)) == text


def test_bpe_gives_fewer_tokens_and_special_looking_text_is_only_text(trained: BPETokenizer) -> None:
    assert len(trained.encode(SAMPLE)) < len(SAMPLE.encode()) * 0.8
    for text in ("<|endoftext|>", "[UNK]", "\0\r\n\ufeff", "a" * 250_000):
        assert trained.decode(trained.encode(text)) == text


def test_bpe_two_merges_may_spell_the_same_token() -> None:
    tokenizer = BPETokenizer([[98, 99], [97, 256], [97, 98], [258, 99], [257, 97]])  # bc, abc, ab, ab+c, abca
    assert tokenizer.vocab_size == 256 + 4
    assert tokenizer.decode(tokenizer.encode("xabcabc")) == "xabcabc"
    assert tokenizer.decode([257]) == "abc"


@pytest.mark.parametrize("size", [255, 0, -1, 10**7, 300.0, True, "300"])
def test_bpe_vocabulary_size_is_checked(size: object) -> None:
    with pytest.raises(TokenizerError, match="256"):
        BPETokenizer.train("abc", size)  # type: ignore[arg-type]


def test_bpe_short_text_stops_when_nothing_is_left_to_merge() -> None:
    assert BPETokenizer.train("ab ab ab", 1000).vocab_size < 300


# --- hostile files ------------------------------------------------------------------------------------------------


def as_file(**fields: object) -> str:
    return json.dumps({"format": "fastchargpt.tokenizer", "version": 1, **fields})


HOSTILE = {
    "empty": ("", "damaged"),
    "not json": ("{nope", "damaged"),
    "a list": ("[]", "not a tokenizer"),
    "foreign": ('{"model": {"type": "BPE"}}', "Hugging Face"),
    "deep": ('{"a":' * 100_000, "damaged"),
    "deep list": ("[" * 1_000_000, "damaged"),
    "huge integer": ('{"version": ' + "9" * 10_000 + "}", "damaged"),
    "NaN": (as_file(kind="byte").replace("1,", "NaN,"), "damaged"),
    "newer": (as_file(kind="byte").replace('"version": 1', '"version": 2'), "version 2"),
    "version true": (as_file(kind="byte").replace('"version": 1', '"version": true'), "version True"),
    "unknown kind": (as_file(kind="chr"), "did you mean 'char'"),
    "kind list": (as_file(kind=["char"]), "unknown tokenizer kind"),
    "no kind": (as_file(), "unknown tokenizer kind"),
    "missing field": (as_file(kind="char", chars="ab"), "unknown"),
    "extra field": (as_file(kind="byte", extra=1), "extra"),
    "chars number": (as_file(kind="char", chars=5, unknown="error"), "chars must be"),
    "chars twice": (as_file(kind="char", chars="aa", unknown="error"), "more than once"),
    "chars surrogate": (as_file(kind="char", chars="a\ud800", unknown="error"), "surrogate"),
    "policy": (as_file(kind="char", chars="ab", unknown={}), "must be 'error' or 'replace'"),
    "merges text": (as_file(kind="bpe", merges="ab"), "merges must be"),
    "merge of three": (as_file(kind="bpe", merges=[[1, 2, 3]]), "pair"),
    "merge of text": (as_file(kind="bpe", merges=[["a", "b"]]), "pair"),
    "merge ahead": (as_file(kind="bpe", merges=[[256, 1]]), "no earlier"),
    "merge negative": (as_file(kind="bpe", merges=[[-1, 1]]), "pair"),
    "doubling": (as_file(kind="bpe", merges=[[97, 97], *([i, i] for i in range(256, 300))]), "longer than"),
    "large": (as_file(kind="char", chars="a" * (17 * 2**20), unknown="error"), "larger"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_one_sentence(name: str, tmp_path: Path) -> None:
    text, says = HOSTILE[name]
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(TokenizerError, match=says) as caught:
        load_tokenizer(path)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"\x80\x04\x95", b"\xff\xfe{\0", pickle.dumps({"stoi": {}})])
def test_binary_files_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "meta.pkl"
    path.write_bytes(content)
    with pytest.raises(TokenizerError):
        load_tokenizer(path)


def test_missing_tokenizer_and_nul_in_the_name(tmp_path: Path) -> None:
    for source in (tmp_path / "none.json", tmp_path, "a\0b"):
        with pytest.raises(TokenizerError, match="cannot be read"):
            load_tokenizer(source)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["chars", "merges", "kind"]), inner),
    max_leaves=8,
)


@bounded
@given(
    st.sampled_from(["char", "byte", "bpe", "x"]),
    st.dictionaries(st.sampled_from(["chars", "unknown", "merges"]), json_values),
)
def test_any_json_either_loads_or_says_why(kind: str, fields: dict[str, object]) -> None:
    try:
        tokenizer = load_tokenizer(as_file(kind=kind, **fields))
    except TokenizerError:
        return
    assert load_tokenizer(tokenizer.to_json()) == tokenizer
