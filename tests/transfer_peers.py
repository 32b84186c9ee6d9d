"""Two in-process endpoints over loopback, as the tests of `sglang_apb.transfer` need them."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from sglang_apb.transfer.decode.endpoint import DecodeEndpoint
from sglang_apb.transfer.decode.peer import PrefillPeer
from sglang_apb.transfer.decode.request import DecodeRequest, RequestState
from sglang_apb.transfer.memory.heads import PagesByHeads
from sglang_apb.transfer.memory.pages import HostPages, run_of
from sglang_apb.transfer.planes import choice
from sglang_apb.transfer.planes.base import OpenReceive, OpenSend, Pool
from sglang_apb.transfer.planes.cuda_ipc.halves import CudaIpcReceive, CudaIpcSend
from sglang_apb.transfer.planes.cuda_ipc.handles import MappingError, Memory
from sglang_apb.transfer.planes.nccl.channels import NUM_SLOTS, ChannelError, ChannelMaker
from sglang_apb.transfer.planes.nccl.receive import NcclReceive
from sglang_apb.transfer.planes.nccl.send import NcclSend
from sglang_apb.transfer.planes.pair import ZMQ_ONLY, ReceivePlanes
from sglang_apb.transfer.planes.zmq import ZmqSend
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.prefill.transfer import Transfer, TransferState
from sglang_apb.transfer.protocol import ownership, wire
from sglang_apb.transfer.protocol.compat import Compat
from sglang_apb.transfer.protocol.config import TransferConfig
from sglang_apb.transfer.protocol.hosts import Address
from sglang_apb.transfer.protocol.keys import Keys
from sglang_apb.transfer.protocol.ownership import PageRange
from sglang_apb.transfer.worker import Worker

ITEM_LENS = (96, 160, 96, 160, 96, 160)  # keys and values of three layers
NUM_LAYERS = 3
AUX_LENS = (64, 128, 64)
NUM_POOL_PAGES = 500
HEADS = range(1)
EIGHT = np.arange(8)
H = TypeVar("H")
COMPAT = Compat(
    model="Toy",
    model_hash="toy",
    kv_dtype="float32",
    page_size=1,
    num_kv_heads=1,
    kv_head_lens=list(ITEM_LENS),
    aux_item_lens=list(AUX_LENS),
)


def make_pages(seed: int | None, item_lens: Sequence[int] = ITEM_LENS, num: int = NUM_POOL_PAGES) -> HostPages:
    """A pool of random bytes, or of zeros when `seed` is None."""
    generator = np.random.default_rng(seed)
    make = (lambda size: np.zeros(size, np.uint8)) if seed is None else generator.bytes
    return HostPages([np.frombuffer(bytearray(make(size * num)), np.uint8) for size in item_lens], item_lens)


def rows(pages: HostPages, ids: Sequence[int] | np.ndarray) -> bytes:
    return pages.gather(0, len(pages.item_lens), np.asarray(ids, np.int64)).tobytes()


@dataclass
class Cluster:
    """`senders[r]` is prefill rank r with pool `pools[r]` and aux rows `auxes[r]`; one decode endpoint."""

    senders: list[PrefillEndpoint]
    pools: list[HostPages]
    auxes: list[HostPages]
    receiver: DecodeEndpoint
    pool: HostPages
    aux: HostPages

    @property
    def addresses(self) -> list[Address]:
        return [Address("127.0.0.1", s.port, s.keys.public if s.keys else "") for s in self.senders]

    def ask(self, room: int, ids: Sequence[int] | np.ndarray, aux_index: int = 3) -> DecodeRequest:
        return self.receiver.open(room, self.addresses, np.asarray(ids, np.int64), aux_index)


class SharedPages:
    """In place of CUDA's handles: the number of a pool in this process."""

    def __init__(self) -> None:
        self._pools: list[HostPages] = []
        self.before_pull: Callable[[], None] = lambda: None
        self.closed: list[HostPages] = []

    def memory(self, pages: HostPages, heads: range = HEADS) -> Memory:
        self._pools.append(pages)
        handle = str(len(self._pools) - 1).encode()
        places = [(0, 0)] * len(pages.item_lens)
        edges = heads.start, heads.stop
        return Memory(wire.VERSION, [handle], places, list(pages.item_lens), pages.num_pages, edges)

    def map(self, memory: Memory, pages: HostPages, heads: range = HEADS, page_size: int = 1) -> _SharedPool:
        if not memory.handles:
            raise MappingError("no handle")
        there = self._pools[int(memory.handles[0])]
        return _SharedPool(self, there, range(*memory.heads), pages, heads, page_size)


