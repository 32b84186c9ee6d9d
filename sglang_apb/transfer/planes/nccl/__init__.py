"""Blocks that the decode rank fetches from GPU to GPU, over a channel for which both sides must be ready at once.

    decode    JOIN: its GPU, slot bytes  -->
              <--  JOIN: where to meet, or why not     prefill
              both make their end of the channel (`channel.py`)
    decode    JOIN: it has its end       -->           from here on blocks are not sent but said to be READY
              <--  READY: a block                      which is copied into a slot meanwhile,
    decode has a slot free, waits for the block there  where its pages are not in a row
              FETCH: the block           -->           the block goes over the channel
    decode copies it into its pool,
    where it has not come straight to its pages
              <--  END, when every block has been fetched, and no page is read any more

A send that nobody waits for would hold multiprocessors of the prefill rank's GPU, and one peer that hangs all others.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from sglang_apb.transfer.memory.pages import HostPages
from sglang_apb.transfer.planes.base import OpenReceive, OpenSend, Pool, impossible
from sglang_apb.transfer.planes.nccl.channel import NcclReceiver, NcclSender, find_memory
from sglang_apb.transfer.planes.nccl.channels import NAME, NUM_SLOTS, ChannelMaker
from sglang_apb.transfer.planes.nccl.communicator import new_id
from sglang_apb.transfer.planes.nccl.receive import NcclReceive
from sglang_apb.transfer.planes.nccl.send import NcclSend
from sglang_apb.transfer.planes.table import ZMQ
from sglang_apb.transfer.protocol.config import OPTION, TransferConfig


def send_half(pool: Pool, config: TransferConfig) -> OpenSend:
    return partial(NcclSend, maker=channel_maker(pool, config))


def receive_half(pool: Pool, config: TransferConfig) -> OpenReceive | None:
    maker = channel_maker(pool, config)
    return None if maker is None else partial(NcclReceive, maker=maker)


def channel_maker(pool: Pool, config: TransferConfig) -> ChannelMaker | None:
    """None when there are to be no channels. NCCL opens ports of its own and does not encrypt: both sides have to name
    it, or to say that nobody else is on the network.

    Raises ValueError when the setting asks for what is not possible.
    """
    pages = pool.pages
    if isinstance(pages, HostPages):
        if config.plane == NAME:
            raise impossible(NAME, "KV is not in GPU memory")
        return None
    is_meant = config.plane == NAME or (config.allow_unencrypted and config.secret_key is None)
    if not config.may_use(NAME) or not is_meant:
        return None
    slot_bytes = (config.nccl_buffer_mb << 20) // NUM_SLOTS
    if (page_bytes := max(pages.item_lens)) > slot_bytes:
        raise ValueError(
            f"nccl_buffer_mb {config.nccl_buffer_mb} of {OPTION} holds no {NUM_SLOTS} pages of {page_bytes} bytes: use "
            f"{NUM_SLOTS * page_bytes + (1 << 20) - 1 >> 20} or more, or data_plane {ZMQ!r}."
        )
    device = pages.buffers[0].device
    gpu = str(torch.cuda.get_device_properties(device).uuid)
    side: dict[str, Any] = {"pages": pages, "heads": pool.heads, "page_size": pool.page_size}
    ends = partial(NcclSender, **side), partial(NcclReceiver, **side)
    return ChannelMaker(gpu, new_id, *ends, slot_bytes, partial(find_memory, device=device))
