"""Training of drafts: data (`data`), target features (`features`), losses (`losses`) and the loop (`loop`).

The target is frozen and only provides features; its head turns features into logits. `train` is imported when it is
first used, so that reading `TrainingConfig`, as the command line does, needs neither torch nor accelerate.
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
