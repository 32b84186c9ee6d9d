"""One process reads another's KV pool where it lies: what it needs for that goes over a Unix socket.

    prefill rank                              decode rank
    listens at the abstract name "HOST:PORT"  connects, if it is on the same machine
    Memory: handles on its pool          -->  maps the pool
    its name among the ZMQ connections   <--  from here on it is offered blocks instead of being sent them

Both ends ask the kernel who the other one is: only processes of the same user get or take a handle, since whoever maps
a pool could also write to it. An abstract name goes with its process, and no other host or network namespace sees it.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from typing import Annotated, Protocol

import msgspec
from msgspec import Meta

from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Block, HeadNumber, PageIds, PageNumber

logger = logging.getLogger(__name__)

_PATIENCE_S = 5.0
# Milliseconds, but for the first time that Triton compiles what copies pages.
_MAPPING_S = 60.0
_PAUSE_S = 0.5
_MAX_CONNECTIONS = 64
_MAX_BYTES = 1 << 20
_MAX_IDENTITY_BYTES = 255
_LENGTH = struct.Struct("!I")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid (man 7 unix, SO_PEERCRED)

_MAX_BUFFERS = 8192
_Offset = Annotated[int, Meta(ge=0, le=1 << 48)]


class Memory(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a prefill rank's pool lies: buffer b begins `places[b][1]` bytes into the memory of handle `places[b][0]`.

    It has `num_pages` pages of `item_lens[b]` bytes, of the model's KV heads [start, end).
    """

    version: int
    handles: Annotated[list[Annotated[bytes, Meta(max_length=256)]], Meta(max_length=_MAX_BUFFERS)]
    places: Annotated[list[tuple[PageNumber, _Offset]], Meta(max_length=_MAX_BUFFERS)]
    item_lens: Annotated[list[Annotated[int, Meta(ge=1, le=1 << 31)]], Meta(max_length=_MAX_BUFFERS)]
    num_pages: PageNumber
    heads: tuple[HeadNumber, HeadNumber]

    def __post_init__(self) -> None:
        if self.version != wire.VERSION:
            raise ValueError(f"wire version {self.version}, this side speaks version {wire.VERSION}")
        if len(self.item_lens) != len(self.places) or any(place[0] >= len(self.handles) for place in self.places):
            raise ValueError("places and handles do not fit")


class RemotePool(Protocol):
    """A prefill rank's pool, mapped into this process."""

    num_pages: int

    def pull(self, part: range, block: Block, source_ids: PageIds, target_ids: PageIds) -> None:
        """Copies the block's pages from there, `source_ids`, to this side's `target_ids`; returns when they are there.

        `part` are the heads to copy, numbered as in the model.
        """
        ...

    def close(self) -> None: ...


MapMemory = Callable[[Memory], RemotePool]


class MappingError(RuntimeError):
    """Why another process's pool cannot be read where it lies."""


class MemoryServer:
    """Prefill: gives `memory` to decode ranks of this machine and user; `on_reader` gets the ZMQ name of each that has
    mapped it, in this server's thread."""

    def __init__(self, address: str, memory: Memory, on_reader: Callable[[bytes], None]):
        self._message = msgspec.msgpack.encode(memory)
        self._on_reader = on_reader
        self._is_stopping = False
        self._places = threading.BoundedSemaphore(_MAX_CONNECTIONS)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(_name(address))
        self._socket.listen()
        self._thread = threading.Thread(target=self._run, name="kv-memory", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._is_stopping = True
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _run(self) -> None:
        while not self._is_stopping:
            try:
                connection, _ = self._socket.accept()
            except OSError as error:
                if not self._is_stopping:
                    logger.warning("KV transfer: could not take a process that would map this rank's pool: %s", error)
                    time.sleep(_PAUSE_S)
                continue
            self._places.acquire()
            threading.Thread(target=self._serve, args=(connection,), name="kv-memory-peer", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        """In a thread of its own: a process that is stopped holds no other up."""
        try:
            with connection:
                connection.settimeout(_MAPPING_S)
                _check_user(connection)
                _send(connection, self._message)
                self._on_reader(_receive(connection, _MAX_IDENTITY_BYTES))
                _send(connection, b"")
        except (OSError, MappingError) as error:
            logger.info("KV transfer: a process did not map this rank's pool: %s", error)
        finally:
            self._places.release()


def map_pool(address: str, identity: bytes, map_memory: MapMemory, keep: Callable[[RemotePool], None]) -> None:
    """Decode: maps the pool of the prefill rank at `address`, for which this side is called `identity`.

    `keep` gets the mapped pool, before the prefill rank may offer blocks of it. Raises MappingError when the rank is on
    another machine, or its memory cannot be mapped.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_PATIENCE_S)
        try:
            connection.connect(_name(address))
            _check_user(connection)
            memory = msgspec.msgpack.decode(_receive(connection, _MAX_BYTES), type=Memory)
            keep(map_memory(memory))
            _send(connection, identity)
            _receive(connection, 0)
        except (OSError, msgspec.MsgspecError, ValueError, RuntimeError, ImportError) as error:
            raise MappingError(str(error)) from error


def _name(address: str) -> str:
    return f"\0sglang-apb kv {address}"


def _check_user(connection: socket.socket) -> None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, uid, _ = _CREDENTIALS.unpack(credentials)
    if uid != os.getuid():
        raise MappingError(f"it belongs to user {uid}, this process to user {os.getuid()}")


def _send(connection: socket.socket, message: bytes) -> None:
    connection.sendall(_LENGTH.pack(len(message)) + message)


def _receive(connection: socket.socket, max_bytes: int) -> bytes:
    (size,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    if size > max_bytes:
        raise MappingError(f"it sent {size} bytes instead of at most {max_bytes}")
    return _read(connection, size)


def _read(connection: socket.socket, size: int) -> bytes:
    parts = bytearray()
    while len(parts) < size:
        part = connection.recv(size - len(parts))
        if not part:
            raise MappingError("it hung up")
        parts += part
    return bytes(parts)
