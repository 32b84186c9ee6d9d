"""Pages that a decode rank reads where they lie. A pool of this process stands for GPU memory of another one; the
messages, the order of events and the bounds are the real ones. tests/test_gpu_transfer.py has CUDA's."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
import pytest
import zmq
from transfer_peers import (
    ITEM_LENS,
    Cluster,
    SharedPages,
    asked,
    cluster,
    half_of,
    make_pages,
    received,
    rows,
    send_owned,
    wait_for,
)

from sglang_apb.settings import ConfigError
from sglang_apb.transfer.decode.request import RequestState
from sglang_apb.transfer.planes import choice, nccl
from sglang_apb.transfer.planes.base import Pool
from sglang_apb.transfer.planes.cuda_ipc import handles
from sglang_apb.transfer.planes.cuda_ipc.halves import CudaIpcSend, pack_page_ids, parse_offer
from sglang_apb.transfer.planes.cuda_ipc.handles import MappingError, Memory, MemoryServer, map_pool
from sglang_apb.transfer.planes.pair import ZMQ_ONLY
from sglang_apb.transfer.prefill.peers import DecodePeers
from sglang_apb.transfer.prefill.transfer import TransferState
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.config import TransferConfig
from sglang_apb.transfer.protocol.wire import Frame, Kind, WireError

POOL = make_pages(1, num=4)
OWNED = {1: [[(0, 120)]], 2: [[(0, 30), (90, 120)], [(30, 90)]]}


def connect(peers: Cluster) -> None:
    """Until every prefill rank knows that its pool is mapped."""
    ready = peers.ask(99, np.arange(0))
    transfers = [sender.open(99) for sender in peers.senders]
    assert all(asked(transfer) for transfer in transfers)
    assert wait_for(lambda: all(half_of(sender, CudaIpcSend)._readers for sender in peers.senders))
    peers.receiver.close(ready)
    for sender, transfer in zip(peers.senders, transfers, strict=True):
        sender.close(transfer)


@pytest.mark.parametrize("num_ranks", OWNED)
@pytest.mark.parametrize("chunk", [10_000, 25])
def test_pages_are_read_where_they_lie(num_ranks: int, chunk: int) -> None:
    rng = np.random.default_rng(num_ranks)
    with cluster(num_ranks, shared=SharedPages()) as peers:
        connect(peers)
        target = rng.permutation(500)[:120].astype(np.int64)
        sources = [rng.permutation(500)[:120].astype(np.int64) for _ in range(num_ranks)]
        decode = peers.ask(11, target)
        transfers = [sender.open(11) for sender in peers.senders]
        for rank, (sender, transfer) in enumerate(zip(peers.senders, transfers, strict=True)):
            assert asked(transfer)
            send_owned(sender, transfer, sources[rank], OWNED[num_ranks][rank], 5 if rank == 0 else None, chunk)
        assert received(decode), decode.reason
        assert wait_for(lambda: all(transfer.state is TransferState.DONE for transfer in transfers))
        for rank, owned in enumerate(OWNED[num_ranks]):
            for start, end in owned:
                assert rows(peers.pool, target[start:end]) == rows(peers.pools[rank], sources[rank][start:end])
        assert not any(rows(peers.pool, np.setdiff1d(np.arange(500), target)))
        assert decode.data_plane == "cuda_ipc"
        assert decode.assembly.num_bytes == sum(transfer.num_bytes for transfer in transfers) == 120 * sum(ITEM_LENS)


def test_pages_that_were_freed_before_they_were_read_never_complete_a_request() -> None:
    shared, gate = SharedPages(), threading.Event()
    with cluster(shared=shared) as peers:
        connect(peers)
        shared.before_pull = lambda: gate.wait(5) and None
        decode, transfer = peers.ask(1, np.arange(8)), peers.senders[0].open(1)
        assert asked(transfer)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        time.sleep(0.2)  # everything, the end too, is on its way
        peers.senders[0].close(transfer, "The client went away.")
        gate.set()
        assert not received(decode)
        assert decode.reason == "The client went away."


def test_a_decode_rank_waits_for_the_word_that_pages_were_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with cluster(shared=SharedPages()) as peers:
        connect(peers)
        done = threading.Event()
        monkeypatch.setattr(peers.senders[0], "_complete", lambda *_: done.set())
        decode, transfer = peers.ask(1, np.arange(8)), peers.senders[0].open(1)
        assert asked(transfer)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert done.wait(5)
        time.sleep(0.1)
        assert decode.assembly.complete and decode.state is RequestState.RECEIVING
        monkeypatch.undo()
        peers.senders[0].call(partial(peers.senders[0]._complete, transfer.peer, Frame(Kind.DONE, 1, transfer.attempt)))
        assert received(decode)


def test_more_requests_at_once_than_zmq_takes_frames() -> None:
    """Each is confirmed, and each on its own."""
    shared = SharedPages()
    with cluster(shared=shared) as peers:
        connect(peers)
        shared.before_pull = lambda: time.sleep(0.005)
        decodes = [peers.ask(number, np.arange(10 * number, 10 * number + 10)) for number in range(40)]
        transfers = [peers.senders[0].open(number) for number in range(40)]
        for transfer in transfers:
            assert asked(transfer)
            send_owned(peers.senders[0], transfer, np.arange(10), [(0, 10)], 5)
        assert all(received(decode) for decode in decodes)
        assert wait_for(lambda: all(transfer.state is TransferState.DONE for transfer in transfers))


def test_replies_that_zmq_does_not_take_yet_are_sent_later_and_in_order() -> None:
    class Full:
        def __init__(self) -> None:
            self.taken: list[bytes] = []
            self.is_full = True

        def send_multipart(self, parts: list[bytes], flags: int) -> None:
            if self.is_full and parts[0] == b"slow":
                raise zmq.Again
            if parts[0] == b"gone":
                raise zmq.ZMQError(zmq.EHOSTUNREACH)
            self.taken.append(parts[1])

    socket = Full()
    peers = DecodePeers(socket)  # type: ignore[arg-type]
    for name, frame in ((b"slow", b"1"), (b"quick", b"2"), (b"gone", b"3"), (b"slow", b"4")):
        peers.reply(name, [frame])
    assert not peers.flush() and socket.taken == [b"2"]
    socket.is_full = False
    peers.reply(b"slow", [b"5"])
    assert peers.flush() and socket.taken == [b"2", b"1", b"4", b"5"]


def test_pulling_that_fails_fails_the_request() -> None:
    shared = SharedPages()
    with cluster(shared=shared) as peers:
        connect(peers)

        def fail() -> None:
            raise RuntimeError("an illegal memory access")

        shared.before_pull = fail
        decode, transfer = peers.ask(1, np.arange(8)), peers.senders[0].open(1)
        assert asked(transfer)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert not received(decode)
        assert "could not be read: an illegal memory access" in decode.reason


def test_a_pool_is_unmapped_when_its_rank_is_gone() -> None:
    shared = SharedPages()
    with cluster(2, shared=shared) as peers:
        connect(peers)
        peers.senders[1].stop()
        assert wait_for(lambda: shared.closed == [peers.pools[1]])
        peers.senders.pop()  # stopped


def other_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: -1)


def other_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handles, "_name", lambda address: f"\0nobody at {address}" + os.urandom(4).hex())


@pytest.mark.parametrize(
    ("obstacle", "reason"), [(other_user, "belongs to user"), (other_machine, "Connection refused")]
)
@pytest.mark.parametrize("zmq_too", [True, False])
def test_elsewhere_pages_are_sent(
    obstacle: Callable[[pytest.MonkeyPatch], None],
    reason: str,
    zmq_too: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    obstacle(monkeypatch)
    with cluster(shared=SharedPages(), zmq_too=zmq_too) as peers:
        decode, transfer = peers.ask(1, np.arange(8)), peers.senders[0].open(1)
        if not zmq_too:
            assert not received(decode)
            assert "cannot be read where it lies" in decode.reason and reason in decode.reason
            return
        assert asked(transfer)
        assert wait_for(lambda: reason in caplog.text)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert received(decode)
        assert decode.data_plane == "zmq"
        assert rows(peers.pool, np.arange(8)) == rows(peers.pools[0], np.arange(8))


def test_offers_of_pages_or_pools_that_are_not_there_are_dropped() -> None:
    ids = np.array([3, 499], np.int64)
    frame = wire.parse(wire.pack(Kind.OFFER, 1, 1, wire.Block(0, 6, 0, 2).pack(), pack_page_ids(ids)))
    block, found = parse_offer(frame, 6, 2, 500)
    assert block == wire.Block(0, 6, 0, 2) and found.tolist() == [3, 499]
    for num_buffers, num_pages, num_offered in ((5, 2, 500), (6, 1, 500), (6, 2, 499)):
        with pytest.raises(WireError):
            parse_offer(frame, num_buffers, num_pages, num_offered)
    with pytest.raises(WireError, match="payload of 4 bytes"):
        parse_offer(dataclasses.replace(frame, payload=b"1234"), 6, 2, 500)


def test_frames_that_are_not_expected_change_nothing() -> None:
    """An offer from a rank whose pool is not mapped; the word that pages were kept, before anything was read."""
    with cluster() as peers:
        decode, transfer = peers.ask(1, np.arange(8)), peers.senders[0].open(1)
        assert asked(transfer)
        peers.senders[0].announce(transfer, [(0, 8)])
        offer = wire.pack(Kind.OFFER, 1, transfer.attempt, wire.Block(0, 6, 0, 8).pack(), pack_page_ids(np.arange(8)))
        for frame in (offer, wire.pack(Kind.KEPT, 1, transfer.attempt)):
            peers.senders[0].call(partial(peers.senders[0]._peers.reply, transfer.peer, frame))
        time.sleep(0.1)
        assert decode.state is RequestState.RECEIVING and decode.assembly.num_bytes == 0
        peers.senders[0].send_pages(transfer, (0, 8), lambda: np.arange(8), range(3))
        peers.senders[0].finish(transfer, 5, {})
        assert received(decode)


class TestHandshake:
    def memory(self, **changes: object) -> Memory:
        memory = SharedPages().memory(POOL)
        return msgspec.structs.replace(memory, **changes) if changes else memory

    def serve(self, message: bytes, name: str) -> MemoryServer:
        server = MemoryServer(name, self.memory(), lambda _: None)
        server._message = message
        return server

    @pytest.mark.parametrize(
        "message",
        [b"", b"\xc1" * 10, msgspec.msgpack.encode({"version": wire.VERSION}), b"\x00" * (2 << 20)],
        ids=["nothing", "not msgpack", "fields missing", "too long"],
    )
    def test_what_is_not_a_memory_is_refused(self, message: bytes) -> None:
        server = self.serve(message, "test:1")
        try:
            with pytest.raises(MappingError):
                map_pool("test:1", b"me", lambda memory: pytest.fail("mapped"), lambda pool: None)
        finally:
            server.stop()

    def test_another_version_and_places_without_handles(self) -> None:
        with pytest.raises(ValueError, match="wire version 3"):
            self.memory(version=3)
        with pytest.raises(ValueError, match="do not fit"):
            self.memory(handles=[])

    def test_who_says_nothing_holds_nobody_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(handles, "_PATIENCE_S", 0.3)
        shared = SharedPages()
        with cluster(shared=shared) as peers:
            silent = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            silent.connect(handles._name(str(peers.addresses[0])))
            with silent:
                time.sleep(0.05)
                monkeypatch.setattr(handles, "_PATIENCE_S", 5.0)
                connect(peers)


def test_settings() -> None:
    with pytest.raises(ConfigError, match=r"data_plane of --kv-transfer-config must be one of .*, not 'nvlink'"):
        TransferConfig(data_plane="nvlink")
    pool = Pool(POOL, range(1), 1)
    for plane in ("auto", "zmq"):
        config = TransferConfig(data_plane=plane)
        assert len(choice.send_planes(pool, config)) == 2, "zmq, and what says that there are no channels"
        assert nccl.channel_maker(pool, config) is None
        assert choice.receive_planes(pool, config) == ZMQ_ONLY
    for plane in ("cuda_ipc", "nccl"):
        for planes_of in (choice.send_planes, choice.receive_planes):
            with pytest.raises(ValueError, match=f"data_plane '{plane}' .*KV is not in GPU memory"):
                planes_of(pool, TransferConfig(data_plane=plane))
    with pytest.raises(ValueError, match="KV is not in GPU memory"):
        choice.send_planes(pool, TransferConfig(data_plane="nccl", secret_key="a", peers="b"))
