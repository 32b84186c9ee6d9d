"""Contexts of which each rank keeps its own blocks: what is found is theirs, and every slot comes back."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.common import match_kv_cache
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang_apb.patches import batches, context_cache, kv_ownership

from sglang_apb.backends.base import Wish
from sglang_apb.config import ApbConfig
from sglang_apb.layout import Layout, LayoutError, Span, plan
from sglang_apb.own_slots import OwnSlots
from sglang_apb.requests import Notes
from sglang_apb.rounds import rounds_of

NUM_RANKS, PAGE, BLOCK = 3, 4, 8
UNIT = NUM_RANKS * BLOCK
CONFIG = ApbConfig(block=BLOCK, anchor=4, passing=2, round_tokens=BLOCK)


def layout_of(num_tokens: int, question_tokens: int) -> Layout:
    return plan(num_tokens, CONFIG, num_ranks=NUM_RANKS, page_size=PAGE, question_tokens=question_tokens)


@pytest.mark.parametrize("num_tokens", [30, 100, 121, 200])
@pytest.mark.parametrize("config", [CONFIG, ApbConfig(block=None, anchor=None, passing=None)], ids=["units", "paper"])
def test_every_rank_has_a_slot_of_its_own_for_each_token_that_it_keeps(num_tokens: int, config: ApbConfig) -> None:
    layout = plan(num_tokens, config, num_ranks=NUM_RANKS, page_size=PAGE, question_tokens=11)
    own = OwnSlots.of(layout)
    slots = own.slots_of(Span(0, num_tokens))
    assert len(slots) == num_tokens and own.num_before(num_tokens) == own.num_slots
    for rank in range(NUM_RANKS):
        spans = [layout.blocks[block] for block in layout.blocks_of(rank)] + [layout.question]
        kept = torch.cat([slots[span.start : span.end] for span in spans])
        assert len(kept.unique()) == len(kept) and int(kept.max()) < own.num_slots
        for span in spans:  # a page is a page
            assert int(slots[span.start]) % PAGE == 0 and torch.equal(
                slots[span.start : span.end], slots[span.start] + torch.arange(len(span))
            )
    holders = own.holders_of(Span(0, layout.context_end))
    assert torch.equal(slots[holders], torch.arange(own.num_before(layout.context_end)))
    assert own.num_slots <= num_tokens // NUM_RANKS + len(layout.question) + layout.most_context_on_a_rank


class Table:
    """SGLang's table of requests' slots."""

    def __init__(self, num_rows: int, length: int) -> None:
        self.req_to_token = torch.zeros((num_rows, length), dtype=torch.int32)
        self.free_slots = list(range(1, num_rows))

    def alloc(self, reqs: list[Any]) -> list[int]:
        for req in reqs:
            if not req.kv.holds_kv:
                req.kv.req_pool_idx = self.free_slots.pop()
        return [req.kv.req_pool_idx for req in reqs]

    def write(self, place: Any, slots: torch.Tensor) -> None:
        self.req_to_token[place] = slots.to(torch.int32)

    def free(self, req: Any) -> None:
        self.free_slots.append(req.kv.req_pool_idx)
        req.kv.req_pool_idx = None

    def available_size(self) -> int:
        return len(self.free_slots)


class Request:
    """The parts of SGLang's Req that its caches look at."""

    def __init__(self, rid: str, tokens: list[int], layout: Layout | None) -> None:
        self.rid, self.extra_key, self.cache_salt = rid, None if layout is None else "\0apb", None
        self.origin_input_ids = self.full_untruncated_fill_ids = array("q", tokens)
        self.output_ids = array("q")
        self.kv, self.lock, self.last_node = ReqKvInfo(), None, None
        self.prefix_len = self.extend_end = 0
        self.session = self.session_id = self.kv_rotation_base = self.positional_embed_overrides = None
        self.priority, self.streaming, self.skip_radix_cache_insert, self.is_done = 0, False, False, False
        self.prefill_notes = Notes()
        if layout is not None:
            own = OwnSlots.of(layout)
            self.prefill_notes = Notes(
                wish=Wish(), context_end=layout.context_end, own_slots=own, rounds=rounds_of(layout, BLOCK)
            )

    def finished(self) -> bool:
        return self.is_done

    def _compute_max_prefix_len(self, num_tokens: int) -> int:
        return num_tokens - 1

    def owned_kv_len(self) -> int:
        return self.kv.kv_committed_len

    def refresh_fill_ids(self) -> None:
        pass


