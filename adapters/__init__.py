"""Targets and servers other than transformers' own models; imported as `dovetail_plugin.adapters`.

Each module imports its library when it is imported itself, and nothing else does.
"""
