"""A decode rank's half of `nccl`: its channel to one prefill rank, and the blocks that it fetches."""

from __future__ import annotations

import logging
import threading
from functools import partial

from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.planes.base import ReceiveHalf, ReceiveSide
from sglang_apb.transfer.planes.nccl.channels import (
    MIN_SLOT_BYTES,
    NAME,
    NUM_SLOTS,
    ChannelError,
    ChannelMaker,
    Join,
    ReceivingChannel,
)
from sglang_apb.transfer.planes.nccl.fetcher import Fetch, Fetcher
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Frame, Kind, WireError

logger = logging.getLogger(__name__)


class NcclReceive(ReceiveHalf):
    """The channel is asked for and made in threads of their own."""

    kinds = (Kind.READY,)
    pair_kinds = (Kind.JOIN,)

    def __init__(self, side: ReceiveSide, maker: ChannelMaker):
        self._side, self._maker = side, maker
        self.fetcher: Fetcher | None = None
        self._is_closed = self._is_waiting = False

    def open(self) -> None:
        threading.Thread(target=self._find_memory, name="kv-channel", daemon=True).start()

    def take(self, request: DecodeRequest, rank: int, frame: Frame) -> None:
        """A block that is ready."""
        if self.fetcher is None:
            raise WireError(f"rank {rank} has a block ready, and there is no channel to it")
        item_lens = request.sources[rank].item_lens
        block = wire.block_of(frame, len(item_lens), len(request.pages))
        request.check_block(rank, block)
        num_bytes, most = wire.block_bytes(block, item_lens), self.fetcher.channel.slot_bytes
        if num_bytes > most:
            raise WireError(f"rank {rank} has a block of {num_bytes} bytes ready, at most {most} are fetched")
        request.data_plane = NAME
        request.wait_for(rank, block, at_most=2 * NUM_SLOTS)  # in slots of its own, and of this side
        self.fetcher.add(Fetch(request, rank, block, num_bytes))

    def hear(self, frame: Frame) -> None:
        """What a prefill rank answers: where to meet, or why not, or not any more.

        Raises WireError when it was not asked, or has answered.
        """
        join = Join.parse(frame)
        if not join.reason and not self._is_waiting:
            raise WireError("JOIN that nobody asked for")
        self._is_waiting = False
        if self.fetcher is not None:
            for request in self.fetcher.requests:
                self._side.fail(request, f"The channel to prefill rank {self._side.address} is closed ({join.reason}).")
            self.fetcher.close()
            self.fetcher = None
        if join.reason:
            self._do_without(join.reason)
        else:
            make = partial(self._make, join.unique_id, join.slot_bytes)
            threading.Thread(target=make, name="kv-channel", daemon=True).start()

    def check(self) -> bool:
        if self.fetcher is None or not self.fetcher.is_busy:
            return False
        try:
            self.fetcher.check()
        except ChannelError as error:
            self._break(str(error))
        return True

    def end_if_stuck(self, request: DecodeRequest, seconds: float) -> None:
        if self.fetcher is not None and request in self.fetcher.requests and self.fetcher.idle_seconds > seconds:
            self._break(f"nothing has come for {seconds:g} s, and a request that has ended waits for it")

    def close(self) -> None:
        self._is_closed = True
        if self.fetcher is not None:
            self.fetcher.close()

    def _find_memory(self) -> None:
        try:
            self._maker.check_memory(self._maker.slot_bytes)
        except RuntimeError as error:
            reason = f"There can be no channel to prefill rank {self._side.address}: {error}"
            self._side.call(partial(self._side.give_up, reason))
        else:
            self._side.call(self._ask)

    def _ask(self) -> None:
        if not self._is_closed:
            self._is_waiting = True
            self._side.send(Join(gpu=self._maker.gpu, slot_bytes=self._maker.slot_bytes).pack())

    def _make(self, unique_id: bytes, slot_bytes: int) -> None:
        call = self._side.call
        try:
            if not MIN_SLOT_BYTES <= slot_bytes <= self._maker.slot_bytes:
                raise ChannelError(f"it wants slots of {slot_bytes} bytes, of {self._maker.slot_bytes}")
            channel = self._maker.receiver(unique_id, slot_bytes, self._tell_broken)
        except Exception as error:
            call(partial(self._do_without, str(error)))
        else:
            call(partial(self._keep, channel, unique_id))

    def _keep(self, channel: ReceivingChannel, unique_id: bytes) -> None:
        if self._is_closed:
            channel.close()
            return
        logger.info("KV transfer: KV of prefill rank %s comes over %s", self._side.address, NAME)
        self.fetcher = Fetcher(channel, self._side)
        self._side.send(Join(unique_id=unique_id).pack())

    def _tell_broken(self, error: str) -> None:
        self._side.call(partial(self._break, error))

    def _break(self, error: str) -> None:
        if not self._is_closed and self.fetcher is not None:
            self._side.lose(f"The channel to prefill rank {self._side.address} does not work ({error}).")

    def _do_without(self, reason: str) -> None:
        self._side.give_up(f"There is no channel to prefill rank {self._side.address}: {reason}")
