"""NCCL between two processes' GPUs: what one sends, the other one receives.

Communicators do not block: one whose other side is gone is given up without it (`ncclCommAbort`). NCCL does not
encrypt, and authenticates nobody.
"""

from __future__ import annotations

import ctypes
import time
from functools import cache
from typing import Any

import torch

from sglang_apb.transfer.planes.nccl.channels import ChannelError

PREFILL, DECODE = 0, 1
_IN_PROGRESS = 7  # ncclInProgress (nccl.h)
_UINT8 = 1
_CONNECT_S = 20.0
_PAUSE_S = 0.001
_CALL_S = 2.0
# NCCL's kernel takes that many multiprocessors of a GPU that computes beside it. NVLink needs them (H200: 8 reach 257
# of 359 GB/s, 16 reach 354); over a network NCCL takes fewer by itself.
_MAX_CTAS = 16


def new_id() -> bytes:
    """Opens a port to which both sides of a communicator connect; the id says where."""
    return bytes(_library().ncclGetUniqueId())


class Communicator:
    """Of two processes. Making it returns when the other side has made its own; raises ChannelError. For one thread,
    but for `hurry`.
    """

    def __init__(self, unique_id: bytes, rank: int, device: torch.device, priority: int):
        """`priority` of its stream (CUDA's: the lower, the sooner)."""
        from sglang.srt.distributed.device_communicators import pynccl_wrapper as wrapper

        self._lib, self._peer = _library().lib, 1 - rank
        self._is_hurried = False
        self.stream = torch.cuda.Stream(device, priority=priority)
        self._comm = ctypes.c_void_p()
        config = wrapper.ncclConfig_t.create()
        config.blocking, config.maxCTAs = 0, _MAX_CTAS
        identity = wrapper.ncclUniqueId.from_buffer_copy(unique_id)
        with torch.cuda.device(device):
            code = self._lib.ncclCommInitRankConfig(ctypes.byref(self._comm), 2, identity, rank, ctypes.byref(config))
            try:
                self._wait(code, _CONNECT_S, pause=_PAUSE_S)
                self._connect(device)
            except ChannelError:
                self.abort()
                raise

    def send(self, address: int, num_bytes: int) -> None:
        """Queues it on `stream`. Several sends as a group of NCCL's reach half of what one of all bytes does."""
        self._call(self._lib.ncclSend, address, num_bytes, _CALL_S)

    def receive(self, address: int, num_bytes: int) -> None:
        self._call(self._lib.ncclRecv, address, num_bytes, _CALL_S)

    @property
    def is_closed(self) -> bool:
        """Also while it ends what is on its way."""
        return not self._comm

    def hurry(self) -> None:
        """Lets a call that waits in another thread end with an error."""
        self._is_hurried = True

    def abort(self) -> None:
        """Ends what is on its way; returns when the GPU has nothing to do with it any more."""
        comm, self._comm = self._comm, ctypes.c_void_p()
        if comm:
            self._lib.ncclCommAbort(comm)

    def _connect(self, device: torch.device) -> None:
        """The first send connects both sides, for which each has to wait for the other."""
        byte = torch.zeros(1, dtype=torch.uint8, device=device)
        function = self._lib.ncclRecv if self._peer == PREFILL else self._lib.ncclSend
        self._call(function, byte.data_ptr(), 1, _CONNECT_S, _PAUSE_S)
        deadline = time.monotonic() + _CONNECT_S
        while not self.stream.query():
            if time.monotonic() > deadline:
                raise ChannelError(f"the other side has not come within {_CONNECT_S:g} s")
            time.sleep(_PAUSE_S)

    def _call(self, function: Any, address: int, num_bytes: int, seconds: float, pause: float = 0.0) -> None:
        if not self._comm:
            raise ChannelError("the communicator is closed")
        code = function(address, num_bytes, _UINT8, self._peer, self._comm, self.stream.cuda_stream)
        self._wait(code, seconds, pause)

    def _wait(self, code: int, seconds: float, pause: float) -> None:
        deadline = time.monotonic() + seconds
        state = ctypes.c_int(code)
        while state.value == _IN_PROGRESS:
            if self._is_hurried:
                raise ChannelError("the channel is closed")
            if time.monotonic() > deadline:
                raise ChannelError(f"NCCL has not finished a call within {seconds:g} s")
            time.sleep(pause)
            self._lib.ncclCommGetAsyncError(self._comm, ctypes.byref(state))
        if state.value:
            raise ChannelError(f"NCCL: {_library().ncclGetErrorString(state.value)}")


@cache
def _library() -> Any:
    from sglang.srt.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    library = NCCLLibrary()
    for name, arguments in (
        ("ncclCommAbort", [ctypes.c_void_p]),
        ("ncclCommGetAsyncError", [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]),
    ):
        getattr(library.lib, name).argtypes = arguments
    return library
