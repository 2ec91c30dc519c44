"""What the doctor examines once torch imports: devices, Triton, attention, the automatic choices, speed, corpora."""

import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastchargpt.attention import causal_attention, explain_attention
from fastchargpt.choices import choose_compile, choose_engine
from fastchargpt.errors import BackendUnavailableError, CorpusError
from fastchargpt.finding import Finding, Status
from fastchargpt.hardware import peak_flops
from fastchargpt.kernels.availability import triton_problem
from fastchargpt.machine import cpu_name, first_line, memory_bytes, nvidia_driver
from fastchargpt.model import GPT
from fastchargpt.parity import attention_inputs, check_attention, forward_backward
from fastchargpt.precision import Precision, choose_device, choose_precision
from fastchargpt.presets import PRESETS
from fastchargpt.rehearsal import rehearse
from fastchargpt.roofline import measure_roof
from fastchargpt.timing import race

__all__ = ["examinations"]

# (B, H, T, D) of nanoGPT's CPU demo, of shakespeare-char and of GPT-2; fewer heads where each costs a second
SHAPES = [(12, 4, 64, 32), (64, 6, 256, 64), (8, 12, 1024, 64)]
CPU_SHAPES = [(12, 4, 64, 32), (4, 6, 256, 64), (1, 3, 1024, 64)]
SECONDS_PER_SHAPE = 0.4
COMPILERS = ("c++", "g++", "clang++") if sys.platform != "win32" else ("cl",)


def examinations(device_name: str = "auto") -> list[tuple[str, Callable[[], Iterable[Finding]]]]:
    """What there is to look at, cheapest first: (section, a call that looks).

    Raises:
        BackendUnavailableError, ConfigError: the device asked for is not one, or not there.
    """
    device = choose_device(device_name)
    precision = choose_precision("auto", device)
    return [
        ("device", lambda: _devices(device)),
        ("compiler", _compiler),
        ("triton", lambda: _triton(device, precision)),
        ("choices", lambda: _choices(device, precision)),
        ("training", lambda: _rehearsal(device, precision)),
        ("attention", lambda: _attention(device, precision.dtype)),
        ("speed", lambda: _speed(device, precision)),
        ("corpus", _corpora),
    ]


def _devices(chosen: torch.device) -> Iterator[Finding]:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    vector = torch.backends.cpu.get_cpu_capability()
    memory = f", {(memory_bytes() or 0) / 2**30:.1f} GiB memory" if memory_bytes() else ""
    yield Finding(
        section="device",
        status="ok",
        text=f"cpu: {cpu_name()}, {cores} cores, torch uses {threads} threads and {vector}{memory}",
        facts={"cpu": cpu_name(), "cores": cores, "threads": threads, "vector": vector, "memory_bytes": memory_bytes()},
    )
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        yield Finding(
            section="device",
            status="ok",
            text=f"cuda:{index}: {properties.name}, capability {properties.major}.{properties.minor}, "
            f"{total / 2**30:.1f} GiB memory ({free / 2**30:.1f} free), {properties.multi_processor_count} SMs",
            facts={
                "gpu": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": total,
                "free_bytes": free,
                "driver": nvidia_driver(),
            },
        )
    if not torch.cuda.is_available() and chosen.type == "cpu":
        driver = nvidia_driver()
        if torch.version.cuda is None and torch.version.hip is None and driver:
            yield Finding(
                section="device",
                status="note",
                text=f"there is an NVIDIA driver ({driver}), but this torch is built without CUDA",
                remedy="install a CUDA build of torch: https://pytorch.org/get-started/locally",
            )
        else:
            yield Finding(
                section="device", status="note", text="no GPU: everything runs on the CPU, without the Triton kernels"
            )


def _compiler() -> Iterator[Finding]:
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else COMPILERS:
        path = shutil.which(name)
        if path is not None:
            version = "cl" if name == "cl" else first_line([path, "--version"])
            yield Finding(section="compiler", status="ok", text=f"C++: {version}", facts={"compiler": version})
            return
    named = f"CXX names {Path(wanted).name}, which is not there" if wanted else "no C++ compiler on the path"
    yield Finding(
        section="compiler",
        status="note",
        text=f"{named}: on a CPU, steps run without torch.compile",
        remedy="install one (Debian: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)",
        facts={"compiler": None},
    )


