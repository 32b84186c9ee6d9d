"""Prefill side: the frames that bring a request's pages, or say where they lie."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from sglang_apb.transfer import wire
from sglang_apb.transfer.exchange import SendingChannel
from sglang_apb.transfer.outbox import Frames, SendRoom
from sglang_apb.transfer.ownership import PageRange
from sglang_apb.transfer.pages import BLOCK_BYTES, OFFER_BYTES, Pages, plan_blocks
from sglang_apb.transfer.wire import Block, End, Kind, PageIds


def sent(room: SendRoom, pool: Pages, buffers: range, pages: PageRange, ids: PageIds) -> Frames:
    """Pages [start, end) of the request, which are pages `ids` of `pool`, in `buffers`, with their bytes."""
    for block, ids_of_block in _cut(pool.item_lens, buffers, pages, ids, BLOCK_BYTES):
        payload = pool.gather(block.first_buffer, block.num_buffers, ids_of_block)
        room.num_bytes += payload.nbytes
        yield wire.pack(Kind.DATA, room.room, room.attempt, block.pack(), payload.data, room.asker)


def offered(room: SendRoom, pool: Pages, buffers: range, pages: PageRange, ids: PageIds) -> Frames:
    """The same for a decode rank that has mapped `pool`."""
    for block, ids_of_block in _cut(pool.item_lens, buffers, pages, ids, OFFER_BYTES):
        room.is_offered = True
        room.num_bytes += wire.block_bytes(block, pool.item_lens)
        payload = wire.pack_page_ids(ids_of_block)
        yield wire.pack(Kind.OFFER, room.room, room.attempt, block.pack(), payload, room.asker)


def held(
    room: SendRoom,
    item_lens: Sequence[int],
    buffers: range,
    pages: PageRange,
    ids: PageIds,
    channel: SendingChannel,
    part: range,
) -> Frames:
    """The same, of the heads `part`, for a decode rank to which there is a channel: it fetches them."""
    for block, ids_of_block in _cut(item_lens, buffers, pages, ids, channel.slot_bytes):
        while channel.is_full:
            yield None
        room.held[block] = channel.hold(part, block, ids_of_block)
        room.in_use.append(room.held[block])
        room.num_bytes += wire.block_bytes(block, item_lens)
        yield wire.pack(Kind.READY, room.room, room.attempt, block.pack(), asker=room.asker)


def tail(room: SendRoom, aux: Pages, aux_index: int | None, info: dict[str, int | str]) -> Frames:
    """The aux row, if this rank has it, and the end."""
    if aux_index is not None:
        row = aux.gather(0, len(aux.item_lens), np.array([aux_index], np.int64))
        yield wire.pack(Kind.AUX, room.room, room.attempt, b"", row.data, room.asker)
    yield room.pack(End(room.num_bytes, room.num_hidden_bytes, info))


def _cut(
    item_lens: Sequence[int], buffers: range, pages: PageRange, ids: PageIds, block_bytes: int
) -> Iterator[tuple[Block, PageIds]]:
    first_page, end_page = pages
    for block in plan_blocks(item_lens, buffers, first_page, end_page - first_page, block_bytes):
        start = block.first_page - first_page
        yield block, ids[start : start + block.num_pages]
