"""CUDA IPC and NCCL between processes: prefill on the first GPU, decode on the last, which may be the same."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
from transfer_peers import AUX_LENS, make_pages, received, send_owned, wait_for

from sglang_apb.transfer.decode import endpoint
from sglang_apb.transfer.decode.endpoint import DecodeEndpoint
from sglang_apb.transfer.decode.peer import PrefillPeer
from sglang_apb.transfer.decode.request import RequestState
from sglang_apb.transfer.memory.gpu_pages import CudaPages
from sglang_apb.transfer.memory.heads import Shares
from sglang_apb.transfer.planes import choice, nccl
from sglang_apb.transfer.planes.base import OpenSend, Pool
from sglang_apb.transfer.planes.nccl.channel import NcclReceiver, NcclSender
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.prefill.transfer import TransferState
from sglang_apb.transfer.protocol.compat import Compat
from sglang_apb.transfer.protocol.config import TransferConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NUM_LAYERS, NUM_PAGES, PAGE_SIZE, NUM_HEADS, HEAD_BYTES = 3, 20_000, 2, 4, 256
HEAD_LENS = [PAGE_SIZE * HEAD_BYTES] * 2 * NUM_LAYERS
COMPAT = Compat("Toy", "toy", "bfloat16", PAGE_SIZE, NUM_HEADS, HEAD_LENS, list(AUX_LENS))
OPEN = TransferConfig(allow_unencrypted=True)
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
PLANES = pytest.mark.parametrize("plane", ["cuda_ipc", pytest.param("nccl", marks=TWO_GPUS)])
# A process that dies is noticed in less.
PROMISE_S = 5.0


def gpu_pages(device: int, heads: range, seed: int | None) -> tuple[CudaPages, torch.Tensor]:
    """The pages, and their bytes as [buffers, pages, tokens, heads, bytes]. The same for each head of one seed."""
    torch.cuda.set_device(device)
    shape = (2 * NUM_LAYERS, NUM_PAGES, PAGE_SIZE, NUM_HEADS, HEAD_BYTES)
    if seed is None:
        pool = torch.zeros(*shape[:3], len(heads), HEAD_BYTES, dtype=torch.uint8, device="cuda")
    else:
        everything = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
        pool = everything[:, :, :, heads.start : heads.stop].contiguous().cuda()
    torch.cuda.synchronize()
    buffers = [buffer.view(-1) for buffer in pool]
    return CudaPages(buffers, [PAGE_SIZE * len(heads) * HEAD_BYTES] * len(buffers)), pool


def prefill(pipe: Connection, heads: range, repeats: int, is_mapped: bool = True, is_shuffled: bool = True) -> None:
    """Serves room 1 with all pages, each layer `repeats` times in a row of requests. Pages that are not shuffled must
    not be gathered.
    """
    if not is_shuffled:
        NcclSender._gather = None  # type: ignore[method-assign,assignment]
    pages, _ = gpu_pages(0, heads, seed=5)
    sender = PrefillEndpoint("127.0.0.1")
    pool, planes = planes_of(pages, heads, with_memory=is_mapped)
    sender.start_sending(pool, make_pages(6, AUX_LENS, 8), COMPAT, planes)
    pipe.send(sender.port)
    for number in range(1, repeats + 1):
        transfer = sender.open(number)
        assert wait_for(lambda transfer=transfer: transfer.state is TransferState.ASKED, 60)
        ids = np.random.default_rng(7).permutation(NUM_PAGES) if is_shuffled else np.arange(NUM_PAGES)
        send_owned(sender, transfer, ids, [(0, NUM_PAGES)], 5, num_layers=NUM_LAYERS)
        assert wait_for(lambda transfer=transfer: transfer.state is TransferState.DONE, 60)
        pipe.send(transfer.num_bytes)
        sender.close(transfer)
    pipe.recv()


def planes_of(pages: CudaPages, heads: range, *, with_memory: bool = True) -> tuple[Pool, list[OpenSend]]:
    """Of prefill ranks."""
    pool = Pool(pages, heads, PAGE_SIZE)
    config = OPEN if with_memory else dataclasses.replace(OPEN, data_plane="nccl")
    return pool, choice.send_planes(pool, config)


@contextlib.contextmanager
def process(function: Any, *arguments: Any) -> Iterator[tuple[Connection, Any]]:
    context = multiprocessing.get_context("spawn")
    pipe, its_end = context.Pipe()
    child = context.Process(target=function, args=(its_end, *arguments), daemon=True)
    child.start()
    its_end.close()
    try:
        yield pipe, child
    finally:
        child.kill()
        child.join()


def receiver_of(pages: CudaPages, heads: range, plane: str, **settings: Any) -> DecodeEndpoint:
    pool = Pool(pages, heads, PAGE_SIZE)
    planes = choice.receive_planes(pool, TransferConfig(data_plane=plane, allow_unencrypted=True, **settings))
    receiver = DecodeEndpoint(pool, make_pages(None, AUX_LENS, 8), COMPAT, planes=planes)
    receiver.start()
    return receiver


def is_ready(peer: PrefillPeer) -> bool:
    """Whether one of its planes but ZMQ is. The receiver's thread knows a peer before it connects it."""
    halves = peer.pair.halves if hasattr(peer, "pair") else ()
    return any(getattr(half, "_remote", None) or getattr(half, "fetcher", None) for half in halves)


