"""Stand-ins for a GPU on a machine without one."""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only


class FakeCuda(TorchFunctionMode):
    """Lets fake "cuda" tensors through the few calls that want a CUDA build before FakeTensorMode sees them.

    Moves go straight to the dispatcher; indexing and attention are run on shapes alone, after the check that
    FakeTensorMode makes everywhere else: all tensors on one device.
    """

    ON_SHAPES = (torch.Tensor.__getitem__, torch.Tensor.__setitem__, F.scaled_dot_product_attention)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.to:
            device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **kwargs)
            tensor = args[0]
            return torch.ops.aten._to_copy(tensor, device=device or tensor.device, dtype=dtype or tensor.dtype)
        if func not in self.ON_SHAPES:
            return func(*args, **kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        devices = {t.device for t in tensors}
        if len(devices) > 1:
            raise RuntimeError(f"{func.__name__} mixes devices: {devices}")
        meta_args, meta_kwargs = tree_map_only(
            torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), (args, kwargs)
        )
        out = func(*meta_args, **meta_kwargs)
        return tree_map_only(torch.Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device=tensors[0].device), out)


def move(module, device):
    """`module.to(device)` for fake tensors on builds without that device."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.ops.aten._to_copy(tensor, device=device)
    return module
