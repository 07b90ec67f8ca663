"""The device-split policy, which decides where parts run and how many tokens each round drafts."""

from .device_split import DeviceSplitPolicy
from .settings import PolicySettings

__all__ = ["DeviceSplitPolicy", "PolicySettings"]