def until_found(receiver: DecodeEndpoint) -> None:
    assert wait_for(lambda: bool(receiver._peers) and all(map(is_ready, receiver._peers.values())), 60)


@PLANES
@pytest.mark.parametrize("theirs", [range(4), range(2, 4)], ids=str)
@pytest.mark.parametrize("ours", [range(4), range(2, 4)], ids=str)
def test_a_gpu_gets_the_other_processs_pages(
    plane: str, theirs: range, ours: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoint, "CHECK_MS", 60_000)  # a block that has come is told of
    if len(theirs) < len(ours):
        pytest.skip("the other half comes from another rank")
    pages, pool = gpu_pages(torch.cuda.device_count() - 1, ours, seed=None)
    receiver = receiver_of(pages, ours, plane)
    try:
        with process(prefill, theirs, 1) as (pipe, _):
            address = ("127.0.0.1", pipe.recv(), "")
            receiver.expect(1, [address], lambda reason: None)
            until_found(receiver)
            ids = np.random.default_rng(8).permutation(NUM_PAGES)
            decode = receiver.open(1, [address], ids, 3, shares=Shares(ours, (ours,)))
            assert received(decode, 60), decode.reason
            assert pipe.recv() == pool.numel() and decode.data_plane == plane
            _, wanted = gpu_pages(torch.cuda.device_count() - 1, ours, seed=5)
            source = torch.from_numpy(np.random.default_rng(7).permutation(NUM_PAGES))
            assert torch.equal(pool[:, torch.from_numpy(ids)], wanted[:, source])
    finally:
        receiver.stop()


