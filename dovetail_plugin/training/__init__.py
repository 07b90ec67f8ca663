"""Training of drafts: data (`data`), target features (`features`), losses (`losses`), the loop (`loop`).

The target is frozen throughout and only ever gives features; its head turns features into logits. `train` is loaded
when it is first used, so that a `TrainingConfig` can be made without torch.
"""

from typing import TYPE_CHECKING, Any

from .config import TrainingConfig

if TYPE_CHECKING:
    from .loop import train

__all__ = ["TrainingConfig", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from .loop import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
