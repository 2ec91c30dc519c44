"""Compile Triton kernels for any GPU without one, and read what came out: registers, spills, memory, instructions.

    with record_launches("sm_90") as launches:
        flash.launch_forward(q, k, v)              # the package's own host code; nothing runs
    report = compile_launch(launches[0], "sm_90")  # a Report, from build/aot when it was compiled before

A launch is recorded where Triton would specialise it (types, divisibility by 16, arguments equal to 1), so what is
compiled is what a user's GPU would compile. The Triton wheel brings the whole toolchain: ptxas for PTX to machine code,
cuobjdump and nvdisasm to read it back, LLVM for AMD.
"""

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
from control_flow import Code, Instruction, innermost_loops, shortest_round
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITCallable, JITFunction
from ttir import loops_with_dots, narrow_products

__all__ = [
    "TARGETS",
    "FakeDriver",
    "Launch",
    "Loop",
    "Report",
    "Target",
    "compile_launch",
    "installed",
    "launch_of",
    "present",
    "record_launches",
]

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent / "build" / "aot"
READERS = ("aot.py", "control_flow.py", "ttir.py")  # what a remembered report depends on besides the launch
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU to compile for."""

    name: str
    backend: GPUTarget
    shared_limit: int  # bytes a program may have; CUDA C programming guide, table "technical specifications"

    @property
    def is_amd(self) -> bool:
        return self.backend.backend == "hip"


def _cuda(capability: int, shared_kib: int) -> Target:
    return Target(f"sm_{capability}", GPUTarget("cuda", capability, 32), shared_kib * 1024)


TARGETS = {
    target.name: target
    for target in (
        _cuda(75, 64),
        _cuda(80, 163),
        _cuda(86, 99),
        _cuda(89, 99),
        _cuda(90, 227),
        _cuda(100, 227),
        _cuda(120, 99),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024),  # CDNA3 ISA guide: 64 KiB of LDS
    )
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel launch, specialised as Triton's JIT would: everything that decides the machine code, and the grid."""

    kernel: JITFunction
    signature: dict[str, str]  # argument -> "*bf16", "i32", "constexpr", ...
    constexprs: dict[tuple[int, ...], Any]  # path of the argument -> value
    attributes: dict[tuple[int, ...], Any]  # path of the argument -> [["tt.divisibility", 16]]
    options: dict[str, Any]  # num_warps, num_stages, ...
    grid: tuple[int, ...] = (1,)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def constants(self) -> dict[str, Any]:
        """The compile-time arguments by name."""
        return {self.kernel.arg_names[path[0]]: value for path, value in self.constexprs.items() if len(path) == 1}

    def key(self, target: str) -> str:
        """Names the machine code: equal keys compile to equal code. Comments and line numbers do not count."""
        parts = (
            _source(self.kernel),
            sorted(self.signature.items()),
            sorted((path, str(value)) for path, value in self.constexprs.items()),
            sorted((path, str(value)) for path, value in self.attributes.items()),
            sorted((name, str(value)) for name, value in self.options.items()),
            target,
            triton.__version__,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


@functools.cache
def _source(kernel: JITFunction) -> list[tuple[str, str]]:
    """The syntax trees of a kernel and of the package's functions that it reaches, with the constants they use."""
    found: dict[str, str] = {}

    def visit(function: JITCallable) -> None:
        name = f"{function.fn.__module__}.{function.fn.__qualname__}"
        if name in found or name.startswith("triton."):
            return
        (tree,) = ast.parse(function.src).body
        if ast.get_docstring(tree):
            tree.body = tree.body[1:]
        found[name] = ast.dump(tree)
        for used in sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}):
            value = function.fn.__globals__.get(used)
            if isinstance(value, JITCallable):
                visit(value)
            elif isinstance(value, tl.constexpr):
                found[f"{name}: {used}"] = repr(value.value)

    visit(kernel)
    return sorted(found.items())


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop of the machine code: how often each instruction stands in its body (modifiers kept)."""

    opcodes: dict[str, int]
    skippable: dict[str, int] = dataclasses.field(default_factory=dict)  # those of them that a branch in it may skip

    @property
    def instructions(self) -> int:
        return sum(self.opcodes.values())

    @property
    def always(self) -> "Loop":
        """Without what may be skipped."""
        return Loop(dict(Counter(self.opcodes) - Counter(self.skippable)))

    def count(self, pattern: str) -> int:
        """Instructions whose opcode matches a regular expression from its start."""
        return sum(n for opcode, n in self.opcodes.items() if re.match(pattern, opcode))

    @property
    def matrix_instructions(self) -> int:
        return self.count(MATRIX_OPCODE)


# HMMA (Turing to Ada, and Blackwell's sm_120), HGMMA (Hopper), UTCHMMA (sm_100), and AMD's matrix cores.
MATRIX_OPCODE = r"\w*MMA\b|v_mfma_"


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of a launch."""

    kernel: str
    target: str
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # NVIDIA: local loads and stores in the code; AMD: spilled vector registers
    shared: int  # bytes per program
    tensor_memory: int  # columns (sm_100), of 512
    warps: int
    opcodes: dict[str, int]  # of the whole kernel
    loops: list[Loop]  # innermost, in program order
    half_dots: int  # tl.dot of 16-bit operands, in Triton's own IR
    loops_with_dots: int  # there too, before the compiler unrolls or merges any
    slow_dots: int  # tl.dot that got no tensor cores
    tf32: bool
    atomics: list[str]
    narrow_products: list[str]  # 32-bit products of a stride with something unbounded

    @property
    def whole(self) -> Loop:
        """The whole kernel's instructions, with a loop's helpers."""
        return Loop(self.opcodes)

    @property
    def matrix_loops(self) -> list[Loop]:
        return [loop for loop in self.loops if loop.matrix_instructions]


