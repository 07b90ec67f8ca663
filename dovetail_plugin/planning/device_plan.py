"""`DevicePlan`: which part of a pair goes where and what it takes, as numbers and as text; sizes in words and back.

Enters: what `plan.make_plan` decided. Leaves: totals, a table, JSON. This module decides nothing and needs no torch.
"""

import re
from dataclasses import asdict, dataclass
from typing import Any, Literal

Device = Literal["cpu", "gpu"]

MIB, GIB = 2**20, 2**30

UNITS = {"": 1, "b": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}
UNITS |= {f"{unit}b": 10 ** (3 * power) for power, unit in enumerate("kmgt", start=1)}
UNITS |= {f"{unit}ib": 2 ** (10 * power) for power, unit in enumerate("kmgt", start=1)}


def parse_bytes(value: str | int) -> int:
    """A number of bytes: 4294967296, "4GiB" or "4g" (2**30 each), "4GB" (10**9), "512MiB", "1.5 GiB".

    Raises:
        ValueError: zero, negative or not a size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)\s*", str(value).lower())
    if isinstance(value, bool) or found is None or found.group(2) not in UNITS:
        size = 0
    else:
        size = int(float(found.group(1)) * UNITS[found.group(2)])
    if size < 1:
        raise ValueError(
            f"{value!r} is no size: give bytes as a whole number, or a number above 0 with a unit, e.g. 4GiB or 4g "
            "(2**30 bytes each), 4GB (10**9), 512MiB."
        )
    return size


def format_bytes(size_bytes: int) -> str:
    """In the largest of GiB, MiB and KiB that it fills."""
    for unit, name in ((GIB, "GiB"), (MIB, "MiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.{2 if unit == GIB else 1}f} {name}"
    return f"{size_bytes / 1024:.1f} KiB"


@dataclass(frozen=True)
class Part:
    """Something that takes memory. bytes: at its peak."""

    name: str
    bytes: int
    device: Device
    note: str = ""


@dataclass(frozen=True)
class DevicePlan:
    """What goes where.

    Attributes:
        parts: with their bytes, on both devices.
        vram_budget_bytes: of the GPU; 0 without one. ram_budget_bytes: of the machine; None is no limit.
        draft_device: "gpu" or "cpu". draft_dtype, target_dtype: as stored there.
        embedding_device: where the draft gathers rows of the embedding table.
        draft_vocab_size: tokens that a cut head of the draft proposes; None is all.
        gpu_layers: indices of the target's layers on the GPU, for `placement.place_layers`; always its last ones.
        device_map: module names to "cpu" or 0 in accelerate's form, None if all of the target is on the CPU. Do not
            load with it: `from_pretrained` reads "cpu" beside a GPU as "copy the weights to the GPU in every pass".
            `accelerate.dispatch_model(model, device_map, main_device="cpu")` computes there.
        notes: what was decided and why, in sentences.
    """

    parts: tuple[Part, ...]
    vram_budget_bytes: int
    ram_budget_bytes: int | None
    draft_device: Device
    draft_dtype: str
    target_dtype: str
    embedding_device: Device
    draft_vocab_size: int | None
    gpu_layers: tuple[int, ...]
    device_map: dict[str, int | str] | None
    notes: list[str]

    def needed_bytes(self, device: Device) -> int:
        """Of all parts on a device."""
        return sum(part.bytes for part in self.parts if part.device == device)

    def left_bytes(self, device: Device) -> int | None:
        """Of a device's budget; None if there is no limit."""
        budget = self.vram_budget_bytes if device == "gpu" else self.ram_budget_bytes
        return None if budget is None else budget - self.needed_bytes(device)

    def table(self) -> str:
        """The plan as text: parts, then totals and what is left, then the notes."""
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
        """For JSON, with totals and what is left."""
        totals = {
            "vram_needed_bytes": self.needed_bytes("gpu"),
            "vram_left_bytes": self.left_bytes("gpu"),
            "ram_needed_bytes": self.needed_bytes("cpu"),
            "ram_left_bytes": self.left_bytes("cpu"),
        }
        return asdict(self) | totals


def parse_budget(budget: str | int) -> int:
    """Bytes, as `parse_bytes`; 0 is a budget, too.

    Raises:
        ValueError: it is no size.
    """
    return 0 if str(budget).strip() == "0" else parse_bytes(budget)
