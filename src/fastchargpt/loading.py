"""A trained model, ready to use, from its folder."""

import os

import torch

from fastchargpt.checkpoint import Checkpoint, load_checkpoint
from fastchargpt.errors import CheckpointError
from fastchargpt.model import GPT
from fastchargpt.tokenizers import Tokenizer, load_tokenizer

__all__ = ["load", "restore"]


def load(folder: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer | None]:
    """The model of a checkpoint, in evaluation mode, and its tokenizer (None where it has none).

    Args:
        folder: a checkpoint's folder, or a run's out dir: then its best checkpoint.
        device: where the model goes.

    Raises:
        CheckpointError: there is none, or it is damaged, foreign or of a later version.
        TokenizerError: its tokenizer is not one.
    """
    return restore(load_checkpoint(folder, device=device))


def restore(checkpoint: Checkpoint) -> tuple[GPT, Tokenizer | None]:
    """The model of a checkpoint already read, in evaluation mode, and its tokenizer; Raises as `load`."""
    try:
        model = GPT.from_state_dict(checkpoint.model_config, checkpoint.weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"the checkpoint's weights do not fit the model it describes: {reason}") from None
    tokenizer = None if checkpoint.tokenizer_json is None else load_tokenizer(checkpoint.tokenizer_json)
    return model.eval(), tokenizer
