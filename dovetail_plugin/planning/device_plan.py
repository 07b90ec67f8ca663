"""`DevicePlan`: which part of a pair goes where and how many bytes it takes; sizes as text and back.

Input: what `make_plan` decided. Output: totals, a table, JSON. The module decides nothing and does not need torch.
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
    """Read a size: an int is a number of bytes; text needs a unit, or is "0".

    "4GiB" and "4g" are 4 * 2**30 bytes, "4GB" is 4 * 10**9; "512MiB", "1.5 GiB" and "100b" work, too.

    Raises:
        ValueError: the size is negative, has no unit, or cannot be read.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    text = value.strip() if isinstance(value, str) else ""
    found = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)", text.lower())
    if found is not None:
        number, unit = Fraction(found.group(1)), found.group(2)
        if unit in UNITS or (not unit and not number):
            return int(number * UNITS.get(unit, 1))
        if not unit:
            raise ValueError(f"{value!r} has no unit. Write {text}GiB, {text}MiB or {text}b.")
    raise ValueError(f"{value!r} is not a valid size. Use a number with a unit, for example 4GiB, 4g, 4GB or 512MiB.")


def format_bytes(size_bytes: int) -> str:
    """Write a size in the largest of GiB, MiB and KiB that it fills."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.{2 if unit == GIB else 1}f} {name}"
    return f"{size_bytes / 1024:.1f} KiB"


@dataclass(frozen=True)
class Part:
    """Something that takes memory.

    Attributes:
        name: of the part, for example "draft: blocks".
        bytes: at its peak.
        device: where it is.
        note: for people; can be empty.
    """

    name: str
    bytes: int
    device: Device
    note: str = ""


@dataclass(frozen=True)
class DevicePlan:
    """Where the parts of a pair go.

    Attributes:
        parts: on both devices, with their bytes.
        vram_budget_bytes: of the GPU; 0 without one.
        ram_budget_bytes: of the machine; None for no limit.
        draft_device: where the draft's blocks are.
        draft_dtype: of the draft; None for prompt lookup, which has no weights.
        target_dtype: of the target, or how it is quantized.
        embedding_device: where the draft gathers rows of the embedding table.
        draft_vocab_size: tokens that a cut head of the draft proposes; None for all.
        gpu_layers: indices of the target's layers on the GPU, for `place_layers`; always its last ones.
        device_map: module names to "cpu" or 0 in accelerate's form; None if all of the target is on the CPU. Do not
            load with it: `from_pretrained` reads "cpu" beside a GPU as "copy the weights to the GPU in every pass".
            `accelerate.dispatch_model(model, device_map, main_device="cpu")` computes there.
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
        """Bytes of all parts on a device."""
        return sum(part.bytes for part in self.parts if part.device == device)

    def left_bytes(self, device: Device) -> int | None:
        """Bytes of a device's budget that stay free; None if there is no limit."""
        budget = self.vram_budget_bytes if device == "gpu" else self.ram_budget_bytes
        return None if budget is None else budget - self.needed_bytes(device)

    def table(self) -> str:
        """Return the plan as text: parts, totals with what is left, notes."""
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
        """Return the plan for JSON, with totals and what is left."""
        totals = {
            "vram_needed_bytes": self.needed_bytes("gpu"),
            "vram_left_bytes": self.left_bytes("gpu"),
            "ram_needed_bytes": self.needed_bytes("cpu"),
            "ram_left_bytes": self.left_bytes("cpu"),
        }
        return asdict(self) | totals
