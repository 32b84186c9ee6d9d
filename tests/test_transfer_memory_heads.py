"""Servers of different tensor parallel sizes: which heads go where, and that exactly they arrive."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common import conn
from sglang.srt.disaggregation.common.conn import KVTransferError
from transfer_peers import AUX_LENS, COMPAT, decode_endpoint, make_pages, received, start_sending, wait_for

from sglang_apb.transfer.decode.request import DecodeRequest
from sglang_apb.transfer.memory.gpu_pages import open_pool
from sglang_apb.transfer.memory.heads import PagesByHeads, Shares, heads_of
from sglang_apb.transfer.memory.pages import HostPages
from sglang_apb.transfer.observer import Cause, Failure
from sglang_apb.transfer.prefill.endpoint import PrefillEndpoint
from sglang_apb.transfer.prefill.request import PrefillRequest
from sglang_apb.transfer.prefill.transfer import TransferState
from sglang_apb.transfer.protocol import ownership
from sglang_apb.transfer.protocol.hosts import Address
from sglang_apb.transfer.sglang.reasons import Reasons
from sglang_apb.transfer.sglang.sender import ZmqKVSender

NUM_HEADS, PAGE_SIZE, NUM_PAGES, NUM_LAYERS = 4, 2, 60, 2
HEAD_BYTES = (8, 12, 8, 12)  # of a token, in keys and values of two layers
MODEL = msgspec.structs.replace(
    COMPAT, num_kv_heads=NUM_HEADS, page_size=PAGE_SIZE, kv_head_lens=[PAGE_SIZE * size for size in HEAD_BYTES]
)

ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize(
    ("tp_size", "num_kv_heads", "heads"),
    [
        (1, 3, [(0, 3)]),
        (2, 4, [(0, 2), (2, 4)]),
        (3, 3, [(0, 1), (1, 2), (2, 3)]),
        (4, 2, [(0, 1), (0, 1), (1, 2), (1, 2)]),
    ],
)
def test_heads_are_shared_out_as_sglang_does(tp_size: int, num_kv_heads: int, heads: list[tuple[int, int]]) -> None:
    assert [heads_of(rank, tp_size, num_kv_heads) for rank in range(tp_size)] == [range(*pair) for pair in heads]


def test_heads_that_cannot_be_shared_out_are_refused() -> None:
    with pytest.raises(ValueError, match="3 KV heads cannot be shared out evenly to 2 ranks"):
        heads_of(0, 2, 3)


def test_what_a_decode_rank_gets_from_whom() -> None:
    # Decode rank 3 of 4 asks prefill rank 1 of 2, which another decode rank asks, too; both ranks of a prompt's two.
    shares = Shares.between(3, 4, [1, 1], 2, 8)
    assert (shares.heads, shares.of_ranks) == (range(6, 8), (range(6, 8),) * 2)
    assert (shares.asker, shares.num_askers, shares.part_of_rank) == (1, 2, [0, 0])
    assert shares.page_shares == ((0, 1), (0, 1))
    # More prefill ranks than heads: decode rank 1 of 2 asks ranks 4 to 7 of 8, on two context-parallel ranks each.
    shares = Shares.between(1, 2, [4, 4, 5, 5, 6, 6, 7, 7], 8, 4)
    assert shares.of_ranks == (range(2, 3),) * 4 + (range(3, 4),) * 4
    assert shares.page_shares == ((0, 2), (0, 2), (1, 2), (1, 2)) * 2
    # Decode rank 0 of 2 asks prefill ranks 0 and 1 of 4.
    shares = Shares.between(0, 2, [0, 1], 4, 8)
    assert (shares.of_ranks, shares.part_of_rank) == ((range(0, 2), range(2, 4)), [0, 1])
    assert (shares.asker, shares.num_askers) == (0, 1)


def test_heads_that_are_missing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"KV heads \[0, 2\) cannot be put together from .* \[0, 1\)"):
        Shares.between(0, 2, [0], 4, 4)
    with pytest.raises(ValueError, match="cannot be put together"):  # with more ranks than heads, two have the same
        Shares(range(2), (range(1), range(1)))


def make_model(seed: int | None) -> list[np.ndarray]:
    """K and V of two layers, all heads: uint8 [num_pages, page_size, num_heads, head_bytes]."""
    shape = (NUM_PAGES, PAGE_SIZE, NUM_HEADS)
    if seed is None:
        return [np.zeros((*shape, size), np.uint8) for size in HEAD_BYTES]
    return [np.random.default_rng(seed).integers(256, size=(*shape, size), dtype=np.uint8) for size in HEAD_BYTES]


def pool_of(model: list[np.ndarray], heads: range) -> HostPages:
    buffers = [np.ascontiguousarray(buffer[:, :, heads.start : heads.stop]) for buffer in model]
    return HostPages([buffer.reshape(-1) for buffer in buffers], [buffer[0].nbytes for buffer in buffers])


def rows_bytes(num_pages: int) -> int:
    """Of all heads."""
    return num_pages * PAGE_SIZE * NUM_HEADS * sum(HEAD_BYTES)


def all_ask(transfers: PrefillRequest) -> bool:
    def have_asked() -> bool:
        transfers.wait_for_others()
        return transfers.state is TransferState.ASKED

    return wait_for(have_asked)


def rows(pages: HostPages, ids: np.ndarray) -> bytes:
    return pages.gather(0, len(HEAD_BYTES), ids).tobytes()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_GPU)])
@pytest.mark.parametrize("part", [range(0, 1), range(1, 3), range(0, 4)], ids=str)
def test_pages_of_some_heads(device: str, part: range) -> None:
    model, ids = make_model(1), np.random.default_rng(2).permutation(NUM_PAGES)[:7].astype(np.int64)
    buffers = [torch.from_numpy(buffer.copy()).flatten().to(device) for buffer in model]
    item_lens = [buffer[0].nbytes for buffer in model]
    whole = open_pool(buffers, [len(buffer) for buffer in buffers], item_lens)
    pages = PagesByHeads(whole, range(4, 4 + NUM_HEADS), PAGE_SIZE).of(range(4 + part.start, 4 + part.stop))
    assert pages.item_lens == tuple(PAGE_SIZE * len(part) * size for size in HEAD_BYTES)
    cut = [buffer[:, :, part.start : part.stop] for buffer in model]
    assert pages.gather(1, 2, ids).tobytes() == b"".join(buffer[ids].tobytes() for buffer in cut[1:3])
    pages.scatter(1, 2, ids[::-1].copy(), pages.gather(1, 2, ids).data)
    for index, (buffer, was) in enumerate(zip(buffers, model, strict=True)):
        wanted = was.copy()
        if index in (1, 2):
            wanted[ids[::-1], :, part.start : part.stop] = was[ids][:, :, part.start : part.stop]
        assert np.array_equal(buffer.cpu().numpy(), wanted.reshape(-1))


class Servers:
    """Prefill and decode of so many tensor-parallel ranks; `targets[d]` is decode rank d's pool."""

    def __init__(self, prefill_size: int, decode_size: int) -> None:
        self.prefill_size, self.decode_size = prefill_size, decode_size
        self.model = make_model(5)
        self.aux = make_pages(7, AUX_LENS, 8)
        self.senders = [PrefillEndpoint("127.0.0.1") for _ in range(prefill_size)]
        for rank, sender in enumerate(self.senders):
            heads = heads_of(rank, prefill_size, NUM_HEADS)
            start_sending(sender, pool_of(self.model, heads), self.aux, MODEL, heads)
        self.heads = [heads_of(rank, decode_size, NUM_HEADS) for rank in range(decode_size)]
        self.targets = [pool_of(make_model(None), heads) for heads in self.heads]
        self.receivers = [
            decode_endpoint(target, make_pages(None, AUX_LENS, 8), MODEL, heads)
            for target, heads in zip(self.targets, self.heads, strict=True)
        ]
        for receiver in self.receivers:
            receiver.start()

    def prefill_ranks_of(self, decode_rank: int) -> list[int]:
        """As SGLang maps them (common/conn.py, _resolve_rank_mapping)."""
        if self.decode_size >= self.prefill_size:
            return [decode_rank * self.prefill_size // self.decode_size]
        num_ranks = self.prefill_size // self.decode_size
        return list(range(decode_rank * num_ranks, (decode_rank + 1) * num_ranks))

    def stop(self) -> None:
        for endpoint in (*self.senders, *self.receivers):
            endpoint.stop()


@contextlib.contextmanager
def servers(prefill_size: int, decode_size: int) -> Iterator[Servers]:
    made = Servers(prefill_size, decode_size)
    try:
        yield made
    finally:
        made.stop()


def test_shares_of_pages() -> None:
    ranges = [(0, 3), (5, 6), (10, 13)]
    assert [ownership.share(ranges, index, 3) for index in range(3)] == [[(0, 2)], [(2, 3), (5, 6)], [(10, 13)]]
    assert [ownership.share([(4, 5)], index, 2) for index in range(2)] == [[], [(4, 5)]]
    assert ownership.share(ranges, 0, 1) == ranges


SIZES = [(1, 2), (1, 4), (2, 4), (2, 1), (4, 2), (2, 2), (4, 8)]
MORE_THAN_HEADS = [(8, 1), (8, 4), (8, 8), (8, 16), (16, 8)]


@pytest.mark.parametrize(("prefill_size", "decode_size"), SIZES + MORE_THAN_HEADS)
def test_each_decode_rank_gets_its_heads(
    prefill_size: int, decode_size: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(conn, "get_parallel", lambda: SimpleNamespace(num_dp_ranks=1))
    source, target = np.arange(10, 31), np.arange(30, 51)[::-1].copy()
    with servers(prefill_size, decode_size) as peers:
        rooms = []
        for rank, receiver in enumerate(peers.receivers):
            ranks = peers.prefill_ranks_of(rank)
            shares = Shares.between(rank, decode_size, ranks, prefill_size, NUM_HEADS)
            addresses = [Address("127.0.0.1", peers.senders[r].port) for r in ranks]
            rooms.append(receiver.open(1, addresses, target, 3, shares=shares))
        senders = [kv_sender(endpoint) for endpoint in peers.senders]
        for sender in senders:
            assert wait_for(lambda sender=sender: sender.poll() == KVPoll.WaitingForInput)
            assert len(sender._request.transfers) == max(decode_size // prefill_size, 1)
            sender.init(len(source), 2)
            for chunk in (source[:8], source[8:]):
                sender.send(chunk)
        for room, pool, heads in zip(rooms, peers.targets, peers.heads, strict=True):
            assert received(room), room.reason
            assert rows(pool, target) == rows(pool_of(peers.model, heads), source)
            assert len(room.assembly.aux or b"") == sum(AUX_LENS)
        for sender in senders:
            assert wait_for(lambda sender=sender: sender.poll() == KVPoll.Success)
        # Ranks with the same heads share the pages out.
        sent = [sender.num_bytes for sender in senders]
        assert max(sent) - min(sent) <= rows_bytes(1)
        assert sum(sent) == sum(rows_bytes(len(source)) * len(heads) // NUM_HEADS for heads in peers.heads)
        for sender in senders:
            sender.clear()
    assert "dropped a frame" not in caplog.text


def test_what_is_sent_after_the_prefill_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when it is on its way before the end is queued."""
    monkeypatch.setattr(conn, "get_parallel", lambda: SimpleNamespace(num_dp_ranks=1))
    with servers(1, 1) as peers:
        room = peers.receivers[0].open(1, [Address("127.0.0.1", peers.senders[0].port)], np.arange(21), 3)
        sender = kv_sender(peers.senders[0])
        assert wait_for(lambda: sender.poll() == KVPoll.WaitingForInput)
        transfers = sender._request
        finish = transfers.finish

        def finish_late(*arguments: Any) -> None:
            assert wait_for(lambda: sender.num_bytes == rows_bytes(21))
            finish(*arguments)

        monkeypatch.setattr(transfers, "finish", finish_late)
        sender.init(21, 2)
        sender.send(np.arange(8))
        assert wait_for(lambda: sender.num_bytes == rows_bytes(8))
        sender.send(np.arange(8, 21))
        assert received(room), room.reason
        assert (room.assembly.num_hidden_bytes, room.assembly.num_bytes) == (rows_bytes(8), rows_bytes(21))
        sender.clear()


ALONE = Reasons(None)


def kv_sender(endpoint: PrefillEndpoint, reasons: Reasons = ALONE) -> ZmqKVSender:
    """SGLang's sender of a request on a rank with that endpoint."""
    manager = SimpleNamespace(
        prefill_endpoint=endpoint,
        num_layers=NUM_LAYERS,
        attn_cp_rank=0,
        attn_cp_size=1,
        is_dummy_cp_rank=False,
        request_status={},
        update_status=lambda room, status: None,
        contact_seconds=30.0,
        bootstrap_timeout=30.0,
        waiting_timeout=30.0,
        failure_records={},
        reasons=reasons,
        sender_trace_module=None,
        deferred_bootstrap=None,
        defer_decode_allocation=False,
        req_to_decode_prefix_len={},
        transfer_infos={},
        _staging_ctx=None,
        _maybe_ack_drained_abort=lambda room: None,
    )
    return ZmqKVSender(manager, "127.0.0.1:1", 1)  # type: ignore[arg-type]


def test_a_rank_that_did_not_fail_itself_says_why_another_one_did(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be the one that answers the client, and counts the same cause."""
    counted: list[Cause] = []
    monkeypatch.setattr(conn, "get_parallel", lambda: SimpleNamespace(num_dp_ranks=1))
    store = dist.HashStore()
    with servers(2, 1) as peers:
        first, second = (kv_sender(endpoint, Reasons(store)) for endpoint in peers.senders)
        second.kv_mgr.record_failure = second.kv_mgr.failure_records.__setitem__
        for sender in peers.senders:
            monkeypatch.setattr(sender.observer, "failed", lambda room, cause, reason: counted.append(cause))
        second._fail("No GPU memory for the prompt.", Cause.TIMEOUT)
        assert second.poll() == KVPoll.Failed and first.poll() == KVPoll.Bootstrapping
        for sender, is_from_another in ((first, True), (second, False)):
            with pytest.raises(KVTransferError, match="No GPU memory for the prompt") as error:
                sender.failure_exception()
            assert error.value.is_from_another_rank == is_from_another
    assert counted == [Cause.TIMEOUT] * 2


def test_reasons_are_those_of_a_request_and_of_bounded_number() -> None:
    store = dist.HashStore()
    one, another = Reasons(store), Reasons(store)
    for room in range(1000):
        one.tell(room, Failure(f"Reason {room}: it has words.", Cause.LOST))
    assert store.num_keys() <= 65
    assert another.find(999) == Failure("Reason 999: it has words.", Cause.LOST)
    assert not another.find(1) and not Reasons(dist.HashStore()).find(999) and not ALONE.find(999)


def test_without_the_ranks_store_a_request_ends_all_the_same() -> None:
    """The rank that has it is gone."""

    def fail(*_: object) -> None:
        raise dist.DistNetworkError("Connection reset by peer")

    gone = Reasons(SimpleNamespace(set=fail, check=fail))  # type: ignore[arg-type]
    gone.tell(1, Failure("No GPU memory for the prompt."))
    assert not gone.find(1)


def ask_one(peers: Servers) -> tuple[list[DecodeRequest], PrefillRequest]:
    """Both decode ranks ask the one prefill rank."""
    address = [Address("127.0.0.1", peers.senders[0].port)]
    asked_for = [
        receiver.open(1, address, np.arange(5), 0, shares=Shares.between(rank, 2, [0], 1, NUM_HEADS))
        for rank, receiver in enumerate(peers.receivers)
    ]
    sending = PrefillRequest(peers.senders[0], 1)
    assert all_ask(sending)
    return asked_for, sending


def test_when_one_decode_rank_is_gone_the_others_hear_of_it() -> None:
    """Not the whole request is there then: the other rank's part, complete or not, is of no use."""
    with servers(1, 2) as peers:
        asked_for, sending = ask_one(peers)
        peers.receivers[1].close(asked_for[1], "the client is gone")
        assert wait_for(lambda: sending.state is TransferState.FAILED)
        assert not sending.is_sending and sending.failure == Failure("the client is gone", Cause.PEER)
        sending.close("another rank failed")
        assert not received(asked_for[0]) and asked_for[0].reason == "another rank failed"


def test_a_request_that_is_dropped_without_a_word_is_closed_for_all() -> None:
    with servers(1, 2) as peers:
        asked_for, sending = ask_one(peers)
        del sending
        assert not any(map(received, asked_for)) and all("gave the request up" in each.reason for each in asked_for)


def test_heads_that_a_prefill_rank_does_not_have_are_refused() -> None:
    with servers(2, 2) as peers:
        wrong = Address("127.0.0.1", peers.senders[1].port)
        request = peers.receivers[0].open(1, [wrong], np.arange(3), 0)
        sent = peers.senders[1].open(1)
        assert wait_for(lambda: sent.state is TransferState.FAILED)
        assert not received(request)
        assert "asked for KV heads [0, 2) of a prefill rank that has [2, 4)" in request.reason