class _SharedPool:
    def __init__(
        self, shared: SharedPages, there: HostPages, theirs: range, here: HostPages, ours: range, page_size: int
    ) -> None:
        self.num_pages = there.num_pages
        self._shared, self._there = shared, there
        self._sides = PagesByHeads(there, theirs, page_size), PagesByHeads(here, ours, page_size)

    def pull(self, part: range, block: wire.Block, source_ids: np.ndarray, target_ids: np.ndarray) -> None:
        self._shared.before_pull()
        source, target = (side.of(part) for side in self._sides)
        payload = source.gather(block.first_buffer, block.num_buffers, source_ids)
        target.scatter(block.first_buffer, block.num_buffers, target_ids, payload.data)

    def close(self) -> None:
        self._shared.closed.append(self._there)


class Tubes:
    """In place of NCCL: a block goes over when both ends are there for it, in order. Each `maker` is one side's."""

    def __init__(self) -> None:
        self._posted: dict[bytes, deque[tuple[int, Callable[[bytes], None]]]] = {}
        self.needs_no_pages = True
        self._ids = itertools.count()
        self.ends: list[_TubeEnd] = []
        self.before_arrival: Callable[[], bool] = lambda: True
        self.before_send: Callable[[], None] = lambda: None
        self.slot_bytes: dict[str, int] = {}  # of the side with that GPU
        self.has_memory: dict[str, bool] = {}

    def maker(self, pages: HostPages, gpu: str, heads: range = HEADS, page_size: int = 1) -> ChannelMaker:
        side = {"pages": pages, "heads": heads, "page_size": page_size}
        prefill, decode = (partial(_TubeEnd, self, is_prefill=is_prefill, **side) for is_prefill in (True, False))
        slot_bytes = self.slot_bytes.get(gpu, 1 << 26)
        return ChannelMaker(gpu, self._new_id, prefill, decode, slot_bytes, partial(self._check_memory, gpu))

    def _check_memory(self, gpu: str, slot_bytes: int) -> None:
        if not self.has_memory.get(gpu, True):
            raise ChannelError(f"no memory for {slot_bytes} bytes")

    def _new_id(self) -> bytes:
        unique_id = str(next(self._ids)).encode()
        self._posted[unique_id] = deque()
        return unique_id


