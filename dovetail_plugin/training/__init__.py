"""Training of drafts: data (`data`), target features (`features`), losses (`losses`), the loop (`loop`).

The target is frozen throughout and only ever gives features; its head turns features into logits.
"""

from .config import TrainingConfig
from .loop import train

__all__ = ["TrainingConfig", "train"]
