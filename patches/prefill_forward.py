"""Targets: `ForwardBatch.init_new`, `ModelRunner._forward_raw`. Reason: the batch's one long prompt goes to the
prefill backend instead of SGLang's eager runner or CUDA graphs. Official point tried: an attention backend of one's own
sees a layer's rows after SGLang has chosen which rows a rank computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from sglang_apb.patches import batches, insides, last_layer, pd_prefill
from sglang_apb.patches._patch import Patch

from sglang_apb import config, metrics, requests

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

    _check_kv_dtype(model_runner.kv_cache_dtype, model_runner.dtype)
    server_args = model_runner.server_args
    options = insides.options_of(server_args)
    group = insides.sequence_parallel_group() if options.sp_size > 1 else None
    settings, replicate_kv = config.parse(options.config_text), replicates_kv(server_args)
    last_layer.drop_rows(model_runner.model)
    return backends.load(options.backend)(model_runner, settings, RankGroup(group), replicate_kv=replicate_kv)


def _check_kv_dtype(kv: torch.dtype, model: torch.dtype) -> None:
    """A checkpoint may ask for quantised KV, which no option shows before it is loaded. Raises RuntimeError."""
    if kv != model:
        remedy = "--kv-cache-dtype bfloat16"
        raise RuntimeError(
            f"--prefill-backend keeps KV in the model's {model}, and this server's is {kv}: give "
            + (remedy if model == torch.bfloat16 else f"--dtype bfloat16 {remedy}")
        )


def replicates_kv(server_args: Any) -> bool:
    """Whether every one of several ranks ends up with a prompt's whole KV."""
    return insides.options_of(server_args).sp_size > 1 and not insides.ships_own_pages(server_args)


def _keep_to_itself(layer_id: int) -> None:
    """What is done with a layer's KV that is not shipped, or not yet."""


def _plan_batch(result: Any, cls: type, batch: Any, model_runner: Any, **_: Any) -> None:
    """Attaches a sparse prompt's prefill to its batch, where the request is still at hand."""
    result.sparse = None
    if batches.is_prefill(batch, model_runner):
        try:
            _attach(result, batch, model_runner)
        except Exception as error:
            result.sparse = NoPrefill(model_runner, len(batch.reqs))
            for req in batch.reqs:
                _discard(req, error)


def _attach(result: Any, batch: Any, model_runner: Any) -> None:
    plan = _plan(batch, model_runner)
    if plan is None:
        report = {"method": "exact"}
    else:
        notes = insides.notes_of(batch.reqs[0])
        is_later = notes.handed_on.ends_at(plan.num_cached)
        report = notes.report if is_later else backend_of(model_runner).report(plan)
        result.sparse = SparsePrefill(model_runner, batch.reqs[0], plan, _stream_of(batch, model_runner))
    result.prefill_report, result.num_prefills_ended = report, batches.num_prefills_ended(batch)
    for req in batch.reqs:
        insides.notes_of(req).report = report


def _stream_of(batch: Any, model_runner: Any) -> Callable[[int], None]:
    stream = pd_prefill.layer_stream(batch) if insides.ships_own_pages(model_runner.server_args) else None
    return stream or _keep_to_itself


def _plan(batch: Any, model_runner: Any) -> Any:
    """The split, or None when the batch runs exact."""
    wished = ((req, insides.notes_of(req).wish) for req in batch.reqs)
    req, wish = next((pair for pair in wished if pair[1] is not None), (None, None))
    if wish is None:
        return None
    prompt = insides.prompt_of(req)
    num_tokens = prompt.num_tokens + prompt.num_output_tokens
    computed = batches.computed_tokens(batch)
    round_end = None if computed is None else insides.notes_of(req).round_end(computed.start)
    if computed is None or computed.end != (round_end or num_tokens):
        # Its KV would be exact attention's under the name of a sparse context.
        raise RuntimeError("a sparse prompt was batched or cut by SGLang: this is a bug of sglang-apb")
    settings = config.parse(insides.options_of(model_runner.server_args).config_text)
    wish = requests.Wish(requests.question_tokens(prompt, wish, settings))
    return backend_of(model_runner).plan(num_tokens, wish, computed.start, round_end)


def _forward(
    original: Any,
    self: Any,
    forward_batch: Any,
    pp_proxy_tensors: Any,
    reinit_attn_backend: bool = False,
    split_forward_count: int = 1,
) -> Any:
    sparse = getattr(forward_batch, "sparse", None)
    if sparse is not None:
        output = _output(sparse.run(forward_batch))
    else:
        output = original(self, forward_batch, pp_proxy_tensors, reinit_attn_backend, split_forward_count)
    report = getattr(forward_batch, "prefill_report", None)
    if report is not None:
        output.logits_output.customized_info = {requests.PARAMETER: [report] * forward_batch.batch_size}
        if insides.resolved(self.server_args).enable_metrics and insides.is_first_rank():
            metrics.count_prefills(report["method"], forward_batch.num_prefills_ended)
    return output


def _output(logits: Any) -> Any:
    from sglang.srt.model_executor.model_runner import ModelRunnerOutput

    return ModelRunnerOutput(logits_output=logits, can_run_graph=False)


@dataclass(frozen=True)
class SparsePrefill:
    """Of the one request of a batch. What fails in it ends the request, on all ranks, and not the scheduler.

    Ranks agree before they wait for each other in the layers. There, what one rank alone runs into (its GPU's memory,
    say) leaves the others waiting, and SGLang's watchdog ends the server; what is the same on all ends the request.
    """

    model_runner: Any
    req: Any
    plan: Any
    on_layer: Callable[[int], None]

    def run(self, forward_batch: Any) -> Any:
        """SGLang's LogitsProcessorOutput of the prompt's last token; of no meaning when it failed or goes on."""
        backend, num_ranks = backend_of(self.model_runner), insides.options_of(self.model_runner.server_args).sp_size
        as_one_rank = insides.as_one_rank if num_ranks > 1 else nullcontext
        with as_one_rank():
            handed_on = insides.notes_of(self.req).handed_on
            run = self._try(lambda: backend.prepare(forward_batch, self.plan, self.on_layer, handed_on))
        if num_ranks > 1 and not _all_have(run) and run is not None:
            insides.discard(self.req, "Another prefill rank could not prepare the prompt; its log says why.")
            run = None
        insides.publish_reads_done(self.model_runner)
        with as_one_rank():
            logits = None if run is None else self._try(run)
        return insides.no_logits(self.model_runner, num_requests=1) if logits is None else logits

    def _try(self, action: Callable[[], Any]) -> Any:
        """None when it fails."""
        try:
            return action()
        except Exception as error:
            _discard(self.req, error)
            return None


@dataclass(frozen=True)
class NoPrefill:
    """Of a batch whose requests are discarded."""

    model_runner: Any
    num_requests: int

    def run(self, forward_batch: Any) -> Any:
        return insides.no_logits(self.model_runner, self.num_requests)


def _discard(req: Any, error: Exception) -> None:
    logger.error("The prefill of request %s failed.", req.rid, exc_info=error)
    insides.discard(req, f"The prefill failed ({type(error).__name__}: {error}).")


def _all_have(prepared: Any) -> bool:
    """Whether all ranks are prepared. On the host: the GPU's ranks must not wait for each other yet."""
    least = torch.tensor(int(prepared is not None))
    dist.all_reduce(least, dist.ReduceOp.MIN, group=insides.sequence_parallel_cpu_group())
    return bool(least)


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
