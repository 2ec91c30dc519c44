"""Attention kernels: the readable reference (naive), torch's fused attention (sdpa) and our own in Triton (flash)."""

if __name__ != "fastchargpt.kernels":
    raise ImportError(
        "this folder is fastchargpt.kernels, not a top-level package 'kernels' (that name is Hugging Face's): "
        "install fastchargpt and import fastchargpt.kernels"
    )
