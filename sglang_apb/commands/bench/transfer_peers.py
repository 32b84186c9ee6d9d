"""The two processes of `bench transfer`: the prefill side is a child, the decode side this process."""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import transfer_gpu
from sglang_apb.commands.bench.transfer_gpu import LARGE_BUFFER_MB, GpuPool, page_ids
from sglang_apb.commands.bench.transfer_prompts import PLAIN_NCCL, RAW, Prompt, Time
from sglang_apb.transfer.decode.endpoint import DecodeEndpoint
from sglang_apb.transfer.decode.request import RequestState
from sglang_apb.transfer.memory.pages import Bytes, HostPages, PageIds
from sglang_apb.transfer.planes import choice
from sglang_apb.transfer.planes.base import Pool as KVPool
from sglang_apb.transfer.planes.table import ZMQ
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.prefill.transfer import TransferState
from sglang_apb.transfer.protocol import keys
from sglang_apb.transfer.protocol.compat import Compat
from sglang_apb.transfer.protocol.config import TransferConfig

HOST = "127.0.0.1"
COPY, OVER_ZMQ, SCATTERED, CURVE, MOONCAKE = (
    "copy in memory",
    "zmq",
    "zmq, scattered pages",
    "zmq, encrypted",
    "mooncake TCP",
)
IPC, IPC_SCATTERED = "cuda_ipc", "cuda_ipc, scattered pages"
CHANNEL, CHANNEL_SCATTERED = "nccl", "nccl, scattered pages"
LARGE_CHANNEL, LARGE_SCATTERED = (f"{way}, {LARGE_BUFFER_MB} MB" for way in (CHANNEL, CHANNEL_SCATTERED))
AT_ONCE = 4
_WARM_UP = 2
# On CPUs, what else runs there differs from minute to minute: the ways take turns.
_ROUNDS = {"cpu": 3, "cuda": 1}
_MAPPING_S = 60.0
_AUX_BYTES = 1024


class Pool:
    """A KV pool of exactly the prompt's pages, a token each."""

    # A look takes a core's time, of which a transfer between CPUs needs all that two have.
    poll_s = 0.0005

    def __init__(self, prompt: Prompt, fill: int):
        self.prompt = prompt
        size = prompt.item_len * prompt.num_tokens
        self.buffers: list[Bytes] = [np.full(size, fill + index, np.uint8) for index in range(prompt.num_buffers)]
        lens = [prompt.item_len] * prompt.num_buffers
        self.pool = KVPool(HostPages(self.buffers, lens), range(1), page_size=1)
        self.aux = HostPages([np.zeros(_AUX_BYTES, np.uint8)], [_AUX_BYTES])
        self.compat = Compat("bench", "bench", "bfloat16", 1, 1, lens, [_AUX_BYTES])

    def ids(self, *, scattered: bool) -> PageIds:
        return page_ids(self.prompt, scattered=scattered)

    def check(self, fill: int) -> None:
        """Raises CommandError unless every buffer is filled as the other side's is; then forgets it."""
        for index, buffer in enumerate(self.buffers):
            if not (buffer == np.uint8(fill + index)).all():
                raise CommandError(f"buffer {index} has not arrived whole: this is a bug")
            buffer[:] = 0


def time_ways(
    prompt: Prompt, repeats: int, device: str, names: tuple[str, ...] = ("",)
) -> tuple[list[Time], list[str]]:
    """The times of each way whose name begins with one of `names`, and what to say of those that are missing."""
    notes: dict[str, str] = {}
    pool = make_pool(prompt, 0, device)
    with _prefill_side(prompt, device) as (pipe, folder):
        ways = _gpu_ways(pool, pipe) if isinstance(pool, GpuPool) else _cpu_ways(pool, pipe, folder)
        chosen = {way: start for way, start in ways.items() if way.startswith((RAW, PLAIN_NCCL, *names))}
        seconds: dict[str, list[float]] = {way: [] for way in chosen}
        for way, start in tqdm(list(chosen.items()) * _ROUNDS[device], desc=prompt.name, unit="way"):
            try:
                with start() as once:
                    seconds[way] += [once() for _ in range(_WARM_UP + repeats)][_WARM_UP:]
            except (ImportError, OSError) as error:
                notes[way] = f"{way}: not measured ({error})"
                continue
            pool.check(1)
    times = [Time(prompt.name, way, prompt.num_bytes, values) for way, values in seconds.items() if values]
    return times, list(notes.values())


Starts = dict[str, Callable[[], Any]]


