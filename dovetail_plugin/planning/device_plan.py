"""`DevicePlan`, which says where each part of a pair goes and how many bytes it takes.

A plan is the result of `make_plan`; here it gives totals, a table and JSON. `parse_bytes` and `format_bytes` read and
write sizes. The module makes no decisions and does not need torch.
"""

import re
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal

Device = Literal["cpu", "gpu"]

MIB, GIB = 2**20, 2**30

UNITS = {"b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
UNITS |= {f"{unit}b": 10 ** (3 * power) for power, unit in enumerate("kmgt", start=1)}
UNITS |= {f"{unit}ib": 2 ** (10 * power) for power, unit in enumerate("kmgt", start=1)}


def parse_bytes(value: str | int) -> int:
    """Read a size in bytes. An int is a number of bytes; text needs a unit unless it is "0".

    "4GiB" and "4g" are 4 * 2**30 bytes, and "4GB" is 4 * 10**9. "512MiB", "1.5 GiB" and "100b" are valid too.

    Raises:
        ValueError: the size is negative, has no unit, or cannot be read.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    text = value.strip() if isinstance(value, str) else ""
    found = re.fullmatch(r"(\d{1,20}(?:\.\d{0,20})?|\.\d{1,20})\s*([a-z]*)", text.lower())
    if found is not None:
        number, unit = Fraction(found.group(1)), found.group(2)
        if unit in UNITS or (not unit and not number):
            return int(number * UNITS.get(unit, 1))
        if not unit:
            raise ValueError(f"{value!r} has no unit. Write {text}GiB, {text}MiB or {text}b.")
    raise ValueError(f"{value!r} is not a valid size. Use a number with a unit, for example 4GiB, 4g, 4GB or 512MiB.")


def format_bytes(size_bytes: int) -> str:
    """Write a size in GiB or MiB if it is at least one of them, otherwise in KiB."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.{2 if unit == GIB else 1}f} {name}"
    return f"{size_bytes / 1024:.1f} KiB"


@dataclass(frozen=True)
class Part:
    """A part of a pair that takes memory.

    Attributes:
        name: name of the part, for example "draft: blocks".
        bytes: peak size.
        device: device of the part, "cpu" or "gpu".
        note: remark for the table; can be empty.
    """

    name: str
    bytes: int
    device: Device
    note: str = ""


@dataclass(frozen=True)
class DevicePlan:
    """Devices and sizes of all parts of a pair.

    Attributes:
        parts: all parts, on both devices.
        vram_budget_bytes: memory of the GPU; 0 without a GPU.
        ram_budget_bytes: memory of the machine; None if there is no limit.
        draft_device: device of the draft's blocks.
        draft_dtype: dtype of the draft, for example "bfloat16"; None for prompt lookup, which has no weights.
        target_dtype: dtype of the target, or how it is quantized.
        embedding_device: device on which the draft gathers rows of the embedding table.
        draft_vocab_size: number of tokens that a cut head of the draft proposes; None if it proposes all tokens.
        gpu_layers: indices of the target's layers on the GPU, for `place_layers`. They are always its last layers.
        device_map: module names mapped to "cpu" or 0, in accelerate's form; None if the whole target is on the CPU. Do
            not load a model with it: if there is a GPU, `from_pretrained` copies the weights of modules on "cpu" to the
            GPU in every pass. `accelerate.dispatch_model(model, device_map, main_device="cpu")` computes on the CPU.
        notes: decisions and their reasons, in sentences.
    """

    parts: tuple[Part, ...]
    vram_budget_bytes: int
    ram_budget_bytes: int | None
    draft_device: Device
    draft_dtype: str | None
    target_dtype: str
    embedding_device: Device
    draft_vocab_size: int | None
    gpu_layers: tuple[int, ...]
    device_map: dict[str, int | str] | None
    notes: list[str]

    def needed_bytes(self, device: Device) -> int:
        """Return the bytes of all parts on a device."""
        return sum(part.bytes for part in self.parts if part.device == device)

    def left_bytes(self, device: Device) -> int | None:
        """Return the bytes of a device's budget that stay free, or None if there is no limit."""
        budget = self.vram_budget_bytes if device == "gpu" else self.ram_budget_bytes
        return None if budget is None else budget - self.needed_bytes(device)

    def table(self) -> str:
        """Return the plan as text, with its parts, totals, free memory and notes."""
        width = max(len(part.name) for part in self.parts) + 2
        lines = []
        devices: tuple[Device, ...] = ("gpu", "cpu")
        for device in devices:
            own = [part for part in self.parts if part.device == device]
            if not own:
                continue
            lines.append(device.upper())
            lines += [f"  {p.name:{width}}{format_bytes(p.bytes):>12}  {p.note}".rstrip() for p in own]
            lines.append(f"  {'total':{width}}{format_bytes(self.needed_bytes(device)):>12}  {self._left(device)}")
        return "\n".join([*lines, *(f"- {note}" for note in self.notes)])

    def _left(self, device: Device) -> str:
        left = self.left_bytes(device)
        if left is None:
            return "no limit given"
        return f"of {format_bytes(self.needed_bytes(device) + left)}, {format_bytes(left)} left"

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as a dictionary that JSON can store, with totals and free memory."""
        totals = {
            "vram_needed_bytes": self.needed_bytes("gpu"),
            "vram_left_bytes": self.left_bytes("gpu"),
            "ram_needed_bytes": self.needed_bytes("cpu"),
            "ram_left_bytes": self.left_bytes("cpu"),
        }
        return asdict(self) | totals
