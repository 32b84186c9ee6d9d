"""APB in SGLang's model: splits the prompt's rows, runs the layers over them, keeps each token's KV."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsMetadata
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from torch.profiler import record_function

from sglang_apb import attention as engines
from sglang_apb import layout as layouts
from sglang_apb import selection
from sglang_apb.attention.base import Build
from sglang_apb.backends import building
from sglang_apb.backends.activations import Activations
from sglang_apb.backends.base import PrefillBackend, Wish
from sglang_apb.backends.handed_on import HandedOn
from sglang_apb.backends.kv_cache import KvCache, Part, indices
from sglang_apb.backends.layer_rows import LayerRows, nothing
from sglang_apb.backends.sparse_attention import SparseAttention
from sglang_apb.config import ApbConfig
from sglang_apb.layout import Layout, Span
from sglang_apb.own_slots import OwnSlots
from sglang_apb.rank_group import RankGroup
from sglang_apb.rounds import Rounds

# Of the prompt whose layer is run before the server is ready; a longer one where the configuration cannot lay it out.
WARM_UP_TOKENS = 32768


class ApbBackend(PrefillBackend):
    """`replicate_kv`: each of several ranks ends up with all of a prompt's KV, to decode; else with what it owns."""

    def __init__(self, model_runner: Any, config: ApbConfig, group: RankGroup, *, replicate_kv: bool) -> None:
        self._runner = model_runner
        self._config = config
        self._group = group
        self._replicate_kv = replicate_kv
        model, page_size = model_runner.model_config, model_runner.page_size
        self._activations = Activations.of_server(model, config, group.size, page_size, replicate_kv)
        self._engine = engines.create(
            engines.choose(config.engine, model_runner.device, model_runner.dtype, model.head_dim)
        )
        self._selector = selection.create(config.selector)

    def plan(self, num_tokens: int, wish: Wish, num_cached: int = 0, round_end: int | None = None) -> Layout:
        return layouts.plan(
            num_tokens,
            self._config,
            num_ranks=self._group.size,
            page_size=self._runner.page_size,
            question_tokens=wish.question_tokens,
            num_cached=num_cached,
            round_end=round_end,
        )

    def rounds(self, plan: Layout) -> Rounds | None:
        return self._activations.rounds(plan)

    @property
    def context_name(self) -> str | None:
        config = self._config
        if config.is_steered_by_question:
            return None
        return f"apb {config.block} {config.anchor} {config.passing} {config.bound} {config.selector}"

    def report(self, plan: Layout) -> dict[str, Any]:
        return {
            "method": "apb",
            "num_ranks": plan.num_ranks,
            "num_blocks": plan.num_blocks,
            "anchor": plan.anchor,
            "passing": plan.passing,
            "selector": self._config.selector,
            "question_tokens": len(plan.question),
            "attention_share": round(plan.attention_share, 4),
        }

    def owned_pages(self, plan: Layout) -> list[tuple[int, int]]:
        return plan.owned_pages(self._group.rank, self._runner.page_size)

    @property
    def keeps_parts(self) -> bool:
        return self._activations.keeps_parts

    def own_slots(self, plan: Layout) -> OwnSlots | None:
        return OwnSlots.of(plan) if self.keeps_parts else None

    def activation_bytes(self, plan: Layout) -> int:
        return self._activations.num_bytes(plan)

    @staticmethod
    def activations(
        model_config: Any, config: ApbConfig, num_ranks: int, page_size: int, replicate_kv: bool
    ) -> Callable[[int], int]:
        return Activations.of_server(model_config, config, num_ranks, page_size, replicate_kv).num_bytes_of

    def builds(self) -> Sequence[Build]:
        model, device, dtype = self._runner.model_config, self._runner.device, self._runner.dtype
        layers = dict(self._layers_to_run())
        return building.builds(self._engine, layers, self._config.order, model, dtype, device)

    def _layers_to_run(self) -> Iterator[tuple[str, SparseAttention]]:
        """What each is of: a prompt, prompts with a block of each rank cached in part, and two rounds."""
        if (layout := self._layout_from(WARM_UP_TOKENS)) is None:
            return
        yield "a prompt", self._attention(layout)
        if self.context_name is None:
            return
        for rank in range(layout.num_ranks):
            if own := layout.blocks_of(rank):
                block = layout.blocks[own[len(own) // 2]]
                behind = dataclasses.replace(layout, num_cached=(block.start + block.end) // 2)
                yield f"a prompt, of which rank {rank} has a part of a block", self._attention(behind)
        border = layout.blocks[layout.num_blocks // 2 // layout.num_ranks * layout.num_ranks].start
        if border > layout.anchor:  # as the first of real rounds
            handed_on = HandedOn()
            yield "a round", self._attention(dataclasses.replace(layout, round_end=border), handed_on)
            handed_on.num_tokens = border
            yield "a later round", self._attention(dataclasses.replace(layout, num_cached=border), handed_on)

    def _attention(self, layout: Layout, handed_on: HandedOn | None = None) -> SparseAttention:
        device = self._runner.device
        return SparseAttention(layout, self._group, self._engine, self._selector, device, handed_on)

    def _layout_from(self, num_tokens: int) -> Layout | None:
        """None when no prompt that fits in the model's context can be laid out."""
        while num_tokens <= self._runner.model_config.context_len:
            with suppress(layouts.LayoutError):
                return self.plan(num_tokens, Wish())
            num_tokens *= 2
        return None

    def prepare(
        self, forward_batch: Any, plan: Layout, on_layer: Callable[[int], None], handed_on: HandedOn
    ) -> Callable[[], Any]:
        if not handed_on.ends_at(plan.num_cached):
            handed_on.clear()
        sparse = self._attention(plan, handed_on)
        slots, sees_cached = self._slots(forward_batch, plan), sparse.num_cached > 0
        cache = KvCache(self._runner, slots, plan, self._group, self._replicate_kv, sees_cached, on_layer)
        return partial(self._prefill, forward_batch, sparse, cache, handed_on)

    def _slots(self, forward_batch: Any, plan: Layout) -> torch.Tensor:
        """Of all of the prompt's tokens so far, int64; the batch has those of the tokens that are computed."""
        if plan.num_cached == 0:
            return forward_batch.out_cache_loc  # type: ignore[no-any-return]
        row = self._runner.req_to_token_pool.req_to_token[forward_batch.req_pool_indices[0]]
        # A copy: SGLang may write the next batch's there while the GPU runs this one's layers.
        return row[: plan.round_end or plan.num_tokens].to(torch.int64, copy=True)  # type: ignore[no-any-return]

    def _prefill(self, forward_batch: Any, sparse: SparseAttention, cache: KvCache, handed_on: HandedOn) -> Any:
        hidden = self._run_layers(forward_batch, sparse, cache)
        if sparse.layout.round_end is None:
            handed_on.clear()
            return self._logits(forward_batch, hidden)
        handed_on.num_tokens = sparse.layout.round_end
        return None

    def _run_layers(self, forward_batch: Any, sparse: SparseAttention, cache: KvCache) -> torch.Tensor:
        rows = sparse.rows
        if self._config.order == "one_pass":
            last_layer = self._runner.model_config.num_hidden_layers - 1
            attention = _OnePass(sparse, cache, last_layer)
            return self._run(forward_batch, attention, rows.tokens, rows.positions, sparse.layout.num_cached)
        self._run(forward_batch, _ContextPass(sparse, cache), rows.tokens[:-1], rows.positions[:-1])
        return self._run(forward_batch, _QuestionPass(sparse, cache), rows.tokens[-1:], rows.positions[-1:])

    def _run(
        self,
        forward_batch: Any,
        attention: _LayerAttention,
        tokens: Iterable[Span],
        positions: Iterable[Span],
        num_cached: int = 0,
    ) -> torch.Tensor:
        """Hidden states of the rows, of the last of them at least, [num_rows, hidden_size]. The batch has the tokens
        behind the cached ones.
        """
        device = forward_batch.input_ids.device
        # By it SGLang cuts off padding; with a recomputed anchor there are more rows than the batch has tokens.
        forward_batch.global_num_token_non_padded_cpu = None
        with forward_context(ForwardContext(attn_backend=attention)):  # type: ignore[arg-type]
            return self._runner.model.model(
                forward_batch.input_ids[indices(tokens, device) - num_cached], indices(positions, device), forward_batch
            )

    def _logits(self, forward_batch: Any, hidden: torch.Tensor) -> Any:
        """Logits of the prompt's last token, and logprobs of the question's where the request wants them.

        Every rank samples for itself, so all must start from the very same bits: rank 0's. Their own rows differ
        in rounding, because their matrix products had different numbers of rows.
        """
        model, metadata = self._runner.model, LogitsMetadata.from_forward_batch(forward_batch)
        num_rows = 1
        if metadata.extend_return_logprob:
            (num_rows,) = metadata.extend_logprob_pruned_lens_cpu  # type: ignore[misc]
            metadata = dataclasses.replace(metadata, extend_logprob_start_lens_cpu=[0])
        last_rows = self._group.broadcast(hidden[-num_rows:].contiguous(), 0).wait()
        metadata = dataclasses.replace(
            metadata,
            extend_seq_lens=torch.full((1,), num_rows, dtype=torch.int64, device=last_rows.device),
            extend_seq_lens_cpu=[num_rows],
        )
        return model.logits_processor(forward_batch.input_ids[-num_rows:], last_rows, model.lm_head, metadata)


class _LayerAttention:
    """Stands in for SGLang's attention backend while a sparse prompt runs (`ForwardContext.attn_backend`)."""

    def __init__(self, sparse: SparseAttention, cache: KvCache) -> None:
        self._sparse = sparse
        self._cache = cache
        self.token_to_kv_pool = cache.pool
        self.req_to_token_pool = cache.req_to_token_pool

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        """q [num_rows, num_q_heads * head_dim] -> attention of the same shape, in the last layer perhaps of fewer rows;
        k, v as SGLang's layers give them.
        """
        rows = LayerRows(
            q.view(-1, layer.tp_q_head_num, layer.qk_head_dim),
            k.view(-1, layer.tp_k_head_num, layer.qk_head_dim),
            v.view(-1, layer.tp_v_head_num, layer.v_head_dim),
            layer.scaling,
        )
        with record_function(f"sparse attention, layer {layer.layer_id}"):  # what `bench trace` finds its way by
            return self._attend(layer, rows).reshape(-1, q.shape[1])

    def _attend(self, layer: Any, rows: LayerRows) -> torch.Tensor:
        raise NotImplementedError

    def _keeping(
        self,
        attend: Callable[[LayerRows, Callable[[], None]], torch.Tensor],
        part: Part,
        layer: Any,
        rows: LayerRows,
    ) -> torch.Tensor:
        """attend(rows), with K and V of `part` kept before it, or sent to other ranks when `attend` says."""
        finishes: list[Callable[[], None]] = []

        def begin() -> None:
            finishes.append(self._cache.start(part, layer, rows.k, rows.v))

        if not self._cache.gathers:  # as soon as can be: a transfer is waiting for it
            begin()
        out = attend(rows, begin if self._cache.gathers else nothing)
        for finish in finishes:
            finish()
        return out


class _OnePass(_LayerAttention):
    def __init__(self, sparse: SparseAttention, cache: KvCache, last_layer: int) -> None:
        super().__init__(sparse, cache)
        self._last_layer = last_layer

    def _attend(self, layer: Any, rows: LayerRows) -> torch.Tensor:
        number = layer.layer_id
        attend = self._sparse.attend_last
        if number != self._last_layer:
            attend = partial(self._sparse.attend, number=number)

        def attend_cached(rows: LayerRows, meanwhile: Callable[[], None]) -> torch.Tensor:
            return attend(self._cache.with_cached(number, rows), meanwhile)

        return self._keeping(attend_cached, self._cache.context_and_question, layer, rows)


class _ContextPass(_LayerAttention):
    def _attend(self, layer: Any, rows: LayerRows) -> torch.Tensor:
        return self._keeping(self._sparse.attend_context, self._cache.context, layer, rows)


class _QuestionPass(_LayerAttention):
    def _attend(self, layer: Any, rows: LayerRows) -> torch.Tensor:
        finish = self._cache.start(self._cache.question, layer, rows.k, rows.v)
        out = self._sparse.attend_question(rows, *self._cache.own_context(layer.layer_id))
        finish()
        return out