def _cpu_ways(pool: Pool, pipe: Connection, folder: Path) -> Starts:
    return {
        COPY: partial(_copy, pool, Pool(pool.prompt, 1)),
        RAW: partial(_raw_socket, pool, pipe),
        OVER_ZMQ: partial(_zmq, pool, pipe, None, scattered=False),
        SCATTERED: partial(_zmq, pool, pipe, None, scattered=True),
        CURVE: partial(_zmq, pool, pipe, folder, scattered=False),
        MOONCAKE: partial(_mooncake, pool, pipe),
    }


def _gpu_ways(pool: GpuPool, pipe: Connection) -> Starts:
    once = pool, pipe, None
    ipc: dict[str, Any] = {"plane": IPC}
    usual: dict[str, Any] = {"plane": CHANNEL}
    large = usual | {"nccl_buffer_mb": LARGE_BUFFER_MB}
    return {
        PLAIN_NCCL: partial(transfer_gpu.receiving, pool, pipe),
        IPC: partial(_zmq, *once, scattered=False, **ipc),
        IPC_SCATTERED: partial(_zmq, *once, scattered=True, **ipc),
        f"{IPC}, {AT_ONCE} at once": partial(_zmq, *once, scattered=True, at_once=AT_ONCE, **ipc),
        CHANNEL: partial(_zmq, *once, scattered=False, **usual),
        CHANNEL_SCATTERED: partial(_zmq, *once, scattered=True, **usual),
        f"{CHANNEL}, {AT_ONCE} at once": partial(_zmq, *once, scattered=True, at_once=AT_ONCE, **usual),
        LARGE_CHANNEL: partial(_zmq, *once, scattered=False, **large),
        LARGE_SCATTERED: partial(_zmq, *once, scattered=True, **large),
        f"{LARGE_SCATTERED}, {AT_ONCE} at once": partial(_zmq, *once, scattered=True, at_once=AT_ONCE, **large),
        OVER_ZMQ: partial(_zmq, *once, scattered=False),
    }


def make_pool(prompt: Prompt, fill: int, device: str) -> Pool | GpuPool:
    return GpuPool(prompt, fill, is_prefill=fill == 1) if device == "cuda" else Pool(prompt, fill)


@contextlib.contextmanager
def _prefill_side(prompt: Prompt, device: str) -> Iterator[tuple[Connection, Path]]:
    with tempfile.TemporaryDirectory(prefix="sglang-apb-bench-") as name:
        keys.create(Path(name), ["prefill", "decode"])
        context = multiprocessing.get_context("spawn")
        pipe, its_end = context.Pipe()
        child = context.Process(target=serve, args=(its_end, prompt, Path(name), device), daemon=True)
        child.start()
        try:
            yield pipe, Path(name)
        finally:
            child.kill()
            child.join()


def serve(pipe: Connection, prompt: Prompt, folder: Path, device: str) -> None:
    """The child: answers (way, argument) until it is killed."""
    pool: Any = make_pool(prompt, 1, device)
    endpoints: dict[bool, PrefillEndpoint] = {}
    # Whatever decode asks for.
    planes = choice.send_planes(pool.pool, TransferConfig(allow_unencrypted=True, nccl_buffer_mb=LARGE_BUFFER_MB))
    while True:
        way, argument = pipe.recv()
        if way == RAW:
            _send_raw(pool, argument)
        elif way == MOONCAKE:
            _send_mooncake(pool, argument, pipe)
        elif way == PLAIN_NCCL:
            transfer_gpu.send(pool, argument, pipe)
        elif isinstance(argument, bool):  # where to connect, with or without keys
            if argument not in endpoints:
                endpoints[argument] = PrefillEndpoint(HOST, keys=_keys(folder, "prefill") if argument else None)
                endpoints[argument].start_sending(pool.pool, pool.aux, pool.compat, planes)
            pipe.send(endpoints[argument].port)
        else:
            _send_zmq(endpoints[way], pool, pipe, *argument)


def _keys(folder: Path, name: str) -> keys.Keys | None:
    return keys.load(TransferConfig(str(folder / f"{name}.key_secret"), str(folder / keys.PEERS)))


@contextlib.contextmanager
def _copy(pool: Pool, source: Pool) -> Iterator[Callable[[], float]]:
    def once() -> float:
        started = time.perf_counter()
        for target, buffer in zip(pool.buffers, source.buffers, strict=True):
            target[:] = buffer
        return time.perf_counter() - started

    yield once


@contextlib.contextmanager
def _raw_socket(pool: Pool, pipe: Connection) -> Iterator[Callable[[], float]]:
    with socket.create_server((HOST, 0)) as listener:
        pipe.send((RAW, listener.getsockname()[1]))
        connection, _ = listener.accept()

        def once() -> float:
            started = time.perf_counter()
            connection.sendall(b"g")
            for buffer in pool.buffers:
                view, got = buffer.data, 0
                while got < len(view):
                    got += connection.recv_into(view[got:])
            return time.perf_counter() - started

        with connection:
            yield once


