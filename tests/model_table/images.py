"""Prompts with a tiny image, for as many vision-language families as one rule serves.

A model says itself what fits: the pixel inputs that its `get_image_features` accepts, and how many rows the image
takes in the text. So no processor, which would need files of a checkpoint, has to run.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .shrink import VOCAB

BEFORE, AFTER = 6, 16
"""Tokens of text around the image."""


class NoImagePromptError(Exception):
    """No known form of pixels fits the model."""


def image_prompt(model: PreTrainedModel) -> dict[str, Tensor]:
    """Inputs of `generate` with one image between random tokens.

    Raises:
        NoImagePromptError: names what was tried.
    """
    if "cross_attention_mask" in inspect.signature(model.forward).parameters:
        return prompt_with_cross_attention(model)
    token = image_token(model)
    reasons = []
    for pixels in forms_of_pixels(model):
        try:
            rows = image_rows(model, pixels)
        except Exception as error:
            reasons.append(f"{'+'.join(pixels)}: {type(error).__name__} {str(error)[:80]}")
            continue
        return prompt_around([token] * rows, model, pixels)
    raise NoImagePromptError("; ".join(reasons) or "no get_image_features")


def image_token(model: PreTrainedModel) -> int:
    """The token that stands for rows of an image."""
    config = model.config
    for name in ("image_token_id", "image_token_index", "media_placeholder_token_id", "image_patch_id"):
        if isinstance(token := getattr(config, name, None), int):
            return token
    if vocabulary := getattr(config, "vocabulary_map", None):
        return vocabulary["<image>"]
    raise NoImagePromptError("its config names no image token")


def forms_of_pixels(model: PreTrainedModel) -> Iterator[dict[str, Tensor]]:
    """Pixel inputs in the forms that families use, the particular ones first."""
    vision: Any = getattr(model.config, "vision_config", None) or model.config
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    patch = getattr(vision, "patch_size", 14)
    patch = patch if isinstance(patch, int) else patch[0]
    size = getattr(vision, "image_size", None) or 4 * patch
    size = size if isinstance(size, int) else size[0]
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    accepted = set(inspect.signature(get_image_features(model)).parameters)
    if accepted & {"image_grid_thw", "grid_thws", "image_grids"}:
        name = next(n for n in ("image_grid_thw", "grid_thws", "image_grids") if n in accepted)
        grid = torch.tensor([[1, 4, 8]])
        for depth in dict.fromkeys((getattr(vision, "temporal_patch_size", 1), 1)):
            yield {"pixel_values": noise(32, channels * depth * patch * patch), name: grid}
        yield {"pixel_values": noise(32, channels, patch, patch), name: grid}
    if "image_position_ids" in accepted:
        side = 6
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]
        for pooled in (getattr(vision, "model_patch_size", patch), patch):
            yield {"pixel_values": noise(1, side * side, channels * pooled**2), "image_position_ids": places}
    if "spatial_shapes" in accepted:
        flat = {"pixel_values": noise(1, 16, channels * patch**2), "spatial_shapes": torch.tensor([[4, 4]])}
        yield flat | {"pixel_attention_mask": torch.ones(1, 16, dtype=torch.long)}
    if "high_res_pixel_values" in accepted:
        large = model.config.high_res_vision_config.image_size
        yield {"pixel_values": noise(1, 3, size, size), "high_res_pixel_values": noise(1, 3, large, large)}
    sizes = torch.tensor([[size, size]])
    image = noise(1, channels, size, size)
    if "image_sizes" in accepted:
        yield {"pixel_values": image, "image_sizes": sizes}
        yield {"pixel_values": torch.stack([image, image], dim=1)[:, :2], "image_sizes": sizes}
        yield {"pixel_values": image[:, None].repeat(1, 5, 1, 1, 1), "image_sizes": sizes}
    if "pixel_attention_mask" in accepted:
        yield {"pixel_values": image[:, None], "pixel_attention_mask": torch.ones(1, 1, size, size, dtype=torch.bool)}
    yield {"pixel_values": image}
    yield {"pixel_values": image[:, None]}
    yield {"pixel_values": image, "image_sizes": sizes}


def get_image_features(model: PreTrainedModel) -> Any:
    """The method of the model, or of the model inside it.

    Raises:
        NoImagePromptError: there is none.
    """
    for owner in (model, getattr(model, "model", None)):
        if method := getattr(owner, "get_image_features", None):
            return method
    raise NoImagePromptError("no get_image_features")


@torch.no_grad()
def image_rows(model: PreTrainedModel, pixels: dict[str, Tensor]) -> int:
    """Rows of text width that the pixels become."""
    found = get_image_features(model)(**pixels)
    found = getattr(found, "pooler_output", found)
    if isinstance(found, (list, tuple)):
        found = torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in found])
    return found.numel() // found.shape[-1]


def prompt_around(image: list[int], model: PreTrainedModel, pixels: dict[str, Tensor]) -> dict[str, Tensor]:
    """Text, image and text, with the marks that some families want beside them."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(10, VOCAB // 2, (BEFORE + AFTER,), generator=generator).tolist()
    config = model.config
    start, end = (getattr(config, f"vision_{name}_token_id", None) for name in ("start", "end"))
    image = [*([start] if isinstance(start, int) else []), *image, *([end] if isinstance(end, int) else [])]
    ids = torch.tensor([[*text[:BEFORE], *image, *text[BEFORE:]]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels}
    accepted = set(inspect.signature(model.forward).parameters)
    for name in ("mm_token_type_ids", "token_type_ids"):
        if name in accepted:
            inputs[name] = (ids == image_token(model)).long()
    return inputs


def prompt_with_cross_attention(model: PreTrainedModel) -> dict[str, Tensor]:
    """Mllama's form: one token for an image of two tiles, which all text from there on sees."""
    vision = model.config.vision_config
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, VOCAB // 2, (1, BEFORE + AFTER), generator=generator)
    ids[0, 0] = image_token(model)
    tiles = torch.zeros(1, 1, vision.max_num_tiles, dtype=torch.long)
    tiles[..., :2] = 1
    pixels = torch.randn(1, 1, vision.max_num_tiles, 3, vision.image_size, vision.image_size, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "aspect_ratio_ids": torch.tensor([[2]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": tiles[:, None].expand(1, ids.shape[1], 1, -1).clone(),
    }
