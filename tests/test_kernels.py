"""Every Triton kernel against its torch reference: on a GPU, and in Triton's interpreter on any machine.

Triton decides at import whether it interprets, for its own functions too, so that run is a process of its own:
this file again, and test_page_kernels.py, with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from sglang_apb.kernels import key_diff, merge, pack, query, select
from sglang_apb.kernels.candidates import Candidates

from sglang_apb.layout import Span

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=ON_GPU)]
on_device = pytest.mark.parametrize("device", DEVICES)

# Sums of some hundred float32 products, in another order.
TOLERANCE = 1e-4
# Of one rounding of a number around 1.
PRECISION = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}

SHAPES = [(1, 64), (3, 80), (9, 128)]  # KV heads, head_dim
BLOCKS = {
    "nothing": [],
    "empty blocks": [(0, 0), (7, 7)],
    "one candidate": [(5, 6)],
    "shorter than the pool": [(0, 2), (2, 5)],
    "an empty one between": [(3, 70), (70, 70), (70, 101)],
    "over several tiles": [(1, query.TILE - 4), (query.TILE - 4, 2 * query.TILE + 20)],
}
NUM_ROWS = 300


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_kernels_in_tritons_interpreter() -> None:
    whole_layer = Path(__file__).with_name("test_sparse_attention.py")
    files = [__file__, str(Path(__file__).with_name("test_page_kernels.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", *files]
    command += [f"{whole_layer}::{name}" for name in ("test_one_rank_equals_the_oracle", "TestGuards")]
    # No GPU: the interpreter copies what it finds there.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def candidates_of(blocks: Sequence[tuple[int, int]], num_passing: int, device: str = "cpu") -> Candidates:
    return Candidates.of([Span(*block) for block in blocks], [num_passing] * len(blocks), device)


def strided_rows(num_heads: int, head_dim: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as views into one projection's output: [NUM_ROWS, num_heads, head_dim] each."""
    width = num_heads * head_dim
    generator = torch.Generator().manual_seed(seed)
    projected = torch.randn(NUM_ROWS, 16 + 2 * width, generator=generator).to(dtype)
    k, v = projected[:, 16:].split(width, dim=1)
    return k.unflatten(1, (num_heads, head_dim)), v.unflatten(1, (num_heads, head_dim))


def random_question(num_kv_heads: int, head_dim: int) -> torch.Tensor:
    return torch.randn(num_kv_heads, head_dim, generator=torch.Generator().manual_seed(1))


def on_all_shapes(test: Callable[..., None]) -> Callable[..., None]:
    """Of what scores the keys of blocks."""
    for mark in (
        pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS),
        pytest.mark.parametrize(("num_kv_heads", "head_dim"), SHAPES),
        pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str),
        on_device,
    ):
        test = mark(test)
    return test


