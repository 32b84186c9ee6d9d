"""Blocks that are fetched over a channel: a queue of this process. tests/test_gpu_transfer.py has NCCL."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transfer_peers
from transfer_peers import (
    AUX_LENS,
    ITEM_LENS,
    Tubes,
    asked,
    cluster,
    connect,
    connected,
    half_of,
    make_pages,
    opened,
    received,
    rows,
    send_owned,
    wait_for,
)

from sglang_apb.transfer import loop
from sglang_apb.transfer.decode import endpoint as decode_endpoint
from sglang_apb.transfer.decode.request import RequestState
from sglang_apb.transfer.planes.nccl import channel, channels, fetcher, receive, send
from sglang_apb.transfer.planes.nccl.channels import ChannelError, ChannelMaker, Join, pack_fetch, parse_fetch
from sglang_apb.transfer.planes.nccl.receive import NcclReceive
from sglang_apb.transfer.planes.nccl.send import NcclSend
from sglang_apb.transfer.prefill import endpoint as prefill_endpoint
from sglang_apb.transfer.prefill.transfer import TransferState
from sglang_apb.transfer.protocol import wire
from sglang_apb.transfer.protocol.wire import Block, Frame, Kind, WireError
from sglang_apb.transfer.worker import Worker

OWNED = {1: [[(0, 120)]], 2: [[(0, 30), (90, 120)], [(30, 90)]]}


@pytest.mark.parametrize("num_ranks", OWNED)
@pytest.mark.parametrize("sizes", [{}, {"decode's": 3000}, {"prefill's": 3000}], ids=str)
def test_blocks_are_fetched(num_ranks: int, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several requests at once, in fewer slots than they have blocks; the smaller side's size counts."""
    monkeypatch.setattr(send, "MIN_SLOT_BYTES", 3000)
    monkeypatch.setattr(receive, "MIN_SLOT_BYTES", 3000)
    rng = np.random.default_rng(num_ranks)
    tubes = Tubes()
    tubes.slot_bytes = sizes
    with connected(num_ranks, tubes=tubes) as peers:
        assert {end.slot_bytes for end in tubes.ends} == {min(sizes.values(), default=1 << 26)}
        targets = rng.permutation(500)[:360].reshape(3, 120).astype(np.int64)
        source = rng.permutation(500)[:120].astype(np.int64)
        decodes = [peers.ask(number, target) for number, target in enumerate(targets)]
        transfers = [[sender.open(number) for sender in peers.senders] for number in range(3)]
        for of_request in transfers:
            for rank, (sender, transfer) in enumerate(zip(peers.senders, of_request, strict=True)):
                assert asked(transfer)
                send_owned(sender, transfer, source, OWNED[num_ranks][rank], 5 if rank == 0 else None)
        for decode, target, of_request in zip(decodes, targets, transfers, strict=True):
            assert received(decode), decode.reason
            assert wait_for(lambda of=of_request: all(transfer.state is TransferState.DONE for transfer in of))
            for rank, owned in enumerate(OWNED[num_ranks]):
                for start, end in owned:
                    assert rows(peers.pool, target[start:end]) == rows(peers.pools[rank], source[start:end])
            assert decode.data_plane == "nccl" and not decode.unconfirmed
            assert (
                decode.assembly.num_bytes == sum(transfer.num_bytes for transfer in of_request) == 120 * sum(ITEM_LENS)
            )


