"""The two halves of `cuda_ipc`."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from functools import partial

import numpy as np

from sglang_apb.transfer.decode.assembly import TransferError
from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.memory.pages import OFFER_BYTES
from sglang_apb.transfer.planes.base import Part, ReceiveHalf, ReceiveSide, SendHalf, SendSide
from sglang_apb.transfer.planes.cuda_ipc.handles import (
    MapMemory,
    MappingError,
    Memory,
    MemoryServer,
    RemotePool,
    map_pool,
)
from sglang_apb.transfer.prefill.transfer import Frames, Transfer
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Block, Frame, Kind, PageIds, WireError

logger = logging.getLogger(__name__)

NAME = "cuda_ipc"
_MAX_READERS = 4096
_PAGE_IDS = np.dtype("<u4")


class CudaIpcSend(SendHalf):
    """Decode ranks of this machine and user are given `memory`."""

    def __init__(self, side: SendSide, memory: Memory):
        self._side = side
        self._readers: set[bytes] = set()
        self._offered: set[Transfer] = set()
        self._server: MemoryServer | None = None
        try:
            self._server = MemoryServer(side.address, memory, self._hear_reader)
        except OSError as error:
            logger.warning("KV transfer: no process of this machine can map this rank's pool: %s", error)

    def serves(self, peer: bytes, item_lens: Sequence[int]) -> bool:
        return peer in self._readers

    def frames(self, transfer: Transfer, part: Part) -> Frames:
        for block, ids in part.blocks(OFFER_BYTES):
            self._offered.add(transfer)
            transfer.num_bytes += part.num_bytes(block)
            yield transfer.pack(Kind.OFFER, block.pack(), pack_page_ids(ids))

    def confirm(self, transfer: Transfer) -> None:
        if transfer in self._offered:  # `close` comes before its pages are freed
            self._side.reply(transfer.peer, transfer.pack(Kind.KEPT))

    def drop(self, transfer: Transfer) -> None:
        self._offered.discard(transfer)

    def lose(self, peer: bytes) -> None:
        self._readers.discard(peer)

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()

    def _hear_reader(self, peer: bytes) -> None:
        """It has mapped this rank's pool. In a thread of the server."""
        self._side.call(partial(self._add_reader, peer))

    def _add_reader(self, peer: bytes) -> None:
        if len(self._readers) < _MAX_READERS:
            self._readers.add(peer)


class CudaIpcReceive(ReceiveHalf):
    kinds = (Kind.OFFER, Kind.KEPT)

    def __init__(self, side: ReceiveSide, map_memory: MapMemory):
        self._side, self._map_memory = side, map_memory
        self._remote: RemotePool | None = None
        self._lock = threading.Lock()
        self._is_closed = False

    def open(self) -> None:
        threading.Thread(target=self._map, name="kv-map", daemon=True).start()

    def take(self, request: DecodeRequest, rank: int, frame: Frame) -> None:
        if frame.kind == Kind.KEPT:
            request.confirm(rank)
        elif self._remote is None:
            raise WireError(f"rank {rank} offered pages, and its pool is not mapped here")
        else:
            self._pull(request, rank, frame, self._remote)

    def close(self) -> None:
        """A process that ends leaves its memory to those who have it mapped: its successor may need it."""
        with self._lock:
            self._is_closed = True
            if self._remote is not None:
                _close(self._remote)

    def _pull(self, request: DecodeRequest, rank: int, frame: Frame, remote: RemotePool) -> None:
        item_lens = request.sources[rank].item_lens
        block, source_ids = parse_offer(frame, len(item_lens), len(request.pages), remote.num_pages)
        request.check_block(rank, block)
        try:
            remote.pull(request.parts[rank], block, source_ids, request.ids_of(block))
        except RuntimeError as error:
            raise TransferError(f"The KV pool of prefill rank {rank} could not be read: {error}") from error
        request.data_plane = NAME
        request.unconfirmed.add(rank)
        request.assembly.add_block(rank, block, wire.block_bytes(block, item_lens))

    def _map(self) -> None:
        try:
            map_pool(self._side.address, self._side.identity, self._map_memory, self._keep)
        except MappingError as error:
            reason = f"The KV pool of prefill rank {self._side.address} cannot be read where it lies: {error}"
            self._side.call(partial(self._side.give_up, reason))

    def _keep(self, remote: RemotePool) -> None:
        with self._lock:
            self._remote = remote
            logger.info("KV transfer: KV of prefill rank %s comes over %s", self._side.address, NAME)
            if self._is_closed:
                _close(remote)


def pack_page_ids(ids: PageIds) -> bytes:
    """The payload of an OFFER."""
    return ids.astype(_PAGE_IDS).tobytes()


def parse_offer(frame: Frame, num_buffers: int, num_pages: int, num_offered: int) -> tuple[Block, PageIds]:
    """The block of an OFFER frame, and where its pages are in the sender's pool of `num_offered` pages.

    Raises WireError as `wire.parse_block` does, and when a page is not in that pool.
    """
    block = wire.block_of(frame, num_buffers, num_pages)
    wire.check_payload(frame, block, block.num_pages * _PAGE_IDS.itemsize)
    ids = np.frombuffer(frame.payload or b"", _PAGE_IDS).astype(np.int64)
    if ids.max() >= num_offered:
        raise WireError(f"OFFER: page {ids.max()} of a pool of {num_offered}")
    return block, ids


def _close(remote: RemotePool) -> None:
    try:
        remote.close()
    except MappingError as error:
        logger.warning("KV transfer: a prefill rank's pool could not be unmapped: %s", error)
