"""What the scheduler decides of a request before any queue sees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang_apb.patches import insides, prefill_forward, scheduling

from sglang_apb.config import parse
from sglang_apb.layout import plan
from sglang_apb.options import PluginOptions
from sglang_apb.own_slots import OwnSlots
from sglang_apb.rounds import rounds_of

SPACE = 300_000_000  # bytes


class Request:
    """The parts of SGLang's Req that decide."""

    def __init__(self, num_tokens: int, *, exact: bool = False) -> None:
        self.origin_input_ids = [0] * num_tokens
        self.output_ids: list[int] = []
        self.sampling_params = SimpleNamespace(custom_params={"prefill": {"exact": exact}})
        self.return_logprob = self.return_hidden_states = False
        self.input_embeds = self.positional_embed_overrides = self.multi_item_delimiter_indices = self.session = None
        self.to_finish = self.error = None
        self.logprob_start_len = -1
        self.skip_radix_cache_insert = False
        self.extra_key, self.rid = "tenant", "r1"

    def finished(self) -> bool:
        return False

    def set_finish_with_abort(self, error: str) -> None:
        self.error = error


def decided(
    req: Request,
    monkeypatch: pytest.MonkeyPatch,
    *,
    keeps_parts: bool,
    config: str,
    page_size: int,
    context_name: str | None = "apb",
    keeps_contexts: bool = False,
) -> Any:
    """`req` after its decision on a server of 2 ranks with 1,000 slots each."""

    def own_slots(layout: Any) -> OwnSlots | None:
        return OwnSlots.of(layout) if keeps_parts else None

    backend = SimpleNamespace(
        keeps_parts=keeps_parts,
        own_slots=own_slots,
        owned_pages=lambda layout: layout.owned_pages(0, page_size),
        activation_bytes=lambda layout: 1_000_000 * len(layout.question),
        context_name=context_name,
        rounds=lambda layout: rounds_of(layout, 1) if context_name else None,
        plan=lambda num_tokens, wish: plan(
            num_tokens, parse(config), num_ranks=2, page_size=page_size, question_tokens=wish.question_tokens
        ),
    )
    monkeypatch.setattr(scheduling, "backend_of", lambda runner: backend)
    scheduler = SimpleNamespace(
        server_args=SimpleNamespace(plugin_options=PluginOptions("apb", config_text=config)),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(device="cpu", activation_space=SPACE)),
        max_total_num_tokens=1000,
        page_size=page_size,
        tree_cache=SimpleNamespace(keeps_contexts=keeps_contexts),
    )
    scheduling._decide(scheduler, req)
    return req


SPARSE = '{"block": 100, "min_tokens": 16}'


@pytest.mark.parametrize(
    ("config", "device", "num_ranks", "shortest"),
    [
        ("{}", "cpu", 1, 2048),
        ("{}", "cuda", 2, 2048),
        ("{}", "cuda", 1, 12288),
        ('{"min_tokens": 0}', "cuda", 1, 0),
        ('{"min_tokens": 5000}', "cpu", 2, 5000),
    ],
)
def test_what_is_too_short_to_run_sparse(config: str, device: str, num_ranks: int, shortest: int) -> None:
    assert parse(config).shortest_sparse(device, num_ranks) == shortest


def test_a_long_prompt_runs_sparse_and_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    req = decided(Request(500), monkeypatch, keeps_parts=False, config=SPARSE, page_size=1)
    notes = insides.notes_of(req)
    assert notes.wish is not None and notes.own_slots is None
    assert req.skip_radix_cache_insert and req.extra_key == "tenant\0r1"  # no other request has this namespace
    assert notes.owned_pages == plan(500, parse(SPARSE), num_ranks=2).owned_pages(0, 1)


