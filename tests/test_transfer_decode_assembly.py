from __future__ import annotations

import re

import numpy as np
import pytest
from transfer_peers import COMPAT, ITEM_LENS

from sglang_apb.transfer.decode.assembly import Assembly, TransferError
from sglang_apb.transfer.memory.pages import BLOCK_BYTES, plan_blocks
from sglang_apb.transfer.protocol import ownership
from sglang_apb.transfer.protocol.compat import Compat, describe_model, find_difference
from sglang_apb.transfer.protocol.wire import Announce, Block, End, WireError, block_bytes

PAGE = sum(ITEM_LENS)


def _send(assembly: Assembly, rank: int, block: Block) -> None:
    assembly.check_block(rank, block)
    assembly.add_block(rank, block, block_bytes(block, ITEM_LENS))


def _assembly(*ranges: list[tuple[int, int]], num_pages: int = 10) -> Assembly:
    assembly = Assembly(ITEM_LENS, num_pages, [0] * len(ranges))
    for rank, owned in enumerate(ranges):
        assembly.announce(rank, Announce(owned))
    return assembly


def test_complete_only_when_every_rank_ended_and_aux_is_there() -> None:
    assembly = _assembly([(0, 2), (8, 10)], [(2, 8)], [])
    for rank, blocks in enumerate(([Block(0, 6, 0, 2), Block(0, 6, 8, 2)], [Block(0, 6, 2, 6)], [])):
        for block in blocks:
            _send(assembly, rank, block)
    assembly.end(1, End(6 * PAGE, 0, {"ranks": 3}))
    assembly.add_aux(0, b"first token")
    assembly.end(2, End(0, 0, {"ranks": 9}))
    assert not assembly.complete
    assembly.end(0, End(4 * PAGE, 0, {"method": "apb"}))
    assert assembly.complete and assembly.num_bytes == 10 * PAGE
    assert assembly.info == {"method": "apb", "ranks": 3}


def test_end_with_a_missing_block_fails() -> None:
    assembly = _assembly([(0, 10)])
    _send(assembly, 0, Block(0, 5, 0, 10))
    _send(assembly, 0, Block(5, 1, 0, 9))
    assembly.add_aux(0, b"")
    with pytest.raises(TransferError, match=f"{ITEM_LENS[5]} bytes of its pages missing"):
        assembly.end(0, End(10 * PAGE - ITEM_LENS[5], 0, {}))


def test_end_with_another_count_fails() -> None:
    assembly = _assembly([(0, 10)])
    _send(assembly, 0, Block(0, 6, 0, 10))
    with pytest.raises(TransferError, match="it sent 5"):
        assembly.end(0, End(5, 0, {}))


def test_end_without_first_token_fails() -> None:
    with pytest.raises(TransferError, match="first token"):
        _assembly([], num_pages=0).end(0, End(0, 0, {}))


def test_the_same_block_twice_is_not_counted_twice() -> None:
    assembly = _assembly([(0, 10)])
    _send(assembly, 0, Block(0, 3, 0, 10))
    with pytest.raises(WireError, match="arrived before"):
        assembly.check_block(0, Block(2, 1, 9, 1))


def test_a_block_outside_the_announced_pages_is_refused() -> None:
    assembly = _assembly([(0, 4), (6, 10)], [(4, 6)])
    for rank, block in ((0, Block(0, 1, 3, 2)), (0, Block(0, 1, 3, 4)), (1, Block(0, 1, 0, 1))):
        with pytest.raises(WireError, match="outside the pages it announced"):
            assembly.check_block(rank, block)
    unannounced = Assembly(ITEM_LENS, 10, [0])
    with pytest.raises(WireError, match="outside the pages it announced"):
        unannounced.check_block(0, Block(0, 1, 0, 1))


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (([(0, 6)], [(5, 10)]), r"ranks 0 and 1 both hold pages \[5, 6\)"),
        (([(0, 4)], [(5, 10)]), r"no prefill rank holds pages \[4, 5\) of 10"),
        (([(0, 4)], [(4, 9)]), r"no prefill rank holds pages \[9, 10\) of 10"),
        (([], []), r"no prefill rank holds pages \[0, 10\) of 10"),
        (([(0, 11)], []), "inside"),
        (([(0, 6), (5, 10)], []), "disjoint"),
        (([(6, 2)], []), "start <= end"),
    ],
)
def test_ranks_must_partition_the_request(ranges: tuple, message: str) -> None:
    with pytest.raises(TransferError, match=message):
        _assembly(*ranges)


@pytest.mark.parametrize(("item_lens", "num_pages"), [(ITEM_LENS, 37), ((768,) * 60, 2000), ((1 << 21,) * 4, 3)])
def test_blocks_cover_every_cell_once(item_lens: tuple[int, ...], num_pages: int) -> None:
    cells = np.zeros((len(item_lens), num_pages), int)
    for block in plan_blocks(item_lens, range(len(item_lens)), 5, num_pages):
        first = block.first_page - 5
        cells[block.first_buffer :][: block.num_buffers, first : first + block.num_pages] += 1
        assert block_bytes(block, item_lens) <= max(BLOCK_BYTES, max(item_lens))
    assert (cells == 1).all()


def test_clip_and_shift() -> None:
    assert ownership.clip([(0, 3), (7, 12)], (2, 9)) == [(2, 3), (7, 9)]
    assert ownership.clip(ownership.shift([(0, 3), (7, 12)], -2), (0, 100)) == [(0, 1), (5, 10)]


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("model_hash", "other", "same --model-path"),
        ("kv_dtype", "bfloat16", "float32.*bfloat16.*--kv-cache-dtype"),
        ("page_size", 16, "page size 1, the decode server 16.*--page-size"),
        ("num_kv_heads", 2, "KV heads 1, the decode server 2"),
        ("kv_head_lens", [1], "768 bytes in 6 buffers.*1 bytes in 1 buffers"),
        ("aux_item_lens", [7], "256 bytes.*7"),
    ],
)
def test_difference_names_both_values(field: str, value: object, words: str) -> None:
    other = Compat(**{name: getattr(COMPAT, name) for name in COMPAT.__struct_fields__} | {field: value})
    assert find_difference(COMPAT, COMPAT) is None
    difference = find_difference(COMPAT, other)
    assert difference is not None and re.search(words, difference), difference


def test_model_hash_ignores_where_the_model_lies() -> None:
    config = {"hidden_size": 576, "num_hidden_layers": 30, "rope_theta": 1e5}
    line, digest = describe_model("LlamaForCausalLM", config | {"_name_or_path": "a", "dtype": "float32"})
    assert describe_model("LlamaForCausalLM", config | {"_name_or_path": "b", "dtype": "bfloat16"}) == (line, digest)
    assert describe_model("LlamaForCausalLM", config | {"rope_theta": 5e5})[1] != digest
