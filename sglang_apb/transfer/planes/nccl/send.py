"""A prefill rank's half of `nccl`: its channels, and the blocks that wait to be fetched."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from sglang_apb.transfer.planes.base import Part, SendHalf, SendSide
from sglang_apb.transfer.planes.nccl.channels import (
    MIN_SLOT_BYTES,
    ChannelMaker,
    Held,
    Join,
    SendingChannel,
    parse_fetch,
)
from sglang_apb.transfer.prefill.transfer import Frames, Transfer
from sglang_apb.transfer.protocol.wire import Block, Frame, Kind, WireError

logger = logging.getLogger(__name__)

# Each has a thread until the other side has come, or has not for too long.
MAX_MAKING = 16


@dataclass
class _End:
    """Of a channel to one decode rank."""

    channel: SendingChannel | None = None
    is_met: bool = False  # the other side has its end


@dataclass
class _Blocks:
    """Of one transfer: those that wait to be fetched, and those whose pages may still be read."""

    held: dict[Block, Held] = field(default_factory=dict)
    in_use: deque[Held] = field(default_factory=deque)


class NcclSend(SendHalf):
    """Without a `maker` it only answers that there are no channels. Ends are made in threads of their own."""

    kinds = (Kind.JOIN, Kind.FETCH)

    def __init__(self, side: SendSide, maker: ChannelMaker | None):
        self._side, self._maker = side, maker
        self._ends: dict[bytes, _End] = {}
        self._num_making = 0
        self._blocks: dict[Transfer, _Blocks] = {}

    def channel(self, peer: bytes) -> SendingChannel | None:
        """None while one of the ends is missing."""
        end = self._ends.get(peer)
        return end.channel if end is not None and end.is_met else None

    def held(self, transfer: Transfer) -> dict[Block, Held]:
        return self._blocks.setdefault(transfer, _Blocks()).held

    def serves(self, peer: bytes, item_lens: Sequence[int]) -> bool:
        channel = self.channel(peer)
        return channel is not None and max(item_lens) <= channel.slot_bytes

    def frames(self, transfer: Transfer, part: Part) -> Frames:
        channel = self.channel(transfer.peer)
        assert channel is not None, "serves() was asked"
        for block, ids in part.blocks(channel.slot_bytes):
            while channel.is_full:
                yield None
            held = channel.hold(part.heads, block, ids)
            self.held(transfer)[block] = held
            self._blocks[transfer].in_use.append(held)
            transfer.num_bytes += part.num_bytes(block)
            yield transfer.pack(Kind.READY, block.pack())

    def take(self, peer: bytes, frame: Frame) -> None:
        if frame.kind == Kind.FETCH:
            self._send(peer, frame)
        else:
            self._join(peer, Join.parse(frame))

    def is_read(self, transfer: Transfer) -> bool:
        blocks = self._blocks.get(transfer)
        if blocks is None:
            return True
        while blocks.in_use and blocks.in_use[0].needs_no_pages:
            blocks.in_use.popleft()
        return not (blocks.held or blocks.in_use)

    def drop(self, transfer: Transfer) -> None:
        blocks = self._blocks.pop(transfer, None)
        for held in blocks.held.values() if blocks else ():
            held.drop()

    def lose(self, peer: bytes) -> None:
        end = self._ends.pop(peer, None)
        if end is not None and end.channel is not None:
            end.channel.close()

    def shut_out(self, peer: bytes) -> None:
        if self.channel(peer) is not None:
            self.break_channel(peer, "its key has been revoked")

    def break_channel(self, peer: bytes, error: str) -> None:
        """Its requests fail; later ones go by another plane."""
        reason = f"The channel to the decode server does not work ({error})."
        self._side.fail_all(peer, reason)
        self.lose(peer)
        self.refuse(peer, reason)

    def refuse(self, peer: bytes, reason: str) -> None:
        """Tells it why there is no channel, or not any more."""
        self._answer(peer, Join(reason=reason[:2000]))

    def _answer(self, peer: bytes, join: Join) -> None:
        self._side.reply(peer, join.pack())

    def _send(self, peer: bytes, frame: Frame) -> None:
        """Sends a block for which the other side waits: with what it has, if the request is gone."""
        channel = self.channel(peer)
        if channel is None:
            raise WireError("FETCH without a channel")
        block, num_bytes = parse_fetch(frame, channel.slot_bytes)
        transfer = self._side.find_asked(peer, frame)
        held = self.held(transfer).get(block) if transfer is not None else None
        if transfer is None or held is None:
            channel.send_nothing(num_bytes)
        elif held.num_bytes != num_bytes:
            raise WireError(f"FETCH: {num_bytes} bytes of a block of {held.num_bytes}")
        else:
            del self.held(transfer)[block]
            held.send()

    def _join(self, peer: bytes, join: Join) -> None:
        if self._maker is None:
            self.refuse(peer, "the prefill server's data_plane does not allow it")
        elif peer in self._ends:
            self._ends[peer].is_met |= bool(join.unique_id)
        elif join.unique_id:
            self.refuse(peer, "the prefill server has no such channel, or not any more")
        elif join.gpu == self._maker.gpu:
            self.refuse(peer, "both ranks are on one GPU")
        elif self._num_making >= MAX_MAKING:
            self.refuse(peer, f"{MAX_MAKING} channels are being made already")
        elif (slot_bytes := min(join.slot_bytes, self._maker.slot_bytes)) < MIN_SLOT_BYTES:
            self.refuse(peer, f"slots of {slot_bytes} bytes are less than {MIN_SLOT_BYTES}")
        else:
            self._ends[peer] = _End()
            self._num_making += 1
            make = partial(self._make, peer, slot_bytes, self._maker)
            threading.Thread(target=make, name="kv-channel", daemon=True).start()

    def _make(self, peer: bytes, slot_bytes: int, maker: ChannelMaker) -> None:
        call = self._side.call
        try:
            maker.check_memory(slot_bytes)
            unique_id = maker.new_id()
            call(partial(self._answer, peer, Join(unique_id=unique_id, slot_bytes=slot_bytes)))
            channel = maker.sender(unique_id, slot_bytes, partial(self._tell_broken, peer), partial(call, _wake_up))
        except Exception as error:
            logger.warning("KV transfer: no channel to a decode rank: %s", error)
            call(partial(self._give_up, peer, str(error)))
        else:
            call(partial(self._add, peer, channel))

    def _tell_broken(self, peer: bytes, error: str) -> None:
        self._side.call(partial(self.break_channel, peer, error))

    def _give_up(self, peer: bytes, reason: str) -> None:
        self._num_making -= 1
        if peer in self._ends:
            self.refuse(peer, reason)
        self.lose(peer)

    def _add(self, peer: bytes, channel: SendingChannel) -> None:
        self._num_making -= 1
        if peer in self._ends:
            self._ends[peer].channel = channel
        else:  # lost meanwhile
            channel.close()


def _wake_up() -> None:
    """The endpoint looks again whether pages are read: whatever it is called for."""