def test_a_block_is_placed_when_it_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else wakes the decode rank here."""
    monkeypatch.setattr(decode_endpoint, "CHECK_MS", 60_000)
    monkeypatch.setattr(loop, "PING_MS", 60_000)
    monkeypatch.setattr(prefill_endpoint, "PROBE_MS", 60_000)
    with connected(tubes=Tubes()) as peers:
        decode, transfer = opened(peers, 1)
        peers.senders[0].announce(transfer, [(0, 8)])
        peers.senders[0].send_pages(transfer, (0, 8), lambda: np.arange(8), range(3))
        assert wait_for(lambda: decode.assembly.num_bytes == 8 * sum(ITEM_LENS))
        peers.senders[0].finish(transfer, 5, {})
        assert received(decode), decode.reason


def test_whatever_keeps_a_block_from_its_place_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left on device")

    with connected(tubes=Tubes()) as peers:
        monkeypatch.setattr(transfer_peers._TubeEnd, "write", fail)
        decode, transfer = opened(peers, 1, np.arange(0, 16, 2))
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert not received(decode)
        assert "could not be placed: no space left on device" in decode.reason


def test_a_prefill_rank_that_ends_a_channel_ends_what_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that does not end its requests. What has ended before is not counted again."""
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        tubes.before_arrival = lambda: False
        decode, transfer = opened(peers, 1)
        others, _ = opened(peers, 2)
        ended, its = opened(peers, 3)
        for request in (transfer, its):
            peers.senders[0].announce(request, [(0, 8)])
            peers.senders[0].send_pages(request, (0, 8), lambda: np.arange(8), range(3))
        assert wait_for(lambda: bool(decode.pending and ended.pending))
        counted: list[int] = []
        monkeypatch.setattr(peers.receiver.observer, "failed", lambda number, *_: counted.append(number))
        peers.receiver.give_up(ended)
        peers.senders[0].call(partial(half_of(peers.senders[0], NcclSend).refuse, transfer.peer, "no memory"))
        assert not received(decode)
        assert decode.reason.endswith("is closed (no memory).") and others.state is RequestState.RECEIVING
        assert counted == [3, 1]


def test_a_request_waits_for_blocks_that_are_on_their_way() -> None:
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        tubes.before_arrival = lambda: False
        decode, transfer = opened(peers, 1)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert wait_for(lambda: bool(decode.held_back))
        time.sleep(0.05)
        assert decode.state is RequestState.RECEIVING and decode.assembly.num_bytes == 0
        tubes.before_arrival = lambda: True
        assert received(decode), decode.reason


def test_what_waited_for_blocks_stays_before_what_comes_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a request arrives when its last block is in place, and its first token still waits for the loop."""
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        tubes.before_arrival = lambda: False
        decode, transfer = opened(peers, 1)
        sender = peers.senders[0]
        sender.announce(transfer, [(0, 8)])
        sender.send_pages(transfer, (0, 8), lambda: np.arange(8), range(3))
        assert wait_for(lambda: bool(decode.pending))
        row = peers.auxes[0].gather(0, len(AUX_LENS), np.array([5]))
        first_token = wire.pack(Kind.AUX, 1, transfer.attempt, b"", row.data)
        sender.call(partial(sender._peers.reply, transfer.peer, first_token))
        assert wait_for(lambda: len(decode.held_back) == 1)
        later: list[Callable[[], None]] = []
        with monkeypatch.context() as patched:
            patched.setattr(peers.receiver, "call", later.append)
            tubes.before_arrival = lambda: True
            assert wait_for(lambda: not decode.pending and bool(later))
            sender.finish(transfer, None, {})
            assert wait_for(lambda: len(decode.held_back) == 2)
        for command in later:
            peers.receiver.call(command)
        assert received(decode), decode.reason


def test_the_end_comes_when_pages_are_not_read_any_more() -> None:
    """Until then they must not change, and so the request must not be over."""
    tubes = Tubes()
    tubes.needs_no_pages = False
    with connected(tubes=tubes) as peers:
        decode, transfer = opened(peers, 1)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert wait_for(lambda: decode.assembly.num_bytes == 8 * sum(ITEM_LENS))
        time.sleep(0.05)
        assert decode.state is RequestState.RECEIVING and transfer.state is TransferState.ASKED
        tubes.needs_no_pages = True
        assert received(decode), decode.reason
        assert wait_for(lambda: transfer.state is TransferState.DONE)


def test_the_end_comes_when_every_block_has_been_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that is fetched when its request is gone is any bytes: the request must not be complete with them."""
    with connected(tubes=Tubes()) as peers:
        (peer,) = peers.receiver._peers.values()
        fetches: list[list[wire.Buffer]] = []
        monkeypatch.setattr(half_of(peer, NcclReceive).fetcher, "_send", fetches.append)
        decode, transfer = opened(peers, 1)
        sender = peers.senders[0]
        send_owned(sender, transfer, np.arange(8), [(0, 8)], 5)
        assert wait_for(lambda: bool(fetches))
        time.sleep(0.05)
        assert not decode.held_back
        monkeypatch.setattr(sender, "_drop", lambda *_: None)  # STOP comes too late
        sender.close(transfer)
        peers.receiver.call(partial(peers.receiver._send, peers.addresses[0], fetches[0]))
        assert wait_for(lambda: not decode.pending)
        time.sleep(0.05)
        assert decode.state is RequestState.RECEIVING
        peers.receiver.close(decode)


