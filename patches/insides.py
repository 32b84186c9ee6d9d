"""What hooks read and write of SGLang's insides: resolved options, ranks, requests, the KV transfer.

Each is named here and nowhere else in the hooks, but batches and slots (`batches.py`), and what the door reads of a
request as its client sent it (`door.py`). When SGLang moves one of them, these files follow, and the hooks stay
(`sglang-apb doctor --compare` lists the targets that changed).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from http import HTTPStatus
from typing import Any

import torch

from sglang_apb import options
from sglang_apb.options import PluginOptions
from sglang_apb.requests import MARK, PARAMETER, Notes, Prompt

# ---- options -------------------------------------------------------------------------------------


def resolved(server_args: Any) -> Any:
    """What SGLang made of its options: the record itself keeps what was typed."""
    from sglang.srt.arg_groups.overrides import resolved_view

    return resolved_view(server_args)


def options_of(server_args: Any) -> PluginOptions:
    """Ours, which `patches/server_args.py` sets beside the record's fields; they travel in its pickle."""
    return getattr(server_args, "plugin_options", None) or PluginOptions()


def model_config_of(server_args: Any) -> Any:
    from sglang.srt.arg_groups.model_override_base import model_config_of as find

    return find(server_args)


def is_pool_size_given(server_args: Any) -> bool:
    """Whether `--mem-fraction-static` was typed; the resolved options have SGLang's default."""
    return server_args.mem_fraction_static is not None


def may_have_our_cache(server_args: Any) -> bool:
    """Whether prompts would be prefilled over SGLang's own radix cache."""
    return bool(
        server_args.disaggregation_mode != "decode"
        and server_args.radix_cache_backend is None
        and not server_args.enable_unified_cache_external_linker
    )


def ships_own_pages(server_args: Any) -> bool:
    """Whether this is a prefill server over our transfer, each rank of which sends pages of its own."""
    return options.ships_own_pages(resolved(server_args))


def keeps_parts(server_args: Any) -> bool:
    """Whether each of several ranks keeps its own blocks of a prompt only."""
    return options_of(server_args).sp_size > 1 and ships_own_pages(server_args)


def pair_half() -> str | None:
    """Which half of a pair this server is, "prefill" or "decode"; None where it is none."""
    from sglang.srt.runtime_context import get_disagg

    mode = str(get_disagg().disaggregation_mode)
    return None if mode == "null" else mode


# ---- ranks ---------------------------------------------------------------------------------------


def is_first_rank() -> bool:
    from sglang.srt.runtime_context import get_parallel

    return bool(get_parallel().tp_rank == 0)


def rank_on_host() -> int:
    """This rank's number among those of its server on this host."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return int(parallel.tp_rank % max(parallel.tp_size // parallel.nnodes, 1))


def sequence_parallel_group() -> Any:
    """The ranks that share a prompt, as a torch.distributed group of the device's backend."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().attn_cp_group.device_group


def sequence_parallel_cpu_group() -> Any:
    """The same, over gloo."""
    from sglang.srt.runtime_context import get_parallel

    return get_parallel().attn_cp_group.cpu_group


def world() -> Any:
    """All ranks of the server, SGLang's GroupCoordinator: `world_size` and `cpu_group`."""
    from sglang.srt.distributed.parallel_state import get_world_group

    return get_world_group()


def as_one_rank() -> AbstractContextManager[Any]:
    """Within it SGLang's layers find themselves alone, with all heads."""
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    return parallel.override(  # type: ignore[no-any-return]
        tp_size=parallel.attn_tp_size,
        tp_rank=parallel.attn_tp_rank,
        tp_group=parallel.attn_tp_group,
        attn_cp_size=1,
        attn_cp_rank=0,
        attn_cp_group=parallel.attn_tp_group,
        moe_tp_size=parallel.attn_tp_size,
    )


# ---- requests ------------------------------------------------------------------------------------


def notes_of(req: Any) -> Notes:
    """What we keep of a request while it is here, made at the first call."""
    notes = getattr(req, "prefill_notes", None)
    if notes is None:
        notes = req.prefill_notes = Notes()
    return notes