# -- recording launches


class FakeDriver:
    """Stands in for a GPU driver, so that Triton specialises launches for a chosen target."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target.backend

    def get_current_device(self) -> Any:
        return self.target.name  # the key of a JITFunction's caches, which must not mix targets

    def get_current_stream(self, device: Any) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    @classmethod
    def is_active(cls) -> bool:
        return True


@contextlib.contextmanager
def installed(stand_in: FakeDriver) -> Iterator[None]:
    """Within this scope it is the driver that Triton uses."""
    active = driver._active
    driver.set_active(stand_in)
    try:
        yield
    finally:
        driver._active = active


def present(target: str) -> contextlib.AbstractContextManager[None]:
    """Within this scope Triton finds the target's GPU: kernels may ask for it (`triton.language.target_info`)."""
    return installed(FakeDriver(TARGETS[target]))


@contextlib.contextmanager
def record_launches(target: str) -> Iterator[list[Launch]]:
    """Within this scope kernels do not run: each launch is specialised for `target` and appended to the list."""
    launches: list[Launch] = []

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kwargs |= {"debug": False, "instrumentation_mode": ""}
        *_, backend, binder = kernel.device_caches[target]
        bound, specialization, options = binder(*args, **kwargs)
        parsed, signature, constexprs, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
        extent = tuple(grid(bound) if callable(grid) else grid)
        chosen = {name: getattr(parsed, name) for name in kwargs if hasattr(parsed, name) and name not in bound}
        launches.append(Launch(kernel, signature, constexprs, attributes, chosen, extent))

    original = JITFunction.run
    JITFunction.run = run
    try:
        with present(target):
            yield launches
    finally:
        JITFunction.run = original


def launch_of(target: str, kernel: JITFunction, grid: tuple[int, ...], *args: Any, **kwargs: Any) -> Launch:
    """The launch `kernel[grid](*args, **kwargs)` as it would be on `target`."""
    with record_launches(target) as launches:
        kernel[grid](*args, **kwargs)
    return launches[0]


# -- compiling


def compile_launch(launch: Launch, target: str) -> Report:
    """Compile a launch for a target and read the result; remembered in build/aot by everything that decides it."""
    path = CACHE / f"{launch.key(target)}-{_readers()}.json"
    if path.exists():
        fields = json.loads(path.read_text())
        return Report(**fields | {"loops": [Loop(**loop) for loop in fields["loops"]]})
    report = _compile(launch, TARGETS[target])
    fields = vars(report) | {"loops": [vars(loop) for loop in report.loops]}
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=CACHE, delete=False, suffix=".tmp") as file:
        json.dump(fields, file)
    os.replace(file.name, path)  # whole or not at all: several test processes share the folder
    return report


@functools.cache
def _readers() -> str:
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in READERS)).hexdigest()[:8]


