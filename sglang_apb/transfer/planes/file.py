"""Pages through files in a folder that both servers name: `data_plane` "file:FOLDER". Slow; an example of a plane.

    a prefill rank leaves its address in the folder
    decode    FOUND: it has seen the address there  -->
              <--  WRITTEN: a block, and the file that has its bytes     prefill
    decode reads the file, and removes it

A file is named by 128 random bits, and is written before it is spoken of. Those that nobody has read go with their
request.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.memory.pages import BLOCK_BYTES
from sglang_apb.transfer.planes.base import (
    OpenReceive,
    OpenSend,
    Part,
    Pool,
    ReceiveHalf,
    ReceiveSide,
    SendHalf,
    SendSide,
    impossible,
)
from sglang_apb.transfer.prefill.transfer import Frames, Transfer
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.config import TransferConfig
from sglang_apb.transfer.protocol.wire import Frame, WireError

NAME = "file"
FOUND, WRITTEN = wire.PLANE_KINDS[0], wire.PLANE_KINDS[1]
_NAME_BYTES = 16


def send_half(pool: Pool, config: TransferConfig) -> OpenSend | None:
    folder = _folder(config)
    return None if folder is None else partial(FileSend, folder=folder)


def receive_half(pool: Pool, config: TransferConfig) -> OpenReceive | None:
    folder = _folder(config)
    return None if folder is None else partial(FileReceive, folder=folder)


def _folder(config: TransferConfig) -> Path | None:
    if not config.may_use(NAME):
        return None
    folder = Path(config.plane_argument)
    if not folder.is_dir():
        raise impossible(config.data_plane, "there is no such folder")
    return folder


class FileSend(SendHalf):
    kinds = (FOUND,)

    def __init__(self, side: SendSide, folder: Path):
        self._folder, self._readers = folder, set[bytes]()
        self._files: defaultdict[Transfer, list[Path]] = defaultdict(list)
        (folder / side.address).touch()

    def take(self, peer: bytes, frame: Frame) -> None:
        self._readers.add(peer)

    def serves(self, peer: bytes, item_lens: Sequence[int]) -> bool:
        return peer in self._readers

    def frames(self, transfer: Transfer, part: Part) -> Frames:
        for block, ids in part.blocks(BLOCK_BYTES):
            name = secrets.token_bytes(_NAME_BYTES)
            file = self._folder / name.hex()
            self._files[transfer].append(file)
            file.write_bytes(part.pages.gather(block.first_buffer, block.num_buffers, ids).data)
            transfer.num_bytes += part.num_bytes(block)
            yield transfer.pack(WRITTEN, block.pack(), name)

    def drop(self, transfer: Transfer) -> None:
        for file in self._files.pop(transfer, ()):
            file.unlink(missing_ok=True)

    def lose(self, peer: bytes) -> None:
        self._readers.discard(peer)


class FileReceive(ReceiveHalf):
    kinds = (WRITTEN,)

    def __init__(self, side: ReceiveSide, folder: Path):
        self._side, self._folder = side, folder

    def open(self) -> None:
        if (self._folder / self._side.address).exists():
            self._side.send(wire.pack(FOUND, 0, 0))
        else:
            reason = f"Prefill rank {self._side.address} does not use the folder {self._folder}."
            self._side.call(partial(self._side.give_up, reason))

    def take(self, request: DecodeRequest, rank: int, frame: Frame) -> None:
        pages = request.sources[rank]
        block, name = wire.block_of(frame, len(pages.item_lens), len(request.pages)), bytes(frame.payload or b"")
        request.check_block(rank, block)
        file, num_bytes = self._folder / name.hex(), wire.block_bytes(block, pages.item_lens)
        if len(name) != _NAME_BYTES or not file.is_file() or file.stat().st_size != num_bytes:
            raise WireError(f"rank {rank} has not written {block} to {file}")
        pages.scatter(block.first_buffer, block.num_buffers, request.ids_of(block), file.read_bytes())
        file.unlink()
        request.data_plane = NAME
        request.assembly.add_block(rank, block, num_bytes)