def _triton(device: torch.device, precision: Precision) -> Iterator[Finding]:
    problem = triton_problem(device.type, device.index or 0)
    if problem is None:
        where = " (in Triton's interpreter, for tests only)" if device.type == "cpu" else ""
        yield Finding(
            section="triton", status="ok", text=f"the kernels run on {device}{where}", facts={"problem": None}
        )
        return
    remedy = ""
    if problem.startswith("Triton ") and ("not installed" in problem or "older than" in problem):
        remedy = "pip install 'triton>=3.5' (Linux), the version that your torch names"
    elif "C compiler" in problem:
        remedy = "install gcc or clang"
    yield Finding(
        section="triton", status="note", text=f"not used: {problem}", remedy=remedy, facts={"problem": problem}
    )


def _attention(device: torch.device, dtype: torch.dtype) -> Iterator[Finding]:
    """Each backend's errors and times at three shapes; the one that `auto` takes is what the default path needs."""
    shapes = SHAPES if device.type == "cuda" else CPU_SHAPES
    interpreted = device.type == "cpu" and triton_problem("cpu", 0) is None
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in ("naive", "sdpa", "triton")}
    refusals: dict[str, Exception] = {}
    chosen = ""
    for shape in shapes:
        inputs = attention_inputs(*shape, device=device, dtype=dtype)
        chosen = explain_attention(*inputs[:3]).split(":")[0]
        calls: dict[str, Callable[[], object]] = {}
        for name in [name for name in rows if name not in refusals]:
            if name == "triton" and interpreted and shape != shapes[0]:
                continue  # the interpreter takes minutes there, and its time says nothing

            def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, name: str = name) -> torch.Tensor:
                return causal_attention(q, k, v, backend=name)

            try:
                parity = check_attention(attend, inputs)
            except Exception as error:  # whatever a compiler or driver throws is what the report is for
                refusals[name] = error
                continue
            row = {"shape": list(shape), "output_error": parity.output, "gradient_error": parity.gradients}
            rows[name].append({**row, "right": parity.right, "ms": None})
            if not (name == "triton" and interpreted):
                calls[name] = lambda attend=attend, inputs=inputs: forward_backward(attend, *inputs)  # type: ignore[misc]
        for name, timing in race(
            calls, device, seconds=SECONDS_PER_SHAPE, warmup=0, min_rounds=3, max_rounds=50
        ).items():
            rows[name][-1]["ms"] = timing.median * 1e3
    for name, figures in rows.items():
        yield _judge_backend(name, figures, refusals.get(name), needed=name == chosen)


def _judge_backend(name: str, figures: list[dict[str, Any]], refusal: Exception | None, *, needed: bool) -> Finding:
    reason = None if refusal is None else " ".join(f"{type(refusal).__name__}: {refusal}".split())[:300]
    facts = {"backend": name, "shapes": figures, "refusal": reason, "auto": needed}
    if isinstance(refusal, BackendUnavailableError) and not needed:
        return Finding(section="attention", status="note", text=f"{name:<6} not available here", facts=facts)
    remedy = "please report this with the whole of `fastchargpt doctor --json`; until then use another --attention"
    if reason is not None:
        status: Status = "broken" if needed else "note"
        return Finding(
            section="attention", status=status, text=f"{name:<6} fails: {reason}", remedy=remedy, facts=facts
        )
    cells = []
    for row in figures:
        size = "x".join(map(str, row["shape"]))
        error = max(row["output_error"], row["gradient_error"], key=lambda share: (share != share, share))
        cells.append(
            f"{size} " + ("not timed" if row["ms"] is None else f"{row['ms']:.2f} ms") + f", error {error:.2f}"
        )
    if all(row["right"] for row in figures):
        text = f"{name:<6} {'; '.join(cells)}{'  (auto)' if needed else ''}"
        return Finding(section="attention", status="ok", text=text, facts=facts)
    return Finding(
        section="attention",
        status="broken" if needed else "note",
        text=f"{name:<6} is WRONG here: {'; '.join(cells)}",
        remedy=remedy,
        facts=facts,
    )