def _send_raw(pool: Pool, port: int) -> None:
    with socket.create_connection((HOST, port)) as connection:
        while connection.recv(1):
            for buffer in pool.buffers:
                connection.sendall(buffer.data)


@contextlib.contextmanager
def _zmq(
    pool: Pool | GpuPool,
    pipe: Connection,
    folder: Path | None,
    *,
    scattered: bool,
    plane: str = ZMQ,
    at_once: int = 1,
    **settings: Any,
) -> Iterator[Callable[[], float]]:
    if plane == CHANNEL:
        transfer_gpu.check_two_gpus()
    ours = _keys(folder, "decode") if folder else None
    theirs = _keys(folder, "prefill") if folder else None
    pipe.send((OVER_ZMQ, folder is not None))
    address = (HOST, pipe.recv(), theirs.public if theirs else "")
    planes = choice.receive_planes(pool.pool, TransferConfig(data_plane=plane, **settings))
    receiver = DecodeEndpoint(pool.pool, pool.aux, pool.compat, ours, planes=planes)
    receiver.start()
    rooms = iter(range(1, 1 << 30))
    ids = pool.ids(scattered=scattered)
    used = ""

    def once() -> float:
        nonlocal used
        numbers = [next(rooms) for _ in range(at_once)]
        pipe.send((folder is not None, (numbers, scattered)))
        opened = [receiver.open(number, [address], ids, 0) for number in numbers]
        pipe.recv()  # all are asked for, as they are in a server when the prefill ends
        started = time.perf_counter()
        pipe.send("go")
        while any(request.state is RequestState.RECEIVING for request in opened):
            time.sleep(pool.poll_s)
        seconds = time.perf_counter() - started
        for request in opened:
            if request.state is RequestState.FAILED:
                raise CommandError(f"the transfer failed: {request.reason}")
            used = request.data_plane
            receiver.close(request)
        return seconds / at_once

    try:
        deadline = time.monotonic() + _MAPPING_S
        while used != plane:  # it is found meanwhile
            once()
            if time.monotonic() > deadline:
                raise OSError("pages came over zmq")
        yield once
    finally:
        receiver.stop()


def _send_zmq(
    endpoint: PrefillEndpoint, pool: Pool | GpuPool, pipe: Connection, numbers: Sequence[int], scattered: bool
) -> None:
    opened = [endpoint.open(number) for number in numbers]
    ids = pool.ids(scattered=scattered)
    pages = (0, len(ids))
    while any(transfer.state is TransferState.UNASKED for transfer in opened):
        time.sleep(pool.poll_s)
    pipe.send("asked")
    pipe.recv()
    for transfer in opened:
        endpoint.announce(transfer, [pages])
        endpoint.send_pages(transfer, pages, lambda: ids, range(pool.prompt.num_buffers // 2))
        endpoint.finish(transfer, 0, {})
    for transfer in opened:
        while transfer.state is TransferState.ASKED:
            time.sleep(pool.poll_s)
        endpoint.close(transfer)


@contextlib.contextmanager
def _mooncake(pool: Pool, pipe: Connection) -> Iterator[Callable[[], float]]:
    engine = _mooncake_engine(pool)
    addresses = [buffer.ctypes.data for buffer in pool.buffers]
    pipe.send((MOONCAKE, (f"{HOST}:{engine.get_rpc_port()}", addresses)))
    if error := pipe.recv():
        raise OSError(error)

    def once() -> float:
        started = time.perf_counter()
        pipe.send("go")
        if pipe.recv() != 0:
            raise CommandError("Mooncake's transfer failed")
        return time.perf_counter() - started

    try:
        yield once
    finally:
        pipe.send("end")


def _send_mooncake(pool: Pool, argument: tuple[str, list[int]], pipe: Connection) -> None:
    target, addresses = argument
    try:
        engine = _mooncake_engine(pool)
    except (ImportError, OSError) as error:
        pipe.send(str(error))
        return
    pipe.send("")
    own = [buffer.ctypes.data for buffer in pool.buffers]
    lens = [buffer.nbytes for buffer in pool.buffers]
    while pipe.recv() == "go":
        pipe.send(engine.batch_transfer_sync_write(target, own, addresses, lens))


def _mooncake_engine(pool: Pool) -> Any:
    """Raises ImportError when it is not installed, OSError when it does not start."""
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") != 0:
        raise OSError("Mooncake's engine does not start")
    for buffer in pool.buffers:
        if engine.register_memory(buffer.ctypes.data, buffer.nbytes) != 0:
            raise OSError("Mooncake does not take the pool's memory")
    return engine
