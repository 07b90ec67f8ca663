"""Runs transformers' own tests of `generate` with drafts: `python -m upstream CHECKOUT`.

Nothing of transformers is copied: pytest runs in a checkout of it, with `plugin.py`, which wraps `generate`.
`drafting.py` is the wrapper, `stand_ins.py` lets tests of one version be imported with another one, `runs.py` starts
pytest for each way of drafting, and `judgement.py` finds differences that `differences.py` does not explain.
`outcomes.json` has the results of the latest run. Our own pytest does not collect this folder.
"""