class _TubeEnd:
    def __init__(
        self,
        tubes: Tubes,
        unique_id: bytes,
        slot_bytes: int,
        on_error: Callable[[str], None],
        on_read: Callable[[], None] | None = None,
        *,
        is_prefill: bool,
        pages: HostPages,
        heads: range,
        page_size: int,
    ) -> None:
        if unique_id not in tubes._posted:
            raise ChannelError("nobody is there")
        self._tubes, self._posted = tubes, tubes._posted[unique_id]
        self._parts, self._heads = PagesByHeads(pages, heads, page_size), heads
        self._slots: dict[int, bytes] = {}
        self._places: list[tuple[range, wire.Block, np.ndarray]] = []
        self._coming: deque[tuple[int, int | None, Callable[[bool], None]]] = deque()
        self._on_error, self.slot_bytes, self.is_prefill = on_error, slot_bytes, is_prefill
        self.num_held = 0
        self._arrivals = Worker("tube")
        self.is_closed = False
        tubes.ends.append(self)

    @property
    def is_full(self) -> bool:
        return self.num_held >= NUM_SLOTS

    def hold(self, part: range, block: wire.Block, ids: np.ndarray) -> _Held:
        self.num_held += 1
        payload = self._parts.of(part).gather(block.first_buffer, block.num_buffers, ids).tobytes()
        return _Held(self, payload)

    def send_nothing(self, num_bytes: int) -> None:
        self.send(bytes(num_bytes))

    def send(self, payload: bytes) -> None:
        try:
            self._tubes.before_send()
            if not self._posted:  # it would hold a GPU up
                raise ChannelError("nobody waits for a block")
        except Exception as error:
            self._on_error(str(error))
            return
        num_bytes, arrive = self._posted.popleft()
        assert len(payload) == num_bytes
        arrive(payload)

    def address_of(self, part: range, block: wire.Block, ids: np.ndarray) -> int | None:
        if run_of(ids) is None or part != self._heads:
            return None
        self._places.append((part, block, ids))
        return len(self._places) - 1

    def receive(
        self,
        slot: int,
        num_bytes: int,
        address: int | None,
        when_queued: Callable[[], None],
        when_over: Callable[[bool], None],
    ) -> None:
        assert num_bytes <= self.slot_bytes and slot not in self._slots

        def arrive(payload: bytes) -> None:
            self._arrivals.submit(partial(self._arrive, payload))

        self._coming.append((slot, address, when_over))
        self._posted.append((num_bytes, arrive))
        when_queued()

    def _arrive(self, payload: bytes) -> None:
        while not self._tubes.before_arrival() and not self.is_closed:
            time.sleep(0.001)
        if self.is_closed:
            return  # `close` has more to say
        slot, address, when_over = self._coming.popleft()
        if address is None:
            self._slots[slot] = payload
        else:
            part, block, ids = self._places[address]
            self._parts.of(part).scatter(block.first_buffer, block.num_buffers, ids, payload)
        when_over(True)

    def write(self, slot: int, part: range, block: wire.Block, ids: np.ndarray) -> None:
        self._parts.of(part).scatter(block.first_buffer, block.num_buffers, ids, self._slots.pop(slot))

    def close(self) -> None:
        self.is_closed = True
        self._arrivals.submit(self._abort)
        self._arrivals.end()

    def _abort(self) -> None:
        for *_, when_over in self._coming:
            when_over(False)


@dataclass(frozen=True, eq=False)
class _Held:
    end: _TubeEnd
    payload: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.payload)

    @property
    def needs_no_pages(self) -> bool:
        return self.end._tubes.needs_no_pages

    def send(self) -> None:
        self.end.num_held -= 1
        self.end.send(self.payload)

    def drop(self) -> None:
        self.end.num_held -= 1


def send_planes(pages: HostPages, shared: SharedPages | None = None, tubes: Tubes | None = None) -> list[OpenSend]:
    ipc = [partial(CudaIpcSend, memory=shared.memory(pages))] if shared else []
    nccl = partial(NcclSend, maker=tubes.maker(pages, "prefill's") if tubes else None)
    return [*ipc, nccl, lambda side: ZmqSend()]


def receive_planes(
    pages: HostPages, shared: SharedPages | None = None, tubes: Tubes | None = None, zmq_too: bool = True
) -> ReceivePlanes:
    halves: list[OpenReceive] = []
    if shared:
        halves.append(partial(CudaIpcReceive, map_memory=partial(shared.map, pages=pages)))
    if tubes:
        halves.append(partial(NcclReceive, maker=tubes.maker(pages, "decode's")))
    return ReceivePlanes(tuple(halves), zmq_too)


def start_sending(
    endpoint: PrefillEndpoint,
    pages: HostPages,
    aux: HostPages,
    compat: Compat = COMPAT,
    heads: range = HEADS,
    planes: Sequence[OpenSend] | None = None,
) -> None:
    """Over ZMQ, if nothing else is said."""
    pool = Pool(pages, heads, compat.page_size)
    endpoint.start_sending(pool, aux, compat, send_planes(pages) if planes is None else planes)


def decode_endpoint(
    pages: HostPages,
    aux: HostPages,
    compat: Compat = COMPAT,
    heads: range = HEADS,
    keys: Keys | None = None,
    planes: ReceivePlanes = ZMQ_ONLY,
) -> DecodeEndpoint:
    return DecodeEndpoint(Pool(pages, heads, compat.page_size), aux, compat, keys, planes=planes)


def half_of(holder: PrefillEndpoint | PrefillPeer, kind: type[H]) -> H:
    """A rank's half of a plane."""
    halves = holder.halves if isinstance(holder, PrefillEndpoint) else holder.pair.halves
    (half,) = (half for half in halves if isinstance(half, kind))
    return half