def test_pages_that_fit_no_slot_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send, "MIN_SLOT_BYTES", 100)
    monkeypatch.setattr(receive, "MIN_SLOT_BYTES", 100)
    tubes = Tubes()
    tubes.slot_bytes = {"decode's": 100}
    assert max(ITEM_LENS) > 100
    with connected(tubes=tubes) as peers:
        decode, transfer = opened(peers, 1)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert received(decode), decode.reason
        assert decode.data_plane == "zmq" and rows(peers.pool, np.arange(8)) == rows(peers.pools[0], np.arange(8))


def test_no_more_blocks_are_ready_than_there_are_slots() -> None:
    """A prefill rank that says so must not fill this side's memory."""
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        tubes.before_arrival = lambda: False
        decode, transfer = opened(peers, 1)
        peers.senders[0].announce(transfer, [(0, 8)])
        for first in range(len(ITEM_LENS)):
            for page in range(8):
                ready = wire.pack(Kind.READY, 1, transfer.attempt, Block(first, 1, page, 1).pack())
                peers.senders[0].call(partial(peers.senders[0]._peers.reply, transfer.peer, ready))
        assert wait_for(lambda: len(decode.pending) == 2 * channels.NUM_SLOTS)
        time.sleep(0.05)
        assert len(decode.pending) == 2 * channels.NUM_SLOTS


def test_blocks_that_are_not_fetched_are_let_go_with_their_request() -> None:
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        sender, holder = peers.senders[0], next(end for end in tubes.ends if end.is_prefill)
        peers.receiver._dispatch = lambda peer, frame: None  # type: ignore[method-assign]
        transfers = []
        for number in range(1, channels.NUM_SLOTS + 3):
            peers.ask(number, np.arange(8))
            transfers.append(sender.open(number))
            assert asked(transfers[-1])
            send_owned(sender, transfers[-1], np.arange(8), [(0, 8)], 5)
        assert wait_for(lambda: holder.num_held == channels.NUM_SLOTS)
        time.sleep(0.05)
        assert holder.num_held == channels.NUM_SLOTS, "the others wait for a slot"
        for transfer in transfers:
            sender.close(transfer)
        assert wait_for(lambda: holder.num_held == 0)


def test_a_block_of_a_request_that_is_gone_leaves_the_channel_in_order() -> None:
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        sender = peers.senders[0]
        first, transfer = opened(peers, 1)
        sender.announce(transfer, [(0, 8)])
        assert wait_for(lambda: first.assembly._ranges[0] is not None)
        # READY, of a request that is closed when its FETCH comes.
        ready = wire.pack(Kind.READY, 1, transfer.attempt, Block(0, 6, 0, 8).pack())
        sender.call(partial(sender._peers.reply, transfer.peer, ready))
        assert wait_for(lambda: first.data_plane == "nccl" and not first.pending)
        sender.close(transfer, "The client went away.")
        assert wait_for(lambda: first.state is RequestState.FAILED)
        assert first.reason == "The client went away."
        second, transfer = opened(peers, 2, np.arange(10, 18))
        send_owned(sender, transfer, np.arange(8), [(0, 8)], 5)
        assert received(second), second.reason
        assert rows(peers.pool, np.arange(10, 18)) == rows(peers.pools[0], np.arange(8))


@pytest.mark.parametrize("kind", [ChannelError, ValueError])
def test_a_channel_that_breaks_fails_its_requests_and_later_ones_go_over_zmq(kind: type[Exception]) -> None:
    """Whatever the error: the other side waits for that block, and would take the next one for it."""
    tubes = Tubes()
    with connected(tubes=tubes) as peers:

        def fail() -> None:
            raise kind("remote process exited")

        tubes.before_send = fail
        decode, transfer = opened(peers, 1)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert not received(decode)
        assert "does not work (remote process exited)" in decode.reason == transfer.reason
        assert wait_for(lambda: all(end.is_closed for end in tubes.ends))
        decode, transfer = opened(peers, 2)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert received(decode), decode.reason
        assert decode.data_plane == "zmq"