@pytest.mark.parametrize(("cached", "new", "num_reqs"), [(0, 499, 1), (100, 300, 1), (0, 500, 2)])
def test_a_sparse_prompt_that_was_batched_or_cut_fails(
    cached: int, new: int, num_reqs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact attention's KV would be found as that of a sparse context."""
    req = decided(Request(500), monkeypatch, keeps_parts=False, config=SPARSE, page_size=1)
    batch = SimpleNamespace(reqs=[req] * num_reqs, prefix_lens=[cached] * num_reqs, extend_lens=[new] * num_reqs)
    with pytest.raises(RuntimeError, match="was batched or cut by SGLang"):
        prefill_forward._plan(batch, SimpleNamespace(server_args=None))
    req.skip_radix_cache_insert = False
    insides.discard(req, "why")
    assert req.skip_radix_cache_insert


@pytest.mark.parametrize("block", [4, 3])
def test_a_rank_that_keeps_its_own_part_leaves_units_that_have_room_for_a_digest(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = f'{{"block": {block}, "min_tokens": 16}}'
    req = decided(Request(500), monkeypatch, keeps_parts=True, config=config, page_size=1, keeps_contexts=True)
    context_end = insides.notes_of(req).context_end
    assert (context_end, req.skip_radix_cache_insert) == ((375, False) if block == 4 else (None, True))


@pytest.mark.parametrize("context_name", ["apb 100 512", None])
def test_a_context_has_a_namespace_where_it_can_be_found_again(
    context_name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = {"keeps_parts": False, "config": SPARSE, "page_size": 16}
    req = decided(Request(500), monkeypatch, **sides, context_name=context_name, keeps_contexts=True)
    notes = insides.notes_of(req)
    if context_name is None:
        assert notes.context_end is None and req.extra_key == "tenant\0r1" and req.skip_radix_cache_insert
    else:
        assert notes.context_end == plan(500, parse(SPARSE), page_size=16).context_end
        assert req.extra_key == "tenant\0apb 100 512" and not req.skip_radix_cache_insert


@pytest.mark.parametrize(("num_tokens", "page_size", "min_tokens"), [(1, 1, 0), (30, 64, 16)])
def test_a_prompt_that_cannot_be_laid_out_runs_exact(
    num_tokens: int, page_size: int, min_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = f'{{"min_tokens": {min_tokens}}}'
    req = decided(Request(num_tokens), monkeypatch, keeps_parts=True, config=config, page_size=page_size)
    notes = insides.notes_of(req)
    assert notes.wish is None and notes.own_slots is None and notes.owned_pages is None and req.error is None
    assert req.extra_key == "tenant" and not req.skip_radix_cache_insert


def test_a_wish_that_nobody_checked_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not every process that takes requests has our checks; an error here would end the scheduler."""
    req = Request(500)
    req.sampling_params.custom_params = {"prefill": {"exact": 1}}
    decided(req, monkeypatch, keeps_parts=False, config=SPARSE, page_size=1)
    assert "['exact'] must be true or false, not 1" in req.error and insides.notes_of(req).wish is None


def test_a_question_that_a_gpu_has_no_room_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for length, error in ((300, None), (301, "takes 0.3 GB of a GPU that has 0.3 GB")):
        req = Request(900)
        req.sampling_params.custom_params = {"prefill": {"question_tokens": length}}
        decided(req, monkeypatch, keeps_parts=False, config=SPARSE, page_size=1)
        assert req.error is error or (error in req.error and "fewer question_tokens" in req.error)
        assert (insides.notes_of(req).wish is None) == bool(error)


def test_an_error_of_ours_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling.requests, "wish_of", lambda *_: 1 // 0)
    req = decided(Request(500), monkeypatch, keeps_parts=False, config=SPARSE, page_size=1)
    assert req.error == "The prompt could not be laid out (ZeroDivisionError: integer division or modulo by zero)."
    assert insides.notes_of(req).wish is None


def test_what_sglang_keeps_out_of_the_cache_stays_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own warm-up requests, for example."""
    req = Request(5)
    req.skip_radix_cache_insert = True
    assert decided(req, monkeypatch, keeps_parts=False, config=SPARSE, page_size=1).skip_radix_cache_insert


@pytest.mark.parametrize(
    ("num_tokens", "exact", "keeps_parts", "error"),
    [
        (990, True, True, ""),
        (998, True, True, "998 tokens does not fit in the 1000 KV slots of a rank: exact attention"),
        (998, True, False, ""),  # SGLang's own limit, which is one for all prompts there
        (1500, False, True, ""),
        (1900, False, True, "1900 tokens needs 1100 of the 1000 KV slots of a rank"),
    ],
)
def test_prompts_that_can_never_have_their_slots_are_refused(
    num_tokens: int, exact: bool, keeps_parts: bool, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    req = decided(Request(num_tokens, exact=exact), monkeypatch, keeps_parts=keeps_parts, config=SPARSE, page_size=1)
    assert (error in req.error) if error else req.error is None
    assert not error or insides.notes_of(req).wish is None


def test_kv_that_a_checkpoint_wants_quantised_is_refused() -> None:
    prefill_forward._check_kv_dtype(torch.bfloat16, torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"this server's is torch\.float8_e4m3fn: give --kv-cache-dtype bfloat16"):
        prefill_forward._check_kv_dtype(torch.float8_e4m3fn, torch.bfloat16)
    with pytest.raises(RuntimeError, match="give --dtype bfloat16 --kv-cache-dtype bfloat16"):
        prefill_forward._check_kv_dtype(torch.bfloat16, torch.float16)
