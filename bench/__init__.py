"""The benchmark suite: pytest-benchmark runs it, nobody is ranked before being checked (see README.md beside this).

Installed as fastchargpt.bench, so that `fastchargpt bench` works from a wheel as from a checkout.
"""

__all__: list[str] = []
