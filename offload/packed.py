"""Several small tensors between host and GPU in one transfer: each by itself would cost a wait or a copy of its own."""

from collections.abc import Sequence

import torch


def to_host(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors on the host; the one wait is for the last of them to arrive.

    Args:
        tensors: on one device, those of larger elements first; on the host they are returned as they are.
    """
    device = tensors[0].device
    if device.type == "cpu":
        return list(tensors)
    packed = _bytes(tensors)
    host = torch.empty(packed.shape, dtype=torch.uint8, device="cpu", pin_memory=True)
    host.copy_(packed, non_blocking=True)
    torch.cuda.current_stream(device).synchronize()
    return _unpacked(host, tensors)


def to_device(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors on a device; the host does not wait.

    Args:
        tensors: on the host, those of larger elements first, or on the device already: these are returned as they are.
            What lies on another GPU is copied by itself.
    """
    here = [each for each in tensors if each.device.type == "cpu"]
    if device.type == "cpu" or not here:
        return [each.to(device) for each in tensors]
    # PyTorch gives pinned memory to nobody else before the copy has read it.
    there = iter(_unpacked(_bytes(here).pin_memory().to(device, non_blocking=True), here))
    return [next(there) if each.device.type == "cpu" else each.to(device) for each in tensors]


def _bytes(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([each.contiguous().flatten().view(torch.uint8) for each in tensors])


def _unpacked(packed: torch.Tensor, like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    parts = packed.split([each.nbytes for each in like])
    return [part.view(each.dtype).view(each.shape) for part, each in zip(parts, like, strict=True)]
