"""The table of families: every causal and vision-language family of the installed transformers, tiny, with drafts.

`discovery.py` finds the families, `shrink.py` and `overrides.py` make tiny configs, `build.py` random models of them,
`images.py` prompts with an image. `outcomes.py` compares drafted with plain text, in processes of `worker.py`.
`table.py` judges the outcomes against `exceptions.py` and keeps the verdicts in `table.json`. `test_model_table.py`
fails for what is neither right nor a known refusal. `page.py` writes docs/models.md.
"""
