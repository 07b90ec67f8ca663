"""Targets: engines that run a model, and sessions that generate with it, for any library.

`base` contains the protocols, `transformers_model` implements them for transformers' own models, `engine` finds the
engine of a model, `config_sizes` reads the sizes of a config, and `layers_on_gpu` moves layers of a target to a GPU.
Adapters implement the same protocols.
"""
