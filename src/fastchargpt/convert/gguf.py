"""The GGUF container (version 3): fields, then tensors. Written as llama.cpp reads it, read without trusting it.

The `gguf` package reads these files too, and is what the tests compare with; but it believes every count in them, and
a file of 50 bytes keeps it busy for good, so files from elsewhere are read here.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastchargpt.errors import CheckpointError

__all__ = ["GGUF_MAGIC", "Field", "read_gguf", "write_gguf"]

GGUF_MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT_BYTES = 32  # of tensors; general.alignment may say another
Field = str | int | float | bool | Sequence[str] | Sequence[int]

# how llama.cpp numbers the types of fields: struct's letter for each
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY = 4, 5, 6, 7, 8, 9
# and those of tensors; the other numbers are quantised or integers
DTYPES = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
TYPE_NUMBERS = {dtype: number for number, dtype in DTYPES.items()}

HEADER_LIMIT_BYTES = 64 << 20  # the vocabulary of a large model takes 10 MB
MAX_DIMENSIONS = 4


def write_gguf(path: Path, fields: Mapping[str, Field], tensors: Mapping[str, Tensor]) -> None:
    """Write a GGUF file.

    Args:
        path: the file.
        fields: `general.architecture` and whatever belongs to it; integers become uint32, floats float32.
        tensors: by GGUF's names, floating-point; a matrix (out, in) is laid down as it is, and GGUF counts its
            dimensions from the other end.

    Raises:
        OSError: the file cannot be written.
    """
    header = bytearray(GGUF_MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(fields)))
    for name, value in fields.items():
        header += _packed_text(name) + _packed_field(value)
    offset = 0
    for name, tensor in tensors.items():
        dims = tuple(reversed(tensor.shape))
        header += _packed_text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
        header += struct.pack("<IQ", TYPE_NUMBERS[tensor.dtype], offset)
        offset += _aligned(tensor.numel() * tensor.element_size())
    with path.open("wb") as file:
        file.write(header.ljust(_aligned(len(header)), b"\0"))
        for tensor in tensors.values():
            data = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
            file.write(data.ljust(_aligned(len(data)), b"\0"))


def read_gguf(path: Path) -> tuple[dict[str, Field], dict[str, Tensor]]:
    """The fields of a GGUF file that are no arrays, and its tensors, copied into memory.

    Raises:
        CheckpointError: there is none, it is damaged or of another version, or its weights are quantised.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from None
    except (struct.error, ValueError) as error:  # a count beyond the end, a text that is no UTF-8, an empty file
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged or not a GGUF file ({str(error)[:120]})") from None


class _Reader:
    """A place in the file that moves on with each value; every length is compared with what is left."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self.data, self.path, self.at = data, path, 0
        self.end = min(len(data), HEADER_LIMIT_BYTES)

    def read(self) -> tuple[dict[str, Field], dict[str, Tensor]]:
        """The whole file."""
        if self.bytes(4) != GGUF_MAGIC:
            raise ValueError("it does not begin with GGUF")
        (version,) = self.values("I")
        if version not in (2, VERSION):
            raise CheckpointError(
                f"{self.path} is a GGUF file of version {version}, and fastchargpt reads {VERSION}: write it again "
                "with a newer llama.cpp"
            )
        tensor_count, field_count = self.values("QQ")
        fields: dict[str, Field] = {}
        for _ in range(field_count):
            name, value = self.text(), self.field()
            if value is not None:
                fields[name] = value
        infos = [self.tensor_info() for _ in range(tensor_count)]
        alignment = fields.get("general.alignment", ALIGNMENT_BYTES)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError(f"an alignment of {alignment!r:.40}")
        start = _aligned(self.at, alignment)
        # each tensor has its own numbers: many that share theirs would fill the memory
        if sum(size for *_, size in infos) > max(0, len(self.data) - start):
            raise ValueError("its tensors claim more bytes than it has")
        tensors: dict[str, Tensor] = {}
        for name, shape, dtype, offset, size in infos:
            if name in tensors or start + offset + size > len(self.data):
                raise ValueError(f"its tensor {name[:60]!r} stands twice or beyond the end")
            raw = bytearray(self.data[start + offset : start + offset + size])
            tensors[name] = torch.frombuffer(raw, dtype=dtype).view(shape)
        return fields, tensors

    def bytes(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.end - self.at:
            raise ValueError(f"{count} bytes are expected at {self.at}, and its header has {self.end - self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def values(self, layout: str) -> tuple[int, ...]:
        """The next numbers."""
        return struct.unpack(f"<{layout}", self.bytes(struct.calcsize(f"<{layout}")))

    def text(self) -> str:
        """The next text."""
        return self.bytes(self.values("Q")[0]).decode("utf-8")

    def field(self) -> Field | None:
        """The next field's value; None for an array, which is passed over."""
        (kind,) = self.values("I")
        if kind == STRING:
            return self.text()
        if kind in SCALARS:
            return self.values(SCALARS[kind])[0]
        if kind != ARRAY:
            raise ValueError(f"a field of the unknown type {kind}")
        inner, count = *self.values("I"), *self.values("Q")
        if inner == STRING:
            for _ in range(count):
                self.bytes(self.values("Q")[0])
        elif inner in SCALARS:
            self.bytes(count * struct.calcsize(f"<{SCALARS[inner]}"))
        else:
            raise ValueError(f"an array of the type {inner}")
        return None

    def tensor_info(self) -> tuple[str, tuple[int, ...], torch.dtype, int, int]:
        """The next tensor: name, shape, dtype, where it begins behind the header, and its size in bytes."""
        name = self.text()
        (dimensions,) = self.values("I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise ValueError(f"a tensor of {dimensions} dimensions")
        shape = tuple(reversed(self.values(f"{dimensions}Q")))
        kind, offset = *self.values("I"), *self.values("Q")
        if kind not in DTYPES:
            raise CheckpointError(
                f"{self.path} holds {name[:60]!r} in GGUF's type {kind}, quantised or of integers, which is no "
                "longer what was trained: give the file in F32, F16 or BF16"
            )
        elements = math.prod(shape)
        if not elements:
            raise ValueError(f"the empty tensor {name[:60]!r}")
        return name, shape, DTYPES[kind], offset, elements * DTYPES[kind].itemsize


def _aligned(size: int, alignment: int = ALIGNMENT_BYTES) -> int:
    return -(-size // alignment) * alignment


def _packed_text(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _packed_field(value: Field) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _packed_text(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        return struct.pack("<II", UINT32, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    texts = [item for item in value if isinstance(item, str)]
    if len(texts) == len(value):
        return struct.pack("<IIQ", ARRAY, STRING, len(texts)) + b"".join(map(_packed_text, texts))
    return struct.pack(f"<IIQ{len(value)}i", ARRAY, INT32, len(value), *value)
