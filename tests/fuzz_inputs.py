"""What a hostile writer does to a file: odd values, and bytes, JSON and archives changed by a choice."""

import copy
import io
import json
import random
import zipfile
from typing import Any

ODD_VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        -1,
        0,
        1,
        2,
        7,
        255,
        2**31,
        2**32,
        2**63 - 1,
        2**63,
        10**30,
        10**400,
        0.5,
        -0.0,
        1e-320,
        1e308,
    ),
    *(
        float("inf"),
        float("nan"),
        "",
        "0",
        "\0",
        "..",
        "../../secret",
        "/etc/passwd",
        "C:\\x",
        "\ud800",
        "é",
        "\U0010ffff",
    ),
    *("a" * 10_000, "model.safetensors", "char", "bpe", "rope", [], {}, [[]], [0, 1], {"a": 1}, {"": None}),
]
ODD_TEXTS = ["NaN", "-Infinity", "1e999", "9" * 5000, "[" * 3000, '{"a":' * 3000, "\\ud800", "\0", "//", "\ufeff"]
ODD_BYTES = [
    b"\0" * 8,
    b"\xff" * 8,
    b"\xff\xff\xff\x7f",
    b"\xff" * 7 + b"\x7f",
    b"\x80",
    b"\x80\x04",
    b"c__builtin__\neval\n",
]


def mutated_bytes(choose: random.Random, data: bytes) -> bytes:
    """A few of: bits flipped, a stretch cut out, doubled, moved or overwritten, the end cut off."""
    found = bytearray(data)
    for _ in range(choose.choice([1, 1, 2, 4, 16])):
        at, end = sorted(choose.randrange(len(found) + 1) for _ in range(2))
        kind = choose.randrange(7)
        if kind == 0 and at < len(found):
            found[at] ^= 1 << choose.randrange(8)
        elif kind == 1 and at < len(found):
            found[at] = choose.randrange(256)
        elif kind == 2:
            odd = choose.choice(ODD_BYTES)
            found[at : at + len(odd)] = odd
        elif kind == 3:
            del found[at : min(end, at + choose.choice([1, 8, 100_000]))]
        elif kind == 4:
            found[at:at] = found[at : min(end, at + 5000)] * choose.choice([1, 2, 5])
        elif kind == 5:
            found[at:at] = choose.randbytes(choose.choice([1, 4, 64]))
        elif choose.random() < 0.3:
            del found[at:]
    return bytes(found[: 4 << 20])


def mutated_json(choose: random.Random, value: Any) -> Any:
    """A few of a JSON value's parts replaced, removed, renamed or nested."""
    value = json.loads(json.dumps(value))
    for _ in range(choose.choice([1, 1, 1, 2, 5])):
        holders: list[Any] = []
        stack = [value]
        while stack:
            part = stack.pop()
            if isinstance(part, dict | list) and part:
                holders.append(part)
                stack.extend(part.values() if isinstance(part, dict) else part[:50])
        if not holders:
            return copy.deepcopy(choose.choice(ODD_VALUES))
        holder = choose.choice(holders)
        key = choose.choice(list(holder)) if isinstance(holder, dict) else choose.randrange(len(holder))
        odd = copy.deepcopy(choose.choice(ODD_VALUES))  # a later change must not reach the inputs that follow
        kind = choose.randrange(6)
        if kind <= 2:
            holder[key] = odd
        elif kind == 3:
            del holder[key]
        elif kind == 4:
            nested: Any = odd
            for _ in range(choose.choice([1, 5, 200, 900])):
                nested = [nested] if choose.random() < 0.5 else {"a": nested}
            holder[key] = nested
        elif isinstance(holder, dict):
            holder[odd if isinstance(odd, str) else "colour"] = holder[key]
        else:
            holder.append(odd)
    return value


def mutated_text(choose: random.Random, text: str) -> bytes:
    """A JSON text with one odd stretch in it, or with its bytes changed."""
    if choose.random() < 0.5:
        at = choose.randrange(len(text) + 1)
        text = text[:at] + choose.choice(ODD_TEXTS) + text[at + choose.choice([0, 1, 5]) :]
        return text.encode("utf-8", "surrogatepass")
    return mutated_bytes(choose, text.encode())


def dumped(value: Any) -> str:
    """JSON as a hostile writer gives it, whatever the value's depth."""
    try:
        return json.dumps(value)
    except RecursionError:
        return "[" * 5000


def mutated_safetensors(choose: random.Random, data: bytes, *, inside: bool = False) -> bytes:
    """A safetensors file with another header, or its bytes changed; `inside` changes the JSON in its metadata too."""
    if choose.random() >= 0.6:
        return mutated_bytes(choose, data)
    length = int.from_bytes(data[:8], "little")
    fields = json.loads(data[8 : 8 + length])
    if inside and choose.random() < 0.6:
        name = choose.choice(sorted(set(fields["__metadata__"]) - {"format"}))
        fields["__metadata__"][name] = dumped(mutated_json(choose, json.loads(fields["__metadata__"][name])))
    else:
        fields = mutated_json(choose, fields)
    header = dumped(fields).encode("utf-8", "replace")
    claimed = choose.choice([len(header), len(header), len(header), 2**63, 10**8, 0, len(header) + 1])
    return claimed.to_bytes(8, "little") + header + data[8 + length :]


def archive(content: Any) -> bytes:
    """What torch.save writes."""
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def mutated_archive(choose: random.Random, data: bytes) -> bytes:
    """What is inside a file of torch.save changed, in an archive that is whole."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(target, "w") as new:
        spoil = choose.choice([name for name in old.namelist() if name.endswith(("data.pkl", "version", "/0"))])
        for name in old.namelist():
            new.writestr(name, mutated_bytes(choose, old.read(name)) if name == spoil else old.read(name))
    return target.getvalue()


def mutated_state(choose: random.Random, state: Any) -> Any:
    """One value of a nested state replaced or removed."""
    import torch

    state = copy.deepcopy(state)
    holder: Any = state
    while True:
        key = choose.choice(list(holder)) if isinstance(holder, dict) else choose.randrange(len(holder))
        if isinstance(holder[key], dict | list) and holder[key] and choose.random() < 0.8:
            holder = holder[key]
            continue
        odd = [value for value in ODD_VALUES if not (isinstance(value, str) and "\ud800" in value)]
        odd += [torch.zeros(0), torch.zeros(3, dtype=torch.uint8), torch.full((2, 2), float("nan")), (1, 2)]
        holder[key] = copy.deepcopy(choose.choice(odd))
        if isinstance(holder, dict) and choose.random() < 0.2:
            del holder[key]
        return state
