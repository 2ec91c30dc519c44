"""Tokenizers between our JSON and what others keep: Hugging Face's tokenizer.json, nanoGPT's meta.pkl, a plain text."""

import json
from pathlib import Path
from typing import Any

from fastchargpt.errors import CheckpointError, TokenizerError
from fastchargpt.integrations.untrusted import read_json
from fastchargpt.nanogpt_data import read_meta
from fastchargpt.tokenizers import BPETokenizer, ByteTokenizer, CharTokenizer, Tokenizer, load_tokenizer

__all__ = ["check_vocabulary", "from_hugging_face", "read_vocabulary", "to_hugging_face"]

# every character alone, newlines too
ONE_CHARACTER = r"[\s\S]"


def read_vocabulary(path: Path) -> Tokenizer:
    """The tokenizer of a file or folder: our tokenizer.json, Hugging Face's, nanoGPT's meta.pkl, or the text (.txt)
    whose sorted characters it is, as in the lecture.

    Raises:
        TokenizerError, CorpusError, CheckpointError: it cannot be read, or is none of them.
    """
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.suffix == ".pkl":
        return read_meta(path)
    if path.suffix == ".txt":
        try:
            with path.open(encoding="utf-8", newline="") as file:
                return CharTokenizer.from_text(file.read())
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path} cannot be read as a text ({error})") from None
    if "model" in read_json(path):
        found = from_hugging_face(path)
        if found is None:
            raise TokenizerError(
                f"{path} is not a tokenizer that fastchargpt has: characters, bytes and byte-level BPE"
            )
        return found
    return load_tokenizer(path)


def to_hugging_face(tokenizer: Tokenizer) -> str:
    """The tokenizer.json that transformers' PreTrainedTokenizerFast reads, with the same ids for every text."""
    from tokenizers import Regex, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    if isinstance(tokenizer, CharTokenizer):
        vocabulary = {char: i for i, char in enumerate(tokenizer.chars)}
        if tokenizer.unknown == "replace":
            engine = Engine(models.WordLevel(vocabulary, unk_token=tokenizer.replacement))
        else:
            engine = Engine(models.WordLevel(vocabulary))
        engine.pre_tokenizer = pre_tokenizers.Split(Regex(ONE_CHARACTER), "isolated")
        engine.decoder = decoders.Fuse()
        return str(engine.to_str())
    bpe = tokenizer if isinstance(tokenizer, BPETokenizer) else BPETokenizer([])
    engine = Engine.from_str(bpe._get_engine().to_str())
    engine.decoder = decoders.ByteLevel()
    return str(engine.to_str())


def from_hugging_face(path: Path) -> Tokenizer | None:
    """Our tokenizer from a Hugging Face tokenizer.json, or None where ours cannot give the same ids.

    Those that `to_hugging_face` writes come back; GPT-2's own does not: its ids are not in the order of its merges.

    Raises:
        CheckpointError: the file cannot be read.
    """
    fields = read_json(path)
    try:
        tokenizer = _build(fields)
        if tokenizer is None:
            return None
        # whatever else the file says (a normalizer, a prefix space) would show here
        ours, theirs = json.loads(to_hugging_face(tokenizer)), fields
        same = all(
            ours.get(name) == theirs.get(name) for name in ("model", "pre_tokenizer", "normalizer", "added_tokens")
        )
        return tokenizer if same else None
    # whatever the JSON holds where its parts are looked for: nothing there, or something else
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError, TokenizerError):
        return None


def _build(fields: dict[str, Any]) -> Tokenizer | None:
    model = fields["model"]
    vocabulary: dict[str, int] = model["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    if [vocabulary[token] for token in tokens] != list(range(len(tokens))):
        return None
    if model["type"] == "WordLevel":
        return CharTokenizer(tokens, "replace" if model["unk_token"] in vocabulary else "error")
    if model["type"] != "BPE":
        return None
    if not model["merges"]:
        return ByteTokenizer()
    return BPETokenizer([(vocabulary[left], vocabulary[right]) for left, right in model["merges"]])


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int, source: object) -> None:
    """Refuse a tokenizer that knows more tokens than the model.

    Raises:
        CheckpointError: it does.
    """
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} tokens and the model {vocab_size}: "
            "they are not of one run"
        )