def test_a_block_that_never_comes_ends_its_channel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection for control is there, NCCL's is not."""
    monkeypatch.setattr(fetcher, "ARRIVAL_S", 0.3)
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        tubes.before_arrival = lambda: False
        decode, transfer = opened(peers, 1)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert not received(decode)
        assert "a block has not come for 0.3 s" in decode.reason
        assert wait_for(lambda: transfer.state is TransferState.FAILED)
        tubes.before_arrival = lambda: True
        connect(peers)
        decode, transfer = opened(peers, 2)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert received(decode) and decode.data_plane == "nccl"


def test_wrong_frames_while_blocks_are_on_their_way_cost_no_slot() -> None:
    tubes = Tubes()
    with connected(tubes=tubes) as peers:
        sender = peers.senders[0]
        for number in range(1, channels.NUM_SLOTS + 2):
            arrives = threading.Event()
            tubes.before_arrival = arrives.is_set
            decode, transfer = opened(peers, number)
            sender.announce(transfer, [(0, 8)])
            sender.send_pages(transfer, (0, 8), lambda: np.arange(8), range(3))
            assert wait_for(lambda transfer=decode: bool(transfer.pending))
            for _ in range(4):
                wrong = wire.pack(Kind.AUX, number, transfer.attempt, b"", b"short")
                sender.call(partial(sender._peers.reply, transfer.peer, wrong))
            assert wait_for(lambda transfer=decode: len(transfer.held_back) == 2), "AUX and END of one rank, at most"
            arrives.set()
            assert wait_for(lambda transfer=decode: not transfer.pending)
            sender.finish(transfer, 5, {})
            assert received(decode), decode.reason


def test_channels_are_closed_when_a_rank_is_gone() -> None:
    tubes = Tubes()
    with connected(2, tubes=tubes) as peers:
        peers.senders[1].stop()
        assert wait_for(lambda: sum(end.is_closed for end in tubes.ends) == 1)
        peers.receiver.stop()
        assert wait_for(lambda: sum(end.is_closed for end in tubes.ends) == 2)
        peers.senders.pop()
        peers.receiver.start = peers.receiver.stop = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize("side", ["prefill's", "decode's"])
def test_where_there_is_no_memory_for_a_channel_pages_are_sent(side: str) -> None:
    tubes = Tubes()
    tubes.has_memory[side] = False
    with cluster(tubes=tubes) as peers:
        decode, transfer = opened(peers, 1)
        time.sleep(0.1)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert received(decode), decode.reason
        assert decode.data_plane == "zmq" and not tubes.ends


def test_a_channel_leaves_a_gpu_some_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted when it has its own: what PyTorch keeps of a channel that was closed is used again."""
    for left, is_enough in ((1023, False), (1024, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, left=left: (left << 20, 80 << 30))
        if is_enough:
            assert channel.find_memory(1 << 20, torch.device("cpu")).nbytes == 4 << 20
            continue
        with pytest.raises(ChannelError, match=r"beside the 4 MB of a channel 1023 MB .* would be free, and 1024 are"):
            channel.find_memory(1 << 20, torch.device("cpu"))


@pytest.mark.parametrize("zmq_too", [True, False])
def test_where_there_is_no_channel_pages_are_sent(zmq_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ranks on one GPU."""
    tubes = Tubes()
    make = Tubes.maker
    monkeypatch.setattr(Tubes, "maker", lambda self, pages, gpu: make(self, pages, "the only one"))
    with cluster(tubes=tubes, zmq_too=zmq_too) as peers:
        decode, transfer = peers.ask(1, np.arange(8)), peers.senders[0].open(1)
        if not zmq_too:
            assert not received(decode)
            assert "both ranks are on one GPU" in decode.reason
            return
        assert asked(transfer)
        time.sleep(0.1)
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert received(decode), decode.reason
        assert decode.data_plane == "zmq" and not tubes.ends


def test_channels_that_are_never_met_are_of_bounded_number() -> None:
    said: list[Join] = []
    never = threading.Event()
    side = SimpleNamespace(call=lambda _: None, reply=lambda _, frame: said.append(Join.parse(wire.parse(frame))))
    maker = ChannelMaker("prefill's", lambda: b"id", lambda *_: never.wait(10), lambda *_: None, 1 << 30, int)  # type: ignore[arg-type,return-value]
    half = NcclSend(side, maker)  # type: ignore[arg-type]

    def join(peer: bytes, message: Join) -> None:
        half.take(peer, wire.parse(message.pack()))

    join(b"unknown", Join(unique_id=b"id"))
    assert "no such channel" in said.pop().reason
    join(b"small", Join(gpu="decode's", slot_bytes=channels.MIN_SLOT_BYTES - 1))
    assert f"are less than {channels.MIN_SLOT_BYTES}" in said.pop().reason
    for number in range(send.MAX_MAKING + 1):
        join(str(number).encode(), Join(gpu="decode's", slot_bytes=channels.MIN_SLOT_BYTES))
    never.set()
    assert [answer.reason for answer in said] == [f"{send.MAX_MAKING} channels are being made already"]


