"""The device-split policy: a plan before loading, and how many tokens to draft in each round."""

from .device_split import DeviceSplitPolicy

__all__ = ["DeviceSplitPolicy"]
