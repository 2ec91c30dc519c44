"""Attention kernels: the readable reference (naive), torch's fused attention (sdpa) and our own in Triton (flash).

`naive` and `sdpa` import at once; `flash` and everything below it needs Triton, so it is imported on first use
(`fastchargpt.attention` does that). All of them take the same tensors: q (B, Hq, Tq, D), k and v (B, Hkv, Tk, D).
"""

if __name__ != "fastchargpt.kernels":
    raise ImportError(
        "this folder is fastchargpt.kernels, not a top-level package 'kernels' (that name is Hugging Face's): "
        "install fastchargpt and import fastchargpt.kernels"
    )

__all__: list[str] = []
