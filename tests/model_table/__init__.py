"""The table of families: every causal and vision-language family of the installed transformers, tiny, with drafts.

`discovery.py` finds the families, `shrink.py` and `overrides.py` make tiny configs, `build.py` random models of them.
`outcomes.py` compares drafted with plain text, in a process of its own that `worker.py` starts. `refusals.py` holds
what cannot work, with reasons; `test_model_table.py` fails for everything else. `page.py` writes docs/models.md.
"""
