"""Which batch comes next: a round of a long prompt, others in between, nobody cut where a round does not end."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang_apb.patches import batches, insides, rounds

from sglang_apb.backends.base import Wish
from sglang_apb.config import ApbConfig
from sglang_apb.layout import plan
from sglang_apb.options import PluginOptions
from sglang_apb.own_slots import OwnSlots
from sglang_apb.requests import Notes
from sglang_apb.rounds import Rounds

UNIT, SIZE, PAGE = 100, 200, 10


def request(num_tokens: int, *, sparse: bool = False, own: OwnSlots | None = None, cached: int = 0) -> Any:
    notes = Notes(wish=Wish() if sparse else None, own_slots=own)
    if sparse:
        notes.rounds = Rounds(UNIT, SIZE, 0, num_tokens - 30)
    return SimpleNamespace(
        prefill_notes=notes,
        full_untruncated_fill_ids=[0] * num_tokens,
        prefix_len=cached,
        inflight_middle_chunks=0,
        discard_output_reason=None,
    )


class Adder:
    """The part of SGLang's PrefillAdder that ours stands on: budgets, and the batch."""

    def __init__(self, num_slots: int, chunk: int | None) -> None:
        self.page_size, self.rem_chunk_tokens = PAGE, chunk
        self.can_run_list: list[Any] = []
        self.memory_budget = SimpleNamespace(remaining_total=num_slots, total_offset=0, current_offset=0)
        self.new_chunked_req: Any = None

    def ceil_paged_tokens(self, tokens: int) -> int:
        return -(-tokens // PAGE) * PAGE

    def add_chunked_req(self, req: Any) -> Any:
        return self._add(req)

    def add_one_req(self, req: Any, has_chunked_req: bool, truncation_align_size: int | None) -> Any:
        if self.memory_budget.remaining_total - self.memory_budget.total_offset < self._new(req):
            return AddReqResult.NO_TOKEN
        self.new_chunked_req = self._add(req)
        return AddReqResult.CONTINUE

    def _new(self, req: Any) -> int:
        return len(req.full_untruncated_fill_ids) - req.prefix_len

    def _add(self, req: Any) -> Any:
        num_new = min(self._new(req), self.rem_chunk_tokens or 10**9)
        req.extend_end = req.prefix_len + num_new
        self.can_run_list.append(req)
        batches.charge(self, num_new)
        if self.rem_chunk_tokens is not None:
            self.rem_chunk_tokens -= self.ceil_paged_tokens(num_new)
        return req if num_new < self._new(req) else None


class Scheduler:
    """SGLang's passes, as far as prefill goes: `_get_new_batch_prefill_raw` in a few lines."""

    prefill_decode_interval = 0

    def __init__(self, config: str = "{}", num_slots: int = 10_000, chunk: int = 150) -> None:
        self.server_args = SimpleNamespace(plugin_options=PluginOptions("apb", config_text=config))
        self.chunked_req: Any = None
        self.waiting: list[Any] = []
        self.num_slots, self.chunk = num_slots, chunk

    def next_batch(self, num_decodes: int = 0) -> list[tuple[Any, int]] | None:
        running = SimpleNamespace(is_empty=lambda: num_decodes == 0, is_prefill_only=False)
        if (req := self.chunked_req) is not None:
            req.prefix_len = getattr(req, "extend_end", req.prefix_len)
        batch, _ = rounds._take_turns(Scheduler._form, self, None, running)
        return batch and [(req, length) for req, length in zip(batch.reqs, batch.extend_lens, strict=True)]

    def _form(self, delayer: Any, running: Any) -> Any:
        adder = rounds._use_our_adder(lambda self: Adder, self)(self.num_slots, self.chunk)
        if self.chunked_req is not None:
            self.chunked_req = adder.add_chunked_req(self.chunked_req)
        for req in self.waiting:
            if adder.rem_chunk_tokens is not None and adder.rem_chunk_tokens <= 0:
                break
            if adder.add_one_req(req, self.chunked_req is not None, None) != AddReqResult.CONTINUE:
                break
        if not adder.can_run_list:
            return None, running
        self.waiting = [req for req in self.waiting if req not in adder.can_run_list]
        if adder.new_chunked_req is not None:
            assert self.chunked_req is None, "SGLang knows one"
            self.chunked_req = adder.new_chunked_req
        if self.chunked_req is not None:
            self.chunked_req.inflight_middle_chunks += 1
        lens = [req.extend_end - req.prefix_len for req in adder.can_run_list]
        return SimpleNamespace(reqs=adder.can_run_list, extend_lens=lens, chunked_req=self.chunked_req), running


@pytest.fixture(autouse=True)
def decodes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(insides, "pair_half", lambda: None)


def batches_of(scheduler: Scheduler, count: int, num_decodes: int = 0) -> list[Any]:
    return [scheduler.next_batch(num_decodes) for _ in range(count)]


def test_a_long_prompt_comes_in_rounds_and_alone() -> None:
    scheduler, long = Scheduler('{"between_rounds": 0}'), request(650, sparse=True)
    scheduler.waiting = [long, request(20), request(30)]
    found = batches_of(scheduler, 5)
    assert found[:4] == [[(long, 200)], [(long, 200)], [(long, 200)], [(long, 50)]]
    assert [length for _, length in found[4]] == [20, 30]
    assert long.inflight_middle_chunks == 3, "of the four rounds all but the last"


def test_what_was_found_in_the_cache_shifts_no_border() -> None:
    scheduler, long = Scheduler(), request(650, sparse=True, cached=130)
    scheduler.waiting = [long]
    assert batches_of(scheduler, 3) == [[(long, 270)], [(long, 200)], [(long, 50)]]


def test_others_run_between_rounds_up_to_their_share() -> None:
    scheduler = Scheduler('{"between_rounds": 100}')
    long, others = request(650, sparse=True), [request(40) for _ in range(4)]
    scheduler.waiting = [long, *others]
    found = batches_of(scheduler, 6)
    assert found[0] == [(long, 200)]
    assert found[1] == [(other, 40) for other in others[:2]]  # the third does not fit whole
    assert found[2] == [(long, 200)]
    assert found[3] == [(other, 40) for other in others[2:]]
    assert found[4:] == [[(long, 200)], [(long, 50)]]
    assert long.inflight_middle_chunks == 3


def test_who_does_not_fit_between_rounds_waits_and_holds_nobody_up() -> None:
    """Other prompts of two chunks or rounds. A sparse one whose context is cached runs there, alone."""
    scheduler = Scheduler('{"between_rounds": 300}', chunk=100)
    long, second = request(650, sparse=True), request(650, sparse=True, cached=380)
    exact, short, question = request(140), request(40), request(640, sparse=True, cached=610)
    scheduler.waiting = [long, second, exact, short, question]
    found = batches_of(scheduler, 6)
    assert found[:5] == [[(long, 200)], [(short, 40)], [(question, 30)], [(long, 200)], [(long, 200)]]
    assert found[5] == [(long, 50)]
    assert scheduler.next_batch() == [(second, 220)], "long prompts keep their order"


def test_a_turn_ends_after_a_few_batches_however_small_they_are() -> None:
    scheduler, long = Scheduler('{"between_rounds": 100}'), request(650, sparse=True)
    scheduler.waiting = [long]
    assert scheduler.next_batch() == [(long, 200)]
    for _ in range(rounds.MOST_PASSES + 1):
        scheduler.waiting = [request(1000, cached=999)]
        batch = scheduler.next_batch()
    assert batch == [(long, 200)]


def test_a_pass_looks_at_some_that_wait_and_not_at_all() -> None:
    scheduler, long = Scheduler(), request(650, sparse=True)
    scheduler.waiting = [long, *(request(500) for _ in range(rounds.MOST_SKIPPED)), request(20)]
    assert batches_of(scheduler, 2) == [[(long, 200)], [(long, 200)]]


def test_decodes_get_a_step_after_each_batch() -> None:
    scheduler, long = Scheduler('{"between_rounds": 100}'), request(450, sparse=True)
    scheduler.waiting = [long, request(40)]
    lengths = [batch and [length for _, length in batch] for batch in batches_of(scheduler, 6, num_decodes=3)]
    assert lengths == [[200], None, [40], None, [200], None]
    scheduler.prefill_decode_interval = 2  # SGLang's own turns
    assert scheduler.next_batch(num_decodes=3) == [(long, 50)]


def test_slots_of_later_rounds_are_kept() -> None:
    scheduler = Scheduler('{"between_rounds": 100}', num_slots=700)
    long, small, large = request(650, sparse=True), request(30), request(90)
    scheduler.waiting = [long, large, small]
    assert scheduler.next_batch() == [(long, 200)]
    scheduler.num_slots = 500  # what is left: 450 of them are the prompt's
    assert scheduler.next_batch() == [(long, 200)], "in its order: the first that lacks slots ends the others' turn"
    scheduler.waiting, scheduler.num_slots = [small], 300
    assert scheduler.next_batch() == [(small, 30)]


def test_a_prompt_waits_for_slots_and_is_not_cut_elsewhere() -> None:
    scheduler, long = Scheduler(), request(650, sparse=True)
    scheduler.waiting = [long]
    assert scheduler.next_batch() == [(long, 200)]
    scheduler.num_slots = 199
    assert batches_of(scheduler, 2) == [None, None]
    scheduler.num_slots = 10_000
    assert scheduler.next_batch() == [(long, 200)]
    assert long.inflight_middle_chunks == 2


def test_a_round_that_failed_is_the_last() -> None:
    scheduler, long = Scheduler(), request(650, sparse=True)
    scheduler.waiting = [long]
    scheduler.next_batch()
    long.discard_output_reason = SimpleNamespace(message="why")
    long.disagg_kv_sender = SimpleNamespace(set_owned_pages=None, refuse=lambda reason: told.append(reason))
    told: list[str] = []
    assert scheduler.next_batch() is None
    assert scheduler._pending_chunked_abort_req is long and told == ["why"]


@pytest.mark.parametrize("num_slots", [350, 349])
def test_tokens_that_other_ranks_keep_are_not_charged(num_slots: int) -> None:
    """650 tokens of two ranks, of which this one keeps blocks of 50 tokens: 330, and the question's 30."""
    own = OwnSlots.of(plan(650, ApbConfig(block=50, question_tokens=30), num_ranks=2, page_size=PAGE))
    assert own.num_slots == 350
    scheduler, long = Scheduler(num_slots=num_slots), request(650, sparse=True, own=own)
    scheduler.waiting = [long]
    assert scheduler.next_batch() == ([(long, 200)] if num_slots == 350 else None)
    if num_slots == 350:
        scheduler.num_slots = 100
        assert scheduler.next_batch() is None, "a page to spare"
        scheduler.num_slots = 110
        assert scheduler.next_batch() == [(long, 200)]


def test_exact_prompts_are_sglangs() -> None:
    scheduler, first, second = Scheduler(), request(400), request(30)
    scheduler.waiting = [first, second]
    lengths = [[length for _, length in batch] for batch in batches_of(scheduler, 3)]
    assert lengths == [[150], [150], [100, 30]]
