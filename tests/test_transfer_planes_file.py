"""A plane that is one file and one line in the table: pages through files in a folder that both servers name."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transfer_peers import (
    HEADS,
    ITEM_LENS,
    Cluster,
    asked,
    cluster,
    half_of,
    make_pages,
    opened,
    received,
    rows,
    send_owned,
    wait_for,
)

from sglang_apb.settings import ConfigError
from sglang_apb.transfer.decode.request import RequestState
from sglang_apb.transfer.planes import choice
from sglang_apb.transfer.planes.base import Pool
from sglang_apb.transfer.planes.file import WRITTEN, FileSend
from sglang_apb.transfer.planes.table import PLANES
from sglang_apb.transfer.prefill.transfer import TransferState
from sglang_apb.transfer.protocol.config import TransferConfig
from sglang_apb.transfer.protocol.wire import Block

OWNED = {1: [[(0, 120)]], 2: [[(0, 30), (90, 120)], [(30, 90)]]}


def of(folder: Path) -> TransferConfig:
    return TransferConfig(data_plane=f"file:{folder}")


def connect(peers: Cluster) -> None:
    """Until every prefill rank knows that its files are read."""
    ready = peers.ask(99, np.arange(0))
    assert wait_for(lambda: all(half_of(sender, FileSend)._readers for sender in peers.senders))
    peers.receiver.close(ready)


def files(folder: Path) -> list[Path]:
    """But for the ranks' addresses."""
    return [path for path in folder.iterdir() if ":" not in path.name]


@pytest.mark.parametrize("num_ranks", OWNED)
def test_pages_come_through_files_of_which_none_is_left(num_ranks: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(num_ranks)
    with cluster(num_ranks, configs=(of(tmp_path), of(tmp_path))) as peers:
        connect(peers)
        target = rng.permutation(500)[:120].astype(np.int64)
        source = rng.permutation(500)[:120].astype(np.int64)
        decode = peers.ask(11, target)
        transfers = [sender.open(11) for sender in peers.senders]
        for rank, (sender, transfer) in enumerate(zip(peers.senders, transfers, strict=True)):
            assert asked(transfer)
            send_owned(sender, transfer, source, OWNED[num_ranks][rank], 5 if rank == 0 else None, chunk=25)
        assert received(decode), decode.reason
        assert wait_for(lambda: all(transfer.state is TransferState.DONE for transfer in transfers))
        for rank, owned in enumerate(OWNED[num_ranks]):
            for start, end in owned:
                assert rows(peers.pool, target[start:end]) == rows(peers.pools[rank], source[start:end])
        assert decode.data_plane == "file" and decode.assembly.num_bytes == 120 * sum(ITEM_LENS)
        assert not files(tmp_path)


def test_files_that_nobody_reads_go_with_their_request(tmp_path: Path) -> None:
    with cluster(configs=(of(tmp_path), of(tmp_path))) as peers:
        connect(peers)
        decode, transfer = opened(peers, 1)
        peers.receiver._dispatch = lambda peer, frame: None  # type: ignore[method-assign]
        send_owned(peers.senders[0], transfer, np.arange(8), [(0, 8)], 5)
        assert wait_for(lambda: bool(files(tmp_path)))
        peers.senders[0].close(transfer)
        assert wait_for(lambda: not files(tmp_path)) and decode.state is RequestState.RECEIVING


def test_a_prefill_rank_that_uses_another_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with cluster(configs=(of(tmp_path / "a"), of(tmp_path / "b"))) as peers:
        decode = peers.ask(1, np.arange(8))
        assert not received(decode)
        assert decode.reason.endswith(f"does not use the folder {tmp_path / 'b'}.")


def test_files_that_are_not_there_change_nothing(tmp_path: Path) -> None:
    (tmp_path / bytes(16).hex()).write_bytes(b"short")
    with cluster(configs=(of(tmp_path), of(tmp_path))) as peers:
        connect(peers)
        decode, transfer = opened(peers, 1)
        sender = peers.senders[0]
        sender.announce(transfer, [(0, 8)])
        for name in (b"", b"\1" * 16, bytes(16), b"../../etc/passwd", None):
            frame = transfer.pack(WRITTEN, Block(0, 6, 0, 8).pack(), name)
            sender.call(partial(sender.reply, transfer.peer, frame))
        time.sleep(0.1)
        assert decode.state is RequestState.RECEIVING and decode.assembly.num_bytes == 0
        sender.send_pages(transfer, (0, 8), lambda: np.arange(8), range(3))
        sender.finish(transfer, 5, {})
        assert received(decode), decode.reason


@pytest.mark.parametrize("plane", ["file", "file:", "zmq:x", "nvlink", "", 3])
def test_a_plane_is_named_as_the_table_says(plane: object) -> None:
    with pytest.raises(ConfigError, match=r"must be one of auto, zmq, cuda_ipc, nccl, file:FOLDER, not"):
        TransferConfig(data_plane=plane)  # type: ignore[arg-type]


@pytest.mark.parametrize("planes_of", [choice.send_planes, choice.receive_planes])
def test_a_folder_that_is_not_there_is_refused(planes_of: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no such folder"):
        planes_of(Pool(make_pages(None), HEADS, 1), of(tmp_path / "no"))


def test_the_example_is_short_and_not_taken_by_itself() -> None:
    import sglang_apb.transfer.planes.file as plane

    assert len(Path(plane.__file__).read_text().splitlines()) <= 120
    assert not PLANES["file"].by_itself and not TransferConfig().may_use("file")
