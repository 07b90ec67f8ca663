"""Drafts: everything that proposes tokens.

`base` contains the contract that generation works with. `model` is the project's own draft; `small_model` and
`prompt_lookup` are two others. `feature_drafter` grows trees; `cuda_graphs` runs a draft's steps faster on a GPU.
"""