class TestQuery:
    def test_reference_is_the_plain_formula(self) -> None:
        """mean over question tokens and grouped heads of q . k, max over 5 neighbours in the block"""
        keys, _ = strided_rows(3, 64, torch.float32)
        question = torch.randn(11, 6, 64, generator=torch.Generator().manual_seed(2))
        raw = torch.einsum("qhgd,nhd->nh", question.view(11, 3, 2, 64).double(), keys.double()) / (11 * 2)
        found = query.query_reference(keys, query.mean_question(question, 3), candidates_of([(3, 9), (9, 30)], 1))
        for block, (start, end) in enumerate([(3, 9), (9, 30)]):
            for token in range(start, end):
                wanted = raw[max(token - 2, start) : min(token + 3, end)].amax(dim=0).float()
                torch.testing.assert_close(found[block, :, token - start], wanted, rtol=0, atol=TOLERANCE)
        assert torch.all(found[0, :, 6:] == -torch.inf)

    @on_all_shapes
    def test_kernel(
        self, device: str, dtype: torch.dtype, num_kv_heads: int, head_dim: int, blocks: list[tuple[int, int]]
    ) -> None:
        keys, _ = strided_rows(num_kv_heads, head_dim, dtype)
        question = random_question(num_kv_heads, head_dim)
        wanted = query.query_reference(keys, question, candidates_of(blocks, 1))
        found = query.query_triton(to(device, keys), question.to(device), candidates_of(blocks, 1, device))
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=TOLERANCE)

    @on_device
    def test_pooling_across_a_border_is_noticed(self, device: str) -> None:
        keys, _ = strided_rows(3, 64, torch.float32)
        question = random_question(3, 64)
        wanted = query.query_reference(keys, question, candidates_of([(0, 50), (50, 100)], 1))
        found = query.query_triton(to(device, keys), question.to(device), candidates_of([(0, 100)], 1, device)).cpu()
        distance = (found.view(3, 2, 50).transpose(0, 1) - wanted).abs().amax(dim=(0, 1))
        assert distance[[0, 1, 48, 49]].max() > 100 * TOLERANCE
        assert distance[2:48].max() < TOLERANCE

    @on_device
    def test_strides_that_cannot_be_read_are_refused(self, device: str) -> None:
        keys = torch.zeros(8, 64, 2, device=device).transpose(1, 2)
        with pytest.raises(ValueError, match="contiguous last dimension"):
            query.query_triton(keys, torch.zeros(2, 64, device=device), candidates_of([(0, 8)], 1, device))


class TestKeyDiff:
    def test_reference_is_the_plain_formula(self) -> None:
        """-cos(key, mean of the block's unit keys)"""
        keys, _ = strided_rows(3, 64, torch.float32)
        found = key_diff.key_diff_reference(keys, candidates_of([(3, 9), (9, 30)], 1))
        for block, (start, end) in enumerate([(3, 9), (9, 30)]):
            for head in range(3):
                units = [key / key.norm() for key in keys[start:end, head].double()]
                mean = sum(units) / len(units)
                wanted = torch.stack([-(unit @ mean) / mean.norm() for unit in units]).float()
                torch.testing.assert_close(found[block, head, : end - start], wanted, rtol=0, atol=TOLERANCE)
        assert torch.all(found[0, :, 6:] == -torch.inf)

    def test_a_key_unlike_the_others_is_best_whatever_its_length(self) -> None:
        keys = torch.ones(9, 1, 4)
        keys[4] = torch.tensor([1.0, -1.0, 1.0, -1.0]) / 100
        assert key_diff.key_diff_reference(keys, candidates_of([(0, 9)], 1))[0, 0].argmax() == 4

    @on_all_shapes
    def test_kernel(
        self, device: str, dtype: torch.dtype, num_kv_heads: int, head_dim: int, blocks: list[tuple[int, int]]
    ) -> None:
        keys, _ = strided_rows(num_kv_heads, head_dim, dtype)
        wanted = key_diff.key_diff_reference(keys, candidates_of(blocks, 1))
        found = key_diff.key_diff_triton(to(device, keys), candidates_of(blocks, 1, device))
        torch.testing.assert_close(found.cpu(), wanted, rtol=1e-5, atol=TOLERANCE)

    @on_device
    def test_the_mean_is_the_blocks_own(self, device: str) -> None:
        keys, _ = strided_rows(3, 64, torch.float32)
        wanted = key_diff.key_diff_reference(keys, candidates_of([(0, 50), (50, 100)], 1))
        found = key_diff.key_diff_triton(to(device, keys), candidates_of([(0, 100)], 1, device)).cpu()
        assert (found.view(3, 2, 50).transpose(0, 1) - wanted).abs().max() > 100 * TOLERANCE

    @on_device
    def test_keys_without_a_direction(self, device: str) -> None:
        found = key_diff.key_diff_triton(torch.zeros(8, 1, 64, device=device), candidates_of([(0, 8)], 1, device))
        assert torch.all(found == 0)

    @on_device
    def test_strides_that_cannot_be_read_are_refused(self, device: str) -> None:
        keys = torch.zeros(8, 64, 2, device=device).transpose(1, 2)
        with pytest.raises(ValueError, match="contiguous last dimension"):
            key_diff.key_diff_triton(keys, candidates_of([(0, 8)], 1, device))


