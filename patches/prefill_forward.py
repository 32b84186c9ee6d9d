"""Targets: `ForwardBatch.init_new`, `ModelRunner._forward_raw`. Reason: the batch's one long prompt goes to the
prefill backend instead of SGLang's eager runner or CUDA graphs. Official point tried: an attention backend of one's own
sees a layer's rows after SGLang has chosen which rows a rank computes.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any

from sglang_apb.patches import insides, last_layer, pd_prefill
from sglang_apb.patches._patch import Patch

from sglang_apb import config, metrics, requests
from sglang_apb.transfer.config import BACKEND

logger = logging.getLogger(__name__)


def backend_of(model_runner: Any) -> Any:
    """The rank's prefill backend, made at its first use."""
    backend = getattr(model_runner, "prefill_backend", None)
    if backend is None:
        backend = model_runner.prefill_backend = _create(model_runner)
    return backend


def _create(model_runner: Any) -> Any:
    from sglang_apb import backends
    from sglang_apb.rank_group import RankGroup

    server_args = model_runner.server_args
    options = insides.options_of(server_args)
    group = insides.sequence_parallel_group() if options.sp_size > 1 else None
    settings, replicate_kv = config.parse(options.config_text), replicates_kv(server_args)
    last_layer.drop_rows(model_runner.model)
    return backends.load(options.backend)(model_runner, settings, RankGroup(group), replicate_kv=replicate_kv)


def replicates_kv(server_args: Any) -> bool:
    """Whether every one of several ranks ends up with a prompt's whole KV."""
    return insides.options_of(server_args).sp_size > 1 and not _ships_own_pages(server_args)


def _ships_own_pages(server_args: Any) -> bool:
    options = insides.resolved(server_args)
    return bool(options.disaggregation_mode == "prefill" and options.disaggregation_transfer_backend == BACKEND)


def _keep_to_itself(layer_id: int) -> None:
    """What is done with a layer's KV that is not shipped, or not yet."""


def _plan_batch(result: Any, cls: type, batch: Any, model_runner: Any, **_: Any) -> None:
    """Attaches the split of a sparse prompt to its batch, where the requests are still at hand."""
    result.sparse_plan = None
    if not insides.is_prefill(batch, model_runner):
        return
    result.sparse_plan = _plan(batch, model_runner)
    result.prefill_report = (
        {"method": "exact"} if result.sparse_plan is None else backend_of(model_runner).report(result.sparse_plan)
    )
    result.num_prefills_ended = insides.num_prefills_ended(batch)
    for req in batch.reqs:
        insides.notes_of(req).report = result.prefill_report
    result.on_layer = _keep_to_itself
    if result.sparse_plan is not None and _ships_own_pages(model_runner.server_args):
        result.on_layer = pd_prefill.layer_stream(batch) or _keep_to_itself


def _plan(batch: Any, model_runner: Any) -> Any:
    """The split, or None when the batch runs exact."""
    req = batch.reqs[0] if batch.reqs else None
    wish = None if req is None else insides.notes_of(req).wish
    if wish is None:
        return None
    prompt = insides.prompt_of(req)
    num_tokens = prompt.num_tokens + prompt.num_output_tokens
    if not insides.is_whole(batch, num_tokens):
        logger.error("request %s should run sparse but was batched or cut by SGLang: it runs exact", req.rid)
        return None
    settings = config.parse(insides.options_of(model_runner.server_args).config_text)
    wish = requests.Wish(requests.question_tokens(prompt, wish, settings))
    return backend_of(model_runner).plan(num_tokens, wish)


def _forward(
    original: Any,
    self: Any,
    forward_batch: Any,
    pp_proxy_tensors: Any,
    reinit_attn_backend: bool = False,
    split_forward_count: int = 1,
) -> Any:
    plan = getattr(forward_batch, "sparse_plan", None)
    if plan is not None:
        output = _forward_sparse(self, forward_batch, plan)
    else:
        output = original(self, forward_batch, pp_proxy_tensors, reinit_attn_backend, split_forward_count)
    report = getattr(forward_batch, "prefill_report", None)
    if report is not None:
        output.logits_output.customized_info = {requests.PARAMETER: [report] * forward_batch.batch_size}
        if insides.resolved(self.server_args).enable_metrics and insides.is_first_rank():
            metrics.count_prefills(report["method"], forward_batch.num_prefills_ended)
    return output


def _forward_sparse(model_runner: Any, forward_batch: Any, plan: Any) -> Any:
    from sglang.srt.model_executor.model_runner import ModelRunnerOutput

    backend = backend_of(model_runner)
    num_ranks = insides.options_of(model_runner.server_args).sp_size
    with insides.as_one_rank() if num_ranks > 1 else nullcontext():
        logits = backend.prefill(forward_batch, plan, forward_batch.on_layer)
    return ModelRunnerOutput(logits_output=logits, can_run_graph=False)


PATCHES = (
    Patch(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        (
            "cls",
            "batch",
            "model_runner",
            "capture_hidden_mode",
            "return_hidden_states_before_norm",
            "extend_position_info",
            "spec_mrope_positions",
            "kv_loc_plan",
            "write_cols",
        ),
        _plan_batch,
    ),
    Patch(
        "sglang.srt.model_executor.model_runner.ModelRunner._forward_raw",
        "around",
        ("self", "forward_batch", "pp_proxy_tensors", "reinit_attn_backend", "split_forward_count"),
        _forward,
    ),
)
