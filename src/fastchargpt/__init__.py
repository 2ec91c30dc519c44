"""fastchargpt: the fastest way to train and sample a small GPT."""

__version__ = "0.1.0"
