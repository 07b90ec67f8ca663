"""The device-split policy: which part runs on which device, and how many tokens to draft in each round."""

from .device_split import DeviceSplitPolicy
from .settings import PolicySettings

__all__ = ["DeviceSplitPolicy", "PolicySettings"]