class Server:
    """One rank's cache, and what a model says of each slot: which token its KV is of, for every rank."""

    def __init__(self, num_pages: int) -> None:
        self.allocator = PagedTokenToKVPoolAllocator(num_pages * PAGE, PAGE, torch.float32, "cpu", None, False)
        self.allocator.debug_mode = True
        self.table = Table(64, 512)
        self.cache = context_cache.cache_class(keeps_parts=True)(
            CacheInitParams(
                disable=False,
                req_to_token_pool=self.table,
                token_to_kv_pool_allocator=self.allocator,
                page_size=PAGE,
                tree_components=(ComponentType.FULL,),
            )
        )
        self.num_slots = self.allocator.available_size()
        self.kv: dict[tuple[int, int], tuple[Any, ...]] = {}  # of (rank, slot): the prompt's tokens up to this one

    def admit(self, req: Request) -> None:
        match_kv_cache(req, self.cache, req.origin_input_ids, max_prefix_len=len(req.origin_input_ids) - 1)
        req.kv.cache_protected_len = req.prefix_len
        req.lock = self.cache.lock(req.last_node)
        req.extend_end = req.prefix_len

    def has_slots(self, num_slots: int) -> bool:
        return num_slots + PAGE <= self.allocator.available_size() + self.cache.evictable_size()

    def next_round(self, req: Request) -> bool:
        """Computes a round, if there are slots for it."""
        own, start = req.prefill_notes.own_slots, req.extend_end
        assert own is not None
        end = req.prefill_notes.round_end(start) or own.num_tokens
        if not self.has_slots(own.num_of(Span(start, end))):
            return False
        batch = SimpleNamespace(
            reqs=[req],
            prefix_lens=[start],
            extend_lens=[end - start],
            tree_cache=self.cache,
            req_to_token_pool=self.table,
            token_to_kv_pool_allocator=self.allocator,
            device="cpu",
        )
        kv_ownership._allocate(None, batch)
        req.prefix_len, req.extend_end = start, end
        for token in range(start, end):
            for rank in self.ranks_of(req, token):
                self.kv[rank, self.slot(req, token)] = self.text(req, token)
        return True

    def slot(self, req: Request, token: int) -> int:
        return int(self.table.req_to_token[req.kv.req_pool_idx, token])

    def text(self, req: Request, token: int) -> tuple[Any, ...]:
        return (
            ("question", req.rid, token) if token >= self.context_end(req) else tuple(req.origin_input_ids[: token + 1])
        )

    def context_end(self, req: Request) -> int:
        assert req.prefill_notes.own_slots is not None
        return req.prefill_notes.own_slots.question.start

    def ranks_of(self, req: Request, token: int) -> range:
        owner = token // BLOCK % NUM_RANKS  # whatever the order of a unit's owners
        return range(NUM_RANKS) if token >= self.context_end(req) else range(owner, owner + 1)

    def check(self, live: list[Request]) -> None:
        """Nobody's KV was written over, and no slot is lost or in two places."""
        for req in live:
            for token in range(req.extend_end):
                for rank in self.ranks_of(req, token):
                    assert self.kv[rank, self.slot(req, token)] == self.text(req, token), (req.rid, token)
        held = sum(
            req.prefill_notes.own_slots.num_before(req.extend_end)
            - req.prefill_notes.own_slots.num_before(req.kv.cache_protected_len)
            for req in live
            if req.kv.holds_kv and req.prefill_notes.own_slots
        )
        in_pages = held + sum(-req.extend_end % PAGE for req in live if req.extend_end == len(req.origin_input_ids))
        cached = self.cache.evictable_size() + self.cache.protected_size()
        assert self.allocator.available_size() + cached + in_pages == self.num_slots

    def end(self, req: Request, keeps: bool) -> None:
        """As SGLang's `release_kv_cache`."""
        req.is_done = True
        if req.kv.holds_kv:
            if keeps:
                self.cache.checkpoint(req, up_to=req.extend_end)
            self.cache.free_kv_row(req.kv, [(req.kv.cache_protected_len, req.extend_end)])
        self.cache.unlock(req.lock)
        if req.kv.holds_kv:
            self.cache.on_release(req, checkpointed=keeps)
            self.table.free(req)


