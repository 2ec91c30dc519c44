"""The notebook's bigram model: the next token depends on the current one alone."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["BigramLanguageModel"]


class BigramLanguageModel(nn.Module):
    """A table of next-token logits, one row per token (the notebook's cell 16)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(vocab_size, vocab_size)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Logits (B, T, V) of every position and, with targets (B, T), their mean cross-entropy in nats per token."""
        logits_BTV = self.token_embedding_table(idx)
        if targets is None:
            return logits_BTV, None
        return logits_BTV, F.cross_entropy(logits_BTV.flatten(0, 1), targets.flatten(), ignore_index=-1)

    @torch.no_grad()
    def generate(self, idx: Tensor, max_new_tokens: int) -> Tensor:
        """Continue idx (B, T) to (B, T + max_new_tokens), drawing each token from the global random generator."""
        for _ in range(max_new_tokens):
            probs_BV = self(idx[:, -1:])[0][:, -1].softmax(dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs_BV, num_samples=1)), dim=1)
        return idx