@TWO_GPUS
@pytest.mark.parametrize(("is_shuffled", "is_scattered"), [(False, False), (False, True), (True, False)], ids=str)
def test_pages_in_a_row_go_over_nccl_from_where_they_lie_or_to_it(
    is_shuffled: bool, is_scattered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On either side, whatever the other one's are. Of one buffer: blocks are smaller than that here."""
    heads = range(NUM_HEADS)
    pages, pool = gpu_pages(1, heads, seed=None)
    if not is_scattered:
        monkeypatch.setattr(NcclReceiver, "write", None)
    receiver = receiver_of(pages, heads, "nccl", nccl_buffer_mb=16)
    try:
        with process(prefill, heads, 2, False, is_shuffled) as (pipe, _):
            address = ("127.0.0.1", pipe.recv(), "")
            receiver.expect(1, [address], lambda reason: None)
            until_found(receiver)
            _, wanted = gpu_pages(1, heads, seed=5)
            source = np.random.default_rng(7).permutation(NUM_PAGES) if is_shuffled else np.arange(NUM_PAGES)
            ids = np.random.default_rng(8).permutation(NUM_PAGES) if is_scattered else np.arange(NUM_PAGES)
            for number in (1, 2):
                pool.zero_()
                torch.cuda.synchronize()
                decode = receiver.open(number, [address], ids, 3)
                assert received(decode, 60), decode.reason
                assert decode.data_plane == "nccl"
                assert torch.equal(pool[:, torch.from_numpy(ids)], wanted[:, torch.from_numpy(source)])
                receiver.close(decode)
    finally:
        receiver.stop()


@TWO_GPUS
def test_auto_takes_nccl_where_a_pool_cannot_be_read() -> None:
    """As of a prefill rank on another machine."""
    heads = range(NUM_HEADS)
    pages, pool = gpu_pages(1, heads, seed=None)
    receiver = receiver_of(pages, heads, "auto")
    try:
        with process(prefill, heads, 1, False) as (pipe, _):
            address = ("127.0.0.1", pipe.recv(), "")
            receiver.expect(1, [address], lambda reason: None)
            until_found(receiver)
            decode = receiver.open(1, [address], np.arange(NUM_PAGES), 3)
            assert received(decode, 60), decode.reason
            assert decode.data_plane == "nccl" and float(pool.float().mean()) > 0
    finally:
        receiver.stop()


def test_nccl_needs_to_be_named_or_an_open_network() -> None:
    pages, _ = gpu_pages(0, range(NUM_HEADS), seed=None)
    is_open, keys = {"allow_unencrypted": True}, {"secret_key": "prefill0.key_secret", "peers": "peers"}
    for plane, settings, is_possible in (
        *(("auto", {}, False), ("auto", is_open, True), ("auto", is_open | keys, False)),
        *(("nccl", {}, True), ("nccl", keys, True)),
    ):
        config = TransferConfig(data_plane=plane, **settings)
        pool = Pool(pages, range(NUM_HEADS), PAGE_SIZE)
        assert (nccl.channel_maker(pool, config) is not None) == is_possible
        assert choice.receive_planes(pool, config).zmq_too == (plane == "auto")


def test_a_buffer_that_holds_no_pages_is_refused() -> None:
    page_bytes = 5 << 20
    pages = CudaPages([torch.zeros(2 * page_bytes, dtype=torch.uint8, device="cuda")] * 2, [page_bytes] * 2)
    with pytest.raises(ValueError, match=r"nccl_buffer_mb 16 .* holds no 4 pages of 5242880 bytes: use 20 or more"):
        nccl.channel_maker(Pool(pages, range(1), 1), TransferConfig(data_plane="nccl", nccl_buffer_mb=16))


@PLANES
def test_a_prefill_rank_that_is_killed_while_it_is_read_and_one_in_its_place(plane: str) -> None:
    heads = range(NUM_HEADS)
    pages, pool = gpu_pages(torch.cuda.device_count() - 1, heads, seed=None)
    receiver = receiver_of(pages, heads, plane)
    try:
        for is_killed in (True, False):
            with process(prefill, heads, 1000) as (pipe, child):
                address = ("127.0.0.1", pipe.recv(), "")
                receiver.expect(1, [address], lambda reason: None)
                until_found(receiver)
                stop_at = time.monotonic() + 1.0
                for number in range(1, 1000):
                    decode = receiver.open(number, [address], np.arange(NUM_PAGES), 3)
                    if is_killed and time.monotonic() > stop_at:
                        child.kill()
                        assert not received(decode, PROMISE_S)
                        assert decode.state is RequestState.FAILED and "Lost the connection" in decode.reason
                        break
                    assert received(decode, 60), decode.reason
                    receiver.close(decode)
                    if time.monotonic() > stop_at:
                        break
                receiver.close(decode)
        assert wait_for(lambda: not receiver._peers, PROMISE_S)
        assert float(pool.float().mean()) > 0  # this process's GPU still computes
    finally:
        receiver.stop()


def decode_until_killed(pipe: Connection, port: int, plane: str) -> None:
    heads = range(NUM_HEADS)
    pages, _ = gpu_pages(torch.cuda.device_count() - 1, heads, seed=None)
    receiver, address = receiver_of(pages, heads, plane), ("127.0.0.1", port, "")
    receiver.expect(1, [address], lambda reason: None)
    until_found(receiver)
    pipe.send("mapped")
    for number in range(1, 1 << 30):
        request = receiver.open(number, [address], np.arange(NUM_PAGES), 3)
        received(request, 60)
        receiver.close(request)


@PLANES
def test_a_decode_rank_that_is_killed_while_it_reads_harms_nobody(plane: str) -> None:
    heads = range(NUM_HEADS)
    pages, pool = gpu_pages(0, heads, seed=5)
    sender = PrefillEndpoint("127.0.0.1")
    pool_here, planes = planes_of(pages, heads)
    sender.start_sending(pool_here, make_pages(6, AUX_LENS, 8), COMPAT, planes)
    try:
        with process(decode_until_killed, sender.port, plane) as (pipe, child):
            assert pipe.recv() == "mapped"
            for number in range(1, 40):
                transfer = sender.open(number)
                assert wait_for(lambda transfer=transfer: transfer.state is TransferState.ASKED, 60)
                if number == 20:
                    child.kill()
                send_owned(sender, transfer, np.arange(NUM_PAGES), [(0, NUM_PAGES)], 5, num_layers=NUM_LAYERS)
                if number == 20:
                    break
                assert wait_for(lambda transfer=transfer: transfer.state is TransferState.DONE, 60)
                sender.close(transfer)
            assert wait_for(lambda: transfer.state in (TransferState.FAILED, TransferState.DONE), PROMISE_S)
        assert float(pool.float().mean()) > 0
        assert wait_for(lambda: not len(sender._peers), PROMISE_S)
    finally:
        sender.stop()