def documents(rng: random.Random) -> Iterator[tuple[list[int], int]]:
    """Prompts that begin alike, and the lengths of their questions."""
    texts = [[rng.randrange(1000) for _ in range(UNIT * 8)] for _ in range(4)]
    while True:
        text, question = rng.choice(texts), rng.randrange(1, 12)
        more = [rng.randrange(1000, 2000) for _ in range(rng.choice([0, 5, UNIT]))]
        yield (
            [*text[: rng.randrange(20, len(text))], *more, *(rng.randrange(3000, 4000) for _ in range(question))],
            question,
        )


@pytest.mark.parametrize("num_pages", [400, 64, 40])
def test_random_sequences_against_a_model(num_pages: int) -> None:
    """Prompts that come, go on round by round, end or are given up, and in small pools push others out."""
    num_hits = num_waits = 0
    for seed in range(12):
        rng, server, live = random.Random(seed), Server(num_pages), []
        prompts = documents(rng)
        for step in range(200):
            action = rng.random()
            if action < 0.3 and len(live) < 6:
                tokens, question = next(prompts)
                req = Request(f"{seed} {step}", tokens, layout_of(len(tokens), question))
                server.admit(req)
                num_hits += req.prefix_len > 0
                if server.next_round(req):
                    live.append(req)
                else:
                    num_waits += 1
                    server.end(req, keeps=False)
            elif action < 0.8 and live:
                req = rng.choice(live)
                server.cache.checkpoint(req, up_to=req.extend_end)
                if req.extend_end < len(req.origin_input_ids):
                    num_waits += not server.next_round(req)
            elif live:
                server.end(live.pop(rng.randrange(len(live))), keeps=rng.random() < 0.7)
            server.check(live)
        for req in live:
            server.end(req, keeps=True)
        assert server.cache.protected_size() == 0
        server.cache.evict(EvictParams(num_tokens=server.num_slots))
        assert server.allocator.available_size() == server.num_slots
    assert num_hits > 100 and (num_waits > 0) == (num_pages < 400)


def test_a_context_is_found_in_whole_units_and_under_its_name_alone() -> None:
    server, tokens = Server(400), list(range(UNIT * 3 + 10))
    first = Request("first", tokens, layout_of(len(tokens), 5))
    server.admit(first)
    while first.extend_end < len(tokens):
        assert server.next_round(first)
    server.end(first, keeps=True)
    for length, found in ((UNIT * 3 + 10, 3), (UNIT * 3 - 1, 2), (UNIT + 5, 1), (UNIT - 1, 0)):
        req = Request("again", [*tokens[:length], *range(5000, 5004)], layout_of(length + 4, 4))
        server.admit(req)
        assert req.prefix_len == found * UNIT
        server.end(req, keeps=False)
    exact = Request("exact", tokens, None)
    server.admit(exact)
    assert exact.prefix_len == 0
    server.end(exact, keeps=False)
    touch = MatchPrefixParams(key=RadixKey(array("q", tokens), "\0apb"))  # SGLang's queue looks without a request
    assert server.cache.match_prefix(touch).device_prefix_len == 0


def test_a_batch_that_sglang_cut_elsewhere_gets_its_own_allocation() -> None:
    req = Request("cut", list(range(200)), layout_of(200, 5))
    batch = SimpleNamespace(reqs=[req], prefix_lens=[0], extend_lens=[UNIT + 1])
    assert kv_ownership._allocate(lambda batch: "SGLang's", batch) == "SGLang's"
    assert req.prefill_notes.own_slots is None


def test_a_prompt_without_context_is_none_of_ours() -> None:
    with pytest.raises(LayoutError):
        layout_of(5, 5)
    assert batches.computed_tokens(SimpleNamespace(reqs=[1, 2])) is None
