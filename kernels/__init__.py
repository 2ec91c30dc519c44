"""Attention kernels: the readable reference (naive), torch's fused attention (sdpa) and our own in Triton (flash).

`naive` and `sdpa` import at once; `flash` and everything below it needs Triton, so it is imported on first use
(`fastchargpt.attention` does that). All of them take the same tensors: q (B, Hq, Tq, D), k and v (B, Hkv, Tk, D).
"""

if __name__ != "fastchargpt.kernels":
    # With the checkout's root on the path (`python -m` there) `import kernels` finds this folder. Whoever says that,
    # transformers for one, means Hugging Face's package: it gets that, or a package with no version and nothing in it.
    import importlib.machinery
    import importlib.util
    import os
    import sys

    _root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    _others = [entry for entry in sys.path if os.path.realpath(entry or ".") != _root]
    _theirs = importlib.machinery.PathFinder.find_spec(__name__, _others)
    if _theirs is not None and _theirs.loader is not None:
        sys.modules[__name__] = importlib.util.module_from_spec(_theirs)  # which is what the import then gives
        _theirs.loader.exec_module(sys.modules[__name__])
    else:
        globals()["__path__"] = []

        def __getattr__(name: str) -> object:
            if name.startswith("__"):
                raise AttributeError(name)
            raise ImportError(
                "this folder is fastchargpt.kernels, not a top-level package 'kernels' (that name is Hugging Face's): "
                f"install fastchargpt and import fastchargpt.kernels, or run from another folder (wanted: {name})"
            )


__all__: list[str] = []
