"""Finds the families: what transformers' auto classes list for causal language models and image-text models."""

from dataclasses import dataclass

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from .overrides import VARIANTS


@dataclass(frozen=True, order=True)
class Family:
    """One architecture.

    Attributes:
        model_type: of the config.
        class_name: of the model.
        variant: name of an option in `overrides.VARIANTS`, or "".
    """

    model_type: str
    class_name: str
    variant: str = ""

    @property
    def name(self) -> str:
        """`model_type`, with the class where a type has two (`gemma3:Gemma3ForCausalLM`), and the variant."""
        several = len(CLASSES[self.model_type]) > 1
        name = f"{self.model_type}:{self.class_name}" if several else self.model_type
        return f"{name}/{self.variant}" if self.variant else name

    @property
    def sees_images(self) -> bool:
        """Whether it is one of the vision-language models."""
        return self.class_name == MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(self.model_type)


CLASSES: dict[str, set[str]] = {}
"""Model type -> names of its classes."""

for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
    for model_type, names in mapping.items():
        CLASSES.setdefault(model_type, set()).update([names] if isinstance(names, str) else names)

FAMILIES = sorted(
    [Family(model_type, name) for model_type, names in CLASSES.items() for name in names]
    + [
        Family(kind, min(CLASSES[kind]), variant)
        for kind, variant in (n.split("/") for n in VARIANTS)
        if kind in CLASSES
    ]
)


def family_of(name: str) -> Family:
    """The family of this name, as `Family.name` gives it."""
    return next(family for family in FAMILIES if family.name == name)
