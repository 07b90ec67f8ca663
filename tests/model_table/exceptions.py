"""Families that are not drafted, with the reasons, and nothing else: whatever is not here must be right.

Refusals themselves are in `table.json`, with the message that a user gets.
"""

TIMM = "its vision tower is in timm, which the tests do not install"
PIXELS = "`generate` needs an image: there is no text-only prompt"
STATES = "a draft model itself: it reads the states of its target"
UPSTREAM = "plain `generate` fails in transformers 5.24"
NO_TEXT = "each step has several codebook tokens: the output is sound, not text"

NOT_BUILT = {
    "blip": PIXELS,
    "blip-2": PIXELS,
    "blt": f"{UPSTREAM}: its config has no num_hidden_layers for the cache",
    "diffusion_gemma": "generates blocks by diffusion, not one token after another",
    "gemma3n": TIMM,
    "gemma4_assistant": STATES,
    "gemma4_unified_assistant": STATES,
    "idefics": PIXELS,
    "instructblip": PIXELS,
    "instructblipvideo": PIXELS,
    "llama4:Llama4ForConditionalGeneration": f"{UPSTREAM}: it reads image_outputs of a text model's output",
    "musicgen": NO_TEXT,
    "musicgen_melody": NO_TEXT,
    "pi0": "generates actions of a robot, and has no `generate`",
    "pp_formulanet": "encoder-decoder model without input embeddings that transformers finds",
}
"""Family -> why the table has no model of it."""

ITS_OWN_PIXELS = "its processor prepares pixels in a form that the table does not make"
NO_PLACE = "its config names no token for the rows of an image"

NO_IMAGE = {
    "chameleon": "images become tokens through a vocabulary that a tiny model does not have",
    "cosmos3_edge": ITS_OWN_PIXELS,
    "deepseek_ocr2": ITS_OWN_PIXELS,
    "emu3:Emu3ForConditionalGeneration": "images become tokens through a vocabulary that a tiny model does not have",
    "evolla": "reads proteins, not images",
    "fast_vlm": TIMM,
    "fuyu": ITS_OWN_PIXELS,
    "git": NO_PLACE,
    "granite4_vision": ITS_OWN_PIXELS,
    "granite_docling": ITS_OWN_PIXELS,
    "inkling2": ITS_OWN_PIXELS,
    "inkling2_loop": ITS_OWN_PIXELS,
    "inkling_mm_model": ITS_OWN_PIXELS,
    "kosmos-2": NO_PLACE,
    "kosmos-2.5": NO_PLACE,
    "minicpm_ocr": NO_PLACE,
    "minicpmv4_6": NO_PLACE,
    "minicpmv4_7": NO_PLACE,
    "mistral4": NO_PLACE,
    "molmo2": ITS_OWN_PIXELS,
    "muse_glimmer": ITS_OWN_PIXELS,
    "muse_spark": ITS_OWN_PIXELS,
    "nemotron_h_omni": NO_PLACE,
    "unlimited_ocr": ITS_OWN_PIXELS,
    "video_llama_3": ITS_OWN_PIXELS,
}
"""Vision-language family -> why the table has no image prompt for it."""

CONVOLUTIONS = "its layers keep short convolutions, which Dovetail does not take back yet"

REFUSED_ALTHOUGH_STOCK_IS_RIGHT: dict[str, str] = {
    "inkling2": CONVOLUTIONS,
    "inkling2_loop": CONVOLUTIONS,
    "inkling2_loop_text": CONVOLUTIONS,
    "inkling2_text": CONVOLUTIONS,
    "inkling_mm_model": CONVOLUTIONS,
    "inkling_text": CONVOLUTIONS,
    "lfm2_moe": CONVOLUTIONS,
    "lfm3": CONVOLUTIONS,
    "lfm3_vl": CONVOLUTIONS,
}
"""Family -> why Dovetail refuses what transformers' prompt lookup can do."""

ONE_TOKEN_A_PASS = {
    "llama/dynamic": "beyond the boundary of dynamic NTK each token has another rotation",
    "phi4_multimodal": "beyond the boundary of longrope plain `generate` begins a new cache for each token",
}
"""Family -> why long acceptances end in the middle of the text."""

LONGROPE_BEFORE_5_24 = ("phi3", "phi3/longrope", "phimoe/longrope")
"""Before transformers 5.24, plain `generate` began a new cache for each token of these beyond longrope's boundary."""
