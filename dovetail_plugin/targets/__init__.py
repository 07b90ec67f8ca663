"""Targets: what the loop needs of a model, whatever library runs it.

`base` holds the contracts, `transformers_model` fulfils them for transformers' own models, `engine` finds the engine
of any model, `config_sizes` reads the sizes of a config, `layers_on_gpu` moves layers of a target to a GPU. Adapters
fulfil the same contracts.
"""