def _choices(device: torch.device, precision: Precision) -> Iterator[Finding]:
    preset = "shakespeare-char" if device.type == "cuda" else "modern-char-cpu"  # as `fastchargpt train` chooses
    yield Finding(
        section="choices", status="ok", text=f"device {device}, preset {preset}", facts={"device": str(device)}
    )
    yield Finding(
        section="choices",
        status="ok",
        text=f"precision {precision.name}: {precision.reason}",
        facts={"precision": precision.name, "reason": precision.reason},
    )
    engine = choose_engine("auto", GPT(PRESETS[preset].model).to(device), precision, compile=False)
    yield Finding(
        section="choices",
        status="ok",
        text=f"engine {'native' if engine.native else 'torch'}: {engine.reason}",
        facts={"engine": "native" if engine.native else "torch", "reason": engine.reason},
    )
    choice = choose_compile("auto", device, native=engine.native)
    yield Finding(
        section="choices",
        status="ok",
        text=str(choice),
        facts={"compile": choice.on, "reason": choice.reason},
    )


def _rehearsal(device: torch.device, precision: Precision) -> Iterator[Finding]:
    """Whether what `train` and `sample` do comes out right here."""
    found = rehearse(device, precision)
    step, decoder = ("native" if native else "torch" for native in (found.native_step, found.native_decoder))
    text = (
        f"5 steps of a small model ({step}): loss {found.first_loss:.3f} to {found.last_loss:.3f}, off float64's by "
        f"{found.loss_error:.1e} ({found.tolerance:.0e} allowed); 24 tokens ({decoder}), {found.wrong_tokens} wrong"
    )
    yield Finding(
        section="training",
        status="ok" if found.right else "broken",
        text=text if found.right else f"WRONG here: {text}",
        remedy=""
        if found.right
        else "please report this with the whole of `fastchargpt doctor --json`; until then train and sample with "
        "--engine torch",
        facts=vars(found),
    )


def _speed(device: torch.device, precision: Precision) -> Iterator[Finding]:
    with precision.matmuls():
        roof = measure_roof(device, precision.dtype)
        sheet = peak_flops(device, precision.dtype) if device.type == "cuda" else None
    text = f"{precision.name} matrix products {roof.flops / 1e12:.2f} TFLOP/s"
    if sheet is not None:
        text += f" ({roof.flops / sheet.flops:.0%} of the {sheet.flops / 1e12:.0f} in the {sheet.source})"
    load, cores = (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), os.cpu_count() or 1
    if load > cores:
        yield Finding(
            section="speed",
            status="note",
            text=f"the machine is busy (load {load:.1f} on {cores} cores): all times here are longer than alone",
            facts={"load": load, "cores": cores},
        )
    yield Finding(
        section="speed",
        status="ok",
        text=f"{text}, memory {roof.bandwidth / 1e9:.0f} GB/s, both measured now",
        facts={"matmul_flops": roof.flops, "bytes_per_second": roof.bandwidth, "sheet_flops": sheet and sheet.flops},
    )


def _corpora() -> Iterator[Finding]:
    from fastchargpt.corpus import load_corpus
    from fastchargpt.downloads import SOURCES, fetch_named, is_offline, reachable

    online = not is_offline(None) and reachable(SOURCES["shakespeare"].url)
    for name, source in SOURCES.items():
        remedy, have = "", "here"
        try:
            text = f"{name}: here, {fetch_named(name, offline=True)[1].name}, checksum right"
        except CorpusError as error:
            have = "download" if online else "no"
            if "is not on this machine" not in str(error):
                text, have = f"{name}: {error}", "no"
            elif online:
                text = f"{name}: not here yet; downloaded when first asked for"
            else:
                why = "FASTCHARGPT_OFFLINE is set" if is_offline(None) else "the network is out of reach"
                text = f"{name}: not here, and {why}"
                remedy = f"put {source.filename} into a folder and name that in FASTCHARGPT_DATA_DIR, or go online"
        yield Finding(
            section="corpus",
            status="note" if have == "no" else "ok",
            text=text,
            remedy=remedy if name == "shakespeare" else "",
            facts={"corpus": name, "have": have},
        )
    corpus = load_corpus("pydoc")
    yield Finding(
        section="corpus",
        status="ok",
        text=f"pydoc: {len(corpus.train) + len(corpus.val):,} characters that come with Python, no network needed",
        facts={"corpus": "pydoc", "have": "here"},
    )
