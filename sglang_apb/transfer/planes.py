"""Which way a pair of ranks moves pages: `data_plane` of `--kv-transfer-config`."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch

from sglang_apb.transfer.communicator import new_id
from sglang_apb.transfer.config import AUTO, CUDA_IPC, NCCL, OPTION, ZMQ, TransferConfig
from sglang_apb.transfer.cuda_ipc import CudaRemotePool, export
from sglang_apb.transfer.direct import DirectError, Memory
from sglang_apb.transfer.exchange import NUM_SLOTS, Meeting
from sglang_apb.transfer.gpu_pages import CudaPages
from sglang_apb.transfer.nccl import NcclReceiver, NcclSender, find_memory
from sglang_apb.transfer.pages import HostPages
from sglang_apb.transfer.ways import Ways

logger = logging.getLogger(__name__)


def memory_to_offer(pages: HostPages | CudaPages, heads: range, plane: str) -> Memory | None:
    """Prefill: what decode ranks of this machine need to read `pages` where they lie; None when they cannot.

    Raises ValueError when the setting asks for what is not possible.
    """
    if not _is_possible(pages, plane, CUDA_IPC) or isinstance(pages, HostPages):
        return None
    try:
        return export(pages, heads)
    except DirectError as error:
        if plane == CUDA_IPC:
            raise ValueError(_refusal(plane, str(error))) from error
        logger.info("KV transfer: this rank's pool cannot be read where it lies: %s", error)
        return None


def meeting(pages: HostPages | CudaPages, heads: range, page_size: int, config: TransferConfig) -> Meeting | None:
    """Either side: how channels are made; None when they are not to be. NCCL opens ports of its own and does not
    encrypt: both sides have to name it, or to say that nobody else is on the network.

    Raises ValueError when the setting asks for what is not possible.
    """
    is_meant = config.data_plane == NCCL or (config.allow_unencrypted and config.secret_key is None)
    if not _is_possible(pages, config.data_plane, NCCL) or not is_meant or isinstance(pages, HostPages):
        return None
    slot_bytes = (config.nccl_buffer_mb << 20) // NUM_SLOTS
    if (page_bytes := max(pages.item_lens)) > slot_bytes:
        raise ValueError(
            f"nccl_buffer_mb {config.nccl_buffer_mb} of {OPTION} holds no {NUM_SLOTS} pages of {page_bytes} bytes: use "
            f"{NUM_SLOTS * page_bytes + (1 << 20) - 1 >> 20} or more, or data_plane {ZMQ!r}."
        )
    device = pages.buffers[0].device
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    side: dict[str, Any] = {"pages": pages, "heads": heads, "page_size": page_size}
    ends = partial(NcclSender, **side), partial(NcclReceiver, **side)
    return Meeting(gpu, new_id, *ends, slot_bytes, partial(find_memory, device=device))


def ways(pages: HostPages | CudaPages, heads: range, page_size: int, config: TransferConfig) -> Ways:
    """Decode: the ways to try.

    Raises ValueError when the setting asks for what is not possible.
    """
    map_memory, plane = None, config.data_plane
    if _is_possible(pages, plane, CUDA_IPC) and not isinstance(pages, HostPages):
        map_memory = partial(CudaRemotePool, pages=pages, heads=heads, page_size=page_size)
    channels = meeting(pages, heads, page_size, config)
    return Ways(map_memory, channels, zmq_too=plane in (AUTO, ZMQ))


def _is_possible(pages: HostPages | CudaPages, plane: str, wanted: str) -> bool:
    """Whether the setting allows `wanted`, and KV is in GPU memory."""
    if plane == wanted and isinstance(pages, HostPages):
        raise ValueError(_refusal(plane, "KV is not in GPU memory"))
    return plane in (AUTO, wanted) and not isinstance(pages, HostPages)


def _refusal(plane: str, reason: str) -> str:
    return f"data_plane {plane!r} of {OPTION} is not possible here ({reason}): use {AUTO!r} or {ZMQ!r}."