def _compile(launch: Launch, target: Target) -> Report:
    source = ASTSource(launch.kernel, launch.signature, launch.constexprs, launch.attributes)
    with triton.knobs.cache.scope(), present(target.name):
        triton.knobs.cache.dir = str(CACHE / "triton")
        compiled = triton.compile(source, target=target.backend, options=launch.options)
    ttir, ttgir = compiled.asm["ttir"], compiled.asm["ttgir"]
    read = _read_amd if target.is_amd else _read_nvidia
    machine = read(compiled.asm)
    code = machine.code
    return Report(
        kernel=launch.name,
        target=target.name,
        registers=machine.registers,
        stack=machine.stack,
        spills=machine.spills,
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
        warps=compiled.metadata.num_warps,
        opcodes=dict(Counter(instruction.opcode for instruction in code)),
        loops=_loops(code),
        half_dots=len(re.findall(r"= tt\.dot .*: tensor<\w*x(?:b?f16)>", ttir)),
        loops_with_dots=loops_with_dots(ttir),
        slow_dots=len(re.findall(r"= tt\.dot .*parent = #blocked", ttgir)),
        tf32=bool(re.search(r"tf32|xf32", machine.assembly)),
        atomics=sorted(set(re.findall(r"\b(?:atom|red)\.\S+|\b\w+_atomic_\w+", machine.assembly))),
        narrow_products=narrow_products(ttir),
    )


def _loops(code: Code) -> list[Loop]:
    def opcodes(indices: Iterable[int]) -> dict[str, int]:
        return dict(Counter(code[at].opcode for at in indices))

    products = {at for at, instruction in enumerate(code) if re.match(MATRIX_OPCODE, instruction.opcode)}
    return [
        Loop(opcodes(loop.body), opcodes({*loop.body} - {*shortest_round(code, loop, products)}))
        for loop in innermost_loops(code)
    ]


def _read_nvidia(asm: dict[str, Any]) -> SimpleNamespace:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        text = _tool("nvdisasm", "-c", file.name)
    labels: dict[str, int] = {}
    raw: list[tuple[bool, str]] = []  # (has a predicate, instruction)
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(raw)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P\w+\s+)?(\S.*?)\s*;", line):
            raw.append((bool(instruction[1]), instruction[2]))
    code: Code = []
    for predicated, instruction in raw:
        branch = re.match(r"BRA\b(.*)`\((\.L_x_\d+)\)", instruction)
        ends = re.match(r"(BRA|EXIT|RET)\b", instruction) and not predicated
        if branch and branch[1].strip():  # BRA.U !UP0 and the like carry their predicate inside
            ends = False
        code.append(Instruction(_opcode(instruction), labels[branch[2]] if branch else None, not ends))
    numbers = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert numbers, usage
    return SimpleNamespace(
        registers=int(numbers[1]),
        stack=int(numbers[2]),
        spills=sum(instruction.opcode.split(".")[0] in ("LDL", "STL") for instruction in code),
        code=code,
        assembly=asm["ptx"],
    )


def _opcode(instruction: str) -> str:
    """The opcode, with one mark added: HGMMA that reads its left operand from shared memory too ends in `.SS`."""
    opcode = instruction.split()[0]
    if opcode.startswith("HGMMA") and re.match(r"\S+ R\d+, gdesc", instruction):
        return opcode + ".SS"
    return opcode


def _tool(name: str, *arguments: str) -> str:
    command = [str(NVIDIA_TOOLS / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _read_amd(asm: dict[str, Any]) -> SimpleNamespace:
    text = asm["amdgcn"]
    labels: dict[str, int] = {}
    raw: list[str] = []
    for line in text.split(".section", 1)[0].splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(raw)
        elif instruction := re.match(r"\t([a-z]\w+.*)", line):
            raw.append(instruction[1])
    code: Code = []
    for instruction in raw:
        branch = re.match(r"s_c?branch\S*\s+(\.LBB\w+)", instruction)
        ends = instruction.startswith(("s_branch", "s_endpgm"))
        code.append(Instruction(instruction.split()[0], labels.get(branch[1]) if branch else None, not ends))

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, f"no {name} in the assembly"
        return int(found[1])

    return SimpleNamespace(
        registers=field("vgpr_count"),  # accumulation registers included
        stack=field("private_segment_fixed_size"),
        spills=field("vgpr_spill_count"),
        code=code,
        assembly=text,
    )
