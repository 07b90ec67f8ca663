"""Draft checkpoints: `read` reads those of other projects, `load` helps `DovetailDraft.from_pretrained`."""