def prompt_of(req: Any) -> Prompt:
    num_tokens, first_logprob = len(req.origin_input_ids), None
    if req.return_logprob and 0 <= req.logprob_start_len < num_tokens:
        first_logprob = req.logprob_start_len
    needs_every_row = bool(
        req.return_hidden_states
        or req.input_embeds is not None
        or req.positional_embed_overrides is not None
        or req.multi_item_delimiter_indices is not None
        or req.session is not None
    )
    custom_params = req.sampling_params.custom_params
    return Prompt(num_tokens, len(req.output_ids), custom_params, needs_every_row, first_logprob)


def is_ended(req: Any) -> bool:
    return bool(req.finished() or req.to_finish)


def why_aborted(req: Any) -> str | None:
    """Why the request was refused or given up; None when it was not."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    ended = req.finished_reason or req.to_finish
    return ended.message if isinstance(ended, FINISH_ABORT) else None


def refuse(req: Any, sentence: str) -> None:
    """SGLang runs one token in the prompt's place, and answers with HTTP 400."""
    req.set_finish_with_abort(sentence)


def discard(req: Any, sentence: str) -> None:
    """The request ends with HTTP 500 when its batch has run, whatever that gave; nothing of it is found again."""
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    leave_nothing_cached(req)
    req.discard_output_reason = FINISH_ABORT(sentence, HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError")


def no_logits(model_runner: Any, num_requests: int) -> Any:
    """What SGLang samples tokens from, for prompts whose output is discarded."""
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    shape = (num_requests, model_runner.model_config.vocab_size)
    return LogitsProcessorOutput(torch.zeros(shape, device=model_runner.device))


def publish_reads_done(model_runner: Any) -> None:
    """The layers to come read nothing that SGLang writes for the next batch: it may prepare that one meanwhile."""
    from sglang.srt.layers.attention.base_attn_backend import SharedReadEnds
    from sglang.srt.model_executor.runner_utils.shared_read_event import maybe_publish_prefill_shared_read_done

    device = torch.device(model_runner.device)
    if device.type == "cuda":
        maybe_publish_prefill_shared_read_done(model_runner, SharedReadEnds.PRE_REPLAY, torch.get_device_module(device))


def take_namespace(req: Any, name: str) -> None:
    """SGLang's prefix cache keeps apart what has another `extra_key`: of requests whose clients gave the same one, the
    request finds those that took the same `name`.
    """
    req.extra_key = f"{req.extra_key or ''}{MARK}{name}"


def leave_nothing_cached(req: Any) -> None:
    req.skip_radix_cache_insert = True


def tell_client(req: Any, report: dict[str, Any]) -> None:
    """`report` comes to `meta_info` with the request's next token."""
    req.customized_info = {PARAMETER: [report]}


# ---- the KV transfer -----------------------------------------------------------------------------


def sender_of(req: Any) -> Any:
    """Our KV sender of the request; None with another transfer, or without one."""
    sender = getattr(req, "disagg_kv_sender", None)
    return sender if hasattr(sender, "set_owned_pages") else None


def bootstrap_queue_of(scheduler: Any) -> Any:
    return scheduler.disagg_prefill_bootstrap_queue


def sending_of(bootstrap_queue: Any) -> Any:
    """Our transfer's endpoint on this prefill rank."""
    return bootstrap_queue.kv_manager.prefill_endpoint


def decode_transfer_of(scheduler: Any) -> Any:
    """Our KV manager on this decode rank."""
    return scheduler.disagg_decode_prealloc_queue.kv_manager


def bootstrap_address(host: str, port: int | None) -> str:
    """As a decode rank's scheduler calls the prefill server that a request names."""
    from sglang.srt.runtime_context import get_disagg
    from sglang.srt.utils.network import NetworkAddress

    given = get_disagg().disaggregation_bootstrap_port if port is None else port
    return str(NetworkAddress(host, given).to_host_port_str())


def receiver_of(decode_req: Any) -> Any:
    """Our KV receiver of the request; None with SGLang's fake one, which its health checks have."""
    receiver = decode_req.kv_receiver
    return receiver if hasattr(receiver, "set_prompt") else None


def prompt_ids(req: Any) -> Any:
    """The prompt's token ids, an array."""
    return req.origin_input_ids


def has_decode_server(req: Any) -> bool:
    """Whether a decode server waits for the request, on a prefill server."""
    return req.bootstrap_room is not None


def waits_for_decode(req: Any) -> bool:
    """Whether decode has not said yet where the request's KV goes."""
    return bool(req.pending_bootstrap)