def to(device: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on `device`, strides kept."""
    if tensor.device.type == device:
        return tensor
    storage = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return storage.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def random_scores(candidates: Candidates, num_kv_heads: int) -> torch.Tensor:
    """Few different values, so that ties are common; both zeros among them."""
    shape = (len(candidates.spans), num_kv_heads, candidates.max_length)
    drawn = torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(3)) / 3
    drawn = torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(4)) < 0.3, -drawn, drawn)
    for score, span in zip(drawn, candidates.spans, strict=True):
        score[:, len(span) :] = -torch.inf
    return drawn


def _worse(score_and_row: tuple[float, int]) -> tuple[float, int]:
    """Smaller scores last, and later rows last among equals."""
    score, row = score_and_row
    return -score, row


class TestSelect:
    def test_reference_is_the_plain_formula(self) -> None:
        candidates = candidates_of([(10, 30), (30, 70)], 12)
        drawn = random_scores(candidates, 2)
        found = select.select_reference(drawn, candidates)
        for block, span in enumerate(candidates.spans):
            for head, values in enumerate(drawn[block].tolist()):
                best = sorted(zip(values[: len(span)], range(span.start, span.end), strict=True), key=_worse)[:12]
                assert found[block * 12 : block * 12 + 12, head].tolist() == sorted(row for _, row in best)

    @on_device
    @pytest.mark.parametrize("num_passing", [0, 13, 1000])
    @pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
    def test_kernel(self, device: str, blocks: list[tuple[int, int]], num_passing: int) -> None:
        candidates = candidates_of(blocks, num_passing)
        assert candidates.num_selected == sum(min(num_passing, end - start) for start, end in blocks)
        drawn = random_scores(candidates, 2)
        found = select.select_triton(drawn.to(device), candidates_of(blocks, num_passing, device))
        assert torch.equal(found.cpu(), select.select_reference(drawn, candidates))

    @on_device
    def test_scores_in_several_chunks(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(select, "CHUNKS", (128,))
        candidates = candidates_of([(0, 300), (300, 310)], 140)
        drawn = random_scores(candidates, 2)
        found = select.select_triton(drawn.to(device), candidates_of([(0, 300), (300, 310)], 140, device))
        assert torch.equal(found.cpu(), select.select_reference(drawn, candidates))

    @on_device
    def test_blocks_may_hand_on_different_numbers(self, device: str) -> None:
        spans, num_passing = [Span(0, 40), Span(40, 90), Span(90, 95)], [7, 20, 0]
        drawn = random_scores(Candidates.of(spans, num_passing, "cpu"), 2)
        found = select.select_triton(drawn.to(device), Candidates.of(spans, num_passing, device))
        assert torch.equal(found.cpu(), select.select_reference(drawn, Candidates.of(spans, num_passing, "cpu")))

    @on_device
    @pytest.mark.parametrize("values", [(1e-38, -1e-38, 1e-45, 0.0, -0.0), (3e38, torch.inf, -3e38, -torch.inf, 1.0)])
    def test_the_ends_of_the_number_line(self, device: str, values: tuple[float, ...]) -> None:
        drawn = torch.tensor(values)[torch.arange(60) % 5].view(1, 1, 60)
        for num_passing in (1, 24, 47):
            candidates = candidates_of([(0, 60)], num_passing)
            found = select.select_triton(drawn.to(device), candidates_of([(0, 60)], num_passing, device))
            assert torch.equal(found.cpu(), select.select_reference(drawn, candidates))

    @on_device
    def test_a_later_one_of_equals_is_noticed(self, device: str) -> None:
        candidates = candidates_of([(0, 90)], 30)
        drawn = random_scores(candidates, 1)
        flipped = select.select_triton(drawn.flip(-1).to(device), candidates_of([(0, 90)], 30, device)).cpu()
        found, wanted = (89 - flipped).flip(0).long(), select.select_reference(drawn, candidates).long()
        assert torch.equal(drawn[0, 0, found].sort(dim=0).values, drawn[0, 0, wanted].sort(dim=0).values)
        assert not torch.equal(found, wanted)


class TestPack:
    def test_reference_is_the_plain_formula(self) -> None:
        keys, values = strided_rows(3, 64, torch.bfloat16)
        rows = random_rows(20, 3)
        out = torch.empty(20, 2, 3, 64, dtype=torch.bfloat16)
        pack.pack_reference(keys, values, rows, out)
        for selected in range(20):
            for head, row in enumerate(rows[selected].tolist()):
                assert torch.equal(out[selected, 0, head], keys[row, head])
                assert torch.equal(out[selected, 1, head], values[row, head])

    @on_device
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(("num_kv_heads", "head_dim"), SHAPES)
    @pytest.mark.parametrize("num_selected", [0, 1, 45])
    def test_kernel(self, device: str, dtype: torch.dtype, num_kv_heads: int, head_dim: int, num_selected: int) -> None:
        keys, values = strided_rows(num_kv_heads, head_dim, dtype)
        rows = random_rows(num_selected, num_kv_heads)
        wanted = torch.empty(num_selected, 2, num_kv_heads, head_dim, dtype=dtype)
        pack.pack_reference(keys, values, rows, wanted)
        out = torch.empty_like(wanted, device=device)
        pack.pack_triton(to(device, keys), to(device, values), rows.to(device), out)
        assert torch.equal(out.cpu(), wanted)


def random_rows(num_selected: int, num_kv_heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(NUM_ROWS, (num_selected, num_kv_heads), generator=generator, dtype=torch.int32)


class Partials:
    """`count` partials; about a quarter of the rows of each have no key, row 1 has none in any."""

    def __init__(self, count: int, num_heads: int, head_dim: int, dtype: torch.dtype, num_rows: int = 23) -> None:
        generator = torch.Generator().manual_seed(6)
        self.outs, self.lses = [], []
        for number in range(count):
            # Each with strides of its own: out and lse travel together between ranks.
            packed = torch.randn(num_rows, num_heads, head_dim + 1 + number, generator=generator)
            lse = 20 * packed[..., -1]
            lse[torch.rand(num_rows, num_heads, generator=generator) < 0.25] = -torch.inf
            lse[1:2] = -torch.inf
            packed[..., -1] = lse
            packed[..., :head_dim].masked_fill_(lse[..., None] == -torch.inf, torch.nan)  # must not be read
            self.outs.append(packed.to(dtype)[..., :head_dim])
            self.lses.append(packed[..., -1] if number % 2 else lse)

    def merged(self, device: str, *, dtype: torch.dtype | None = None) -> list[torch.Tensor]:
        """`out` and `lse` by the kernel, on the CPU; by the reference in float32 for device "reference"."""
        where = "cpu" if device == "reference" else device
        function = merge.merge_reference if device == "reference" else merge.merge_triton
        outs, lses = ([to(where, part) for part in parts] for parts in (self.outs, self.lses))
        out = torch.empty(outs[0].shape, dtype=dtype or outs[0].dtype, device=where)
        lse = torch.empty(lses[0].shape, device=where)
        function(outs, lses, out, lse)
        return [out.cpu(), lse.cpu()]


class TestMerge:
    def test_reference_is_attention_over_all_keys(self) -> None:
        logits, values = torch.randn(5, 2, 30), torch.randn(30, 2, 64)
        outs, lses = [], []
        for keys in (slice(0, 7), slice(7, 7), slice(7, 30)):
            outs.append(torch.einsum("qhk,khd->qhd", logits[..., keys].softmax(dim=-1), values[keys]))
            lses.append(logits[..., keys].logsumexp(dim=-1) / math.log(2))
        out, lse = torch.empty(5, 2, 64), torch.empty(5, 2)
        merge.merge_reference(outs, lses, out, lse)
        torch.testing.assert_close(out, torch.einsum("qhk,khd->qhd", logits.softmax(dim=-1), values))
        torch.testing.assert_close(lse, logits.logsumexp(dim=-1) / math.log(2))

    @on_device
    @pytest.mark.parametrize("dtype", PRECISION, ids=str)
    @pytest.mark.parametrize(("num_heads", "head_dim"), SHAPES)
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_kernel(self, device: str, dtype: torch.dtype, num_heads: int, head_dim: int, count: int) -> None:
        partials = Partials(count, num_heads, head_dim, dtype)
        out, lse = partials.merged(device)
        wanted, wanted_lse = partials.merged("reference", dtype=torch.float32)
        torch.testing.assert_close(out.float(), wanted, rtol=PRECISION[dtype], atol=PRECISION[dtype])
        torch.testing.assert_close(lse, wanted_lse, rtol=1e-5, atol=1e-5)
        assert torch.all(out[1] == 0) and torch.all(lse[1] == -torch.inf)

    @on_device
    def test_more_partials_than_one_launch_takes(self, device: str) -> None:
        partials = Partials(2 * merge.MAX_AT_ONCE + 1, 2, 64, torch.bfloat16, num_rows=5)
        found, wanted = partials.merged(device, dtype=torch.float32), partials.merged("reference", dtype=torch.float32)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)

    @on_device
    def test_in_place_without_lse_and_no_rows(self, device: str) -> None:
        partials = Partials(2, 3, 64, torch.bfloat16)
        wanted, _ = partials.merged(device)
        outs = [to(device, out) for out in partials.outs]
        lses = [to(device, lse) for lse in partials.lses]
        merge.merge_triton([out[:0] for out in outs], [lse[:0] for lse in lses], outs[0][:0])
        merge.merge_triton(outs, lses, outs[0])
        assert torch.equal(outs[0].cpu(), wanted)

    @on_device
    def test_logarithms_that_overflow_an_exponential(self, device: str) -> None:
        outs = [torch.full((1, 1, 64), value, device=device) for value in (0.0, 1.0)]
        lses = [torch.full((1, 1), value, device=device) for value in (-500.0, 500.0)]
        out = torch.empty_like(outs[0])
        merge.merge_triton(outs, lses, out)
        assert torch.all(out == 1)

    @on_device
    def test_the_wrong_base_is_noticed(self, device: str) -> None:
        """FlashInfer's logarithms are of base 2."""
        partials = Partials(2, 3, 64, torch.float32)
        wanted = partials.merged("reference")[0]
        partials.lses = [lse / math.log(2) for lse in partials.lses]
        assert (partials.merged(device)[0] - wanted).abs().max() > 100 * PRECISION[torch.float32]


@pytest.mark.skipif(INTERPRETED, reason="8 GB, and slow there")
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_GPU)])
def test_offsets_beyond_31_bits(device: str) -> None:
    """Three rows, 2^30 elements apart."""
    far, near = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device), torch.randn(3, 1, 64).bfloat16()
    keys = far.as_strided((3, 1, 64), (2**30, 64, 1))
    keys.copy_(near)
    question, candidates = random_question(1, 64), candidates_of([(0, 3)], 1)
    found = query.query_triton(keys, question.to(device), candidates_of([(0, 3)], 1, device)).cpu()
    torch.testing.assert_close(found, query.query_reference(near, question, candidates), rtol=1e-5, atol=TOLERANCE)
    found = key_diff.key_diff_triton(keys, candidates_of([(0, 3)], 1, device)).cpu()
    torch.testing.assert_close(found, key_diff.key_diff_reference(near, candidates), rtol=1e-5, atol=TOLERANCE)

    out = torch.empty(3, 2, 1, 64, dtype=torch.bfloat16, device=device)
    pack.pack_triton(keys, keys, torch.tensor([[2], [0], [1]], dtype=torch.int32, device=device), out)
    assert torch.equal(out[:, 1].cpu(), near[[2, 0, 1]])

    merge.merge_triton([out[:, 0]], [torch.zeros(3, 1, device=device)], keys)
    assert torch.equal(keys.cpu(), near[[2, 0, 1]])