def test_a_decode_rank_takes_no_invitation_that_it_did_not_ask_for() -> None:
    half = NcclReceive(SimpleNamespace(), Tubes().maker(make_pages(None), "decode's"))  # type: ignore[arg-type]
    with pytest.raises(WireError, match="nobody asked for"):
        half.hear(wire.parse(Join(unique_id=b"id").pack()))


def test_frames_out_of_bounds() -> None:
    block = Block(0, 6, 0, 2)

    def frame(body: bytes) -> Frame:
        return wire.parse(wire.pack(Kind.FETCH, 1, 1, body))

    assert parse_fetch(frame(pack_fetch(block, 100)), 100) == (block, 100)
    for body, reason in (
        (pack_fetch(block, 101), "101 bytes, at most 100"),
        (pack_fetch(block, 0), "0 bytes"),
        (block.pack(), "body of 16 bytes"),
        (b"short", "a block of 5 bytes"),
    ):
        with pytest.raises(WireError, match=reason):
            parse_fetch(frame(body), 100)
    with pytest.raises(WireError, match="outside 5 buffers"):
        wire.block_of(wire.parse(wire.pack(Kind.READY, 1, 1, block.pack())), 5, 2)


def test_a_fetch_of_another_size_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's send would wait for ever, on the prefill rank's GPU."""
    with connected(tubes=Tubes()) as peers:
        refused: list[str] = []
        monkeypatch.setattr(peers.senders[0].observer, "refused_frame", lambda _, error: refused.append(str(error)))
        decode, transfer = opened(peers, 1)
        decode.closed = True  # so that the decode rank does not ask for it
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert wait_for(lambda: bool(half_of(peers.senders[0], NcclSend).held(transfer)))
        (block,) = half_of(peers.senders[0], NcclSend).held(transfer)
        fetch = wire.pack(Kind.FETCH, 1, transfer.attempt, pack_fetch(block, 100))
        peers.receiver.call(partial(peers.receiver._send, peers.addresses[0], fetch))
        assert wait_for(lambda: refused == [f"FETCH: 100 bytes of a block of {8 * sum(ITEM_LENS)}"]), refused
        assert (
            set(half_of(peers.senders[0], NcclSend).held(transfer)) == {block} and transfer.state is TransferState.ASKED
        )


def test_frames_that_are_not_expected_change_nothing() -> None:
    with cluster() as peers:
        decode, transfer = opened(peers, 1)
        sender = peers.senders[0]
        sender.announce(transfer, [(0, 8)])
        ready = wire.pack(Kind.READY, 1, transfer.attempt, Block(0, 6, 0, 8).pack())
        sender.call(partial(sender._peers.reply, transfer.peer, ready))
        fetch = wire.pack(Kind.FETCH, 1, transfer.attempt, pack_fetch(Block(0, 6, 0, 8), 100))  # there is no channel
        peers.receiver.call(partial(peers.receiver._send, peers.addresses[0], fetch))
        time.sleep(0.1)
        assert decode.state is RequestState.RECEIVING and not decode.pending
        sender.send_pages(transfer, (0, 8), lambda: np.arange(8), range(3))
        sender.finish(transfer, 5, {})
        assert received(decode)


def test_a_worker_runs_calls_in_their_order_and_goes_on_after_an_error() -> None:
    worker, ran = Worker("test"), []
    may_go_on = threading.Event()
    worker.submit(lambda: may_go_on.wait(10))
    futures = [worker.submit(partial(ran.append, number)) for number in range(3)]
    failed = worker.submit(lambda: 1 / 0)
    last = worker.submit(lambda: "done")
    worker.end()
    assert not ran and not any(future.done() for future in futures)
    may_go_on.set()
    assert last.result(10) == "done" and ran == [0, 1, 2]
    with pytest.raises(ZeroDivisionError):
        failed.result()
    assert wait_for(lambda: all(thread.name != "test" for thread in threading.enumerate()))
