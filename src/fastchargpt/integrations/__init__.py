"""Doors for other people's code: nanoGPT, the lecture, GPT-2 and transformers, and flash-attention's shape of call.

Nothing here is imported until it is asked for by name, `from fastchargpt.integrations.nanogpt import GPT, GPTConfig`.
"""

__all__: list[str] = []