@contextlib.contextmanager
def cluster(
    num_ranks: int = 1,
    compat: Compat = COMPAT,
    prefill_keys: Keys | None = None,
    decode_keys: Keys | None = None,
    shared: SharedPages | None = None,
    tubes: Tubes | None = None,
    zmq_too: bool = True,
    configs: tuple[TransferConfig, TransferConfig] | None = None,
) -> Iterator[Cluster]:
    """With `shared`, prefill offers pages, and decode reads them where they lie; with `tubes` they are fetched; with
    `configs`, of prefill and decode, they come as these say.
    """
    pools = [make_pages(100 + rank) for rank in range(num_ranks)]
    auxes = [make_pages(200 + rank, AUX_LENS, 8) for rank in range(num_ranks)]
    senders = [PrefillEndpoint("127.0.0.1", keys=prefill_keys) for _ in range(num_ranks)]
    pool, aux = make_pages(None), make_pages(None, AUX_LENS, 8)
    planes = receive_planes(pool, shared, tubes, zmq_too)
    if configs is not None:
        planes = choice.receive_planes(Pool(pool, HEADS, 1), configs[1])
    receiver = decode_endpoint(pool, aux, compat, keys=decode_keys, planes=planes)
    receiver.start()
    for sender, rank_pool, rank_aux in zip(senders, pools, auxes, strict=True):
        sends = send_planes(rank_pool, shared, tubes)
        if configs is not None:
            sends = choice.send_planes(Pool(rank_pool, HEADS, 1), configs[0])
        start_sending(sender, rank_pool, rank_aux, planes=sends)
    try:
        yield Cluster(senders, pools, auxes, receiver, pool, aux)
    finally:
        for endpoint in (*senders, receiver):
            endpoint.stop()


def send_owned(
    sender: PrefillEndpoint,
    transfer: Transfer,
    ids: np.ndarray,
    owned: Sequence[PageRange],
    aux_index: int | None,
    chunk: int = 10_000,
    info: dict[str, int | str] | None = None,
    num_layers: int = NUM_LAYERS,
) -> None:
    """What the sender of SGLang's request does, in chunks of `chunk` pages."""
    sender.announce(transfer, owned)
    for first in range(0, len(ids), chunk):
        for start, end in ownership.clip(owned, (first, first + chunk)):
            sender.send_pages(transfer, (start, end), partial(np.copy, ids[start:end]), range(num_layers))
    sender.finish(transfer, aux_index, info or {})


def wait_for(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.002)
    return condition()


def received(request: DecodeRequest, seconds: float = 5.0) -> bool:
    return wait_for(lambda: request.state is not RequestState.RECEIVING, seconds) and (
        request.state is RequestState.COMPLETE
    )


def asked(transfer: Transfer) -> bool:
    return wait_for(lambda: transfer.state is not TransferState.UNASKED) and transfer.state is TransferState.ASKED


def connect(peers: Cluster) -> None:
    """Until every prefill rank has a channel that both sides have made."""
    ready = peers.ask(99, np.arange(0))
    transfers = [sender.open(99) for sender in peers.senders]
    assert all(asked(transfer) for transfer in transfers)
    for sender, transfer in zip(peers.senders, transfers, strict=True):
        assert wait_for(lambda s=sender, r=transfer: half_of(s, NcclSend).channel(r.peer) is not None)
    peers.receiver.close(ready)
    for sender, transfer in zip(peers.senders, transfers, strict=True):
        sender.close(transfer)


@contextlib.contextmanager
def connected(num_ranks: int = 1, *, tubes: Tubes) -> Iterator[Cluster]:
    """A cluster of which every prefill rank has a channel."""
    with cluster(num_ranks, tubes=tubes) as peers:
        connect(peers)
        yield peers


def opened(peers: Cluster, number: int, pages: np.ndarray = EIGHT) -> tuple[DecodeRequest, Transfer]:
    """A request on both sides, for which decode has asked the first prefill rank."""
    decode, transfer = peers.ask(number, pages), peers.senders[0].open(number)
    assert asked(transfer)
    return decode, transfer
