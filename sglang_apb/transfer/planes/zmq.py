"""Pages through host memory and the ZMQ sockets, in DATA frames. Everywhere, and until another plane is ready."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.memory.pages import BLOCK_BYTES
from sglang_apb.transfer.planes.base import Part, ReceiveHalf, SendHalf
from sglang_apb.transfer.prefill.transfer import Frames, Transfer
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Frame, Kind


class ZmqSend(SendHalf):
    def serves(self, peer: bytes, item_lens: Sequence[int]) -> bool:
        return True

    def frames(self, transfer: Transfer, part: Part) -> Frames:
        for block, ids in part.blocks(BLOCK_BYTES):
            payload = part.pages.gather(block.first_buffer, block.num_buffers, ids)
            transfer.num_bytes += payload.nbytes
            yield transfer.pack(Kind.DATA, block.pack(), payload.data)


class ZmqReceive(ReceiveHalf):
    kinds = (Kind.DATA,)

    def take(self, request: DecodeRequest, rank: int, frame: Frame) -> None:
        pages = request.sources[rank]
        block = wire.parse_block(frame, pages.item_lens, len(request.pages))
        request.check_block(rank, block)
        payload = frame.payload or b""
        pages.scatter(block.first_buffer, block.num_buffers, request.ids_of(block), payload)
        request.assembly.add_block(rank, block, len(payload))
