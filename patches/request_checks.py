"""Targets: `GenerateReqInput.normalize_batch_and_arguments`, `TokenizerManager._create_tokenized_object`,
`OpenAIServingCompletion._validate_request`. Reason: the door. What one request could end a scheduler by, keep waiting
in it, or be laid out by wrongly is answered with HTTP 400 before any rank hears of it, and so is what makes SGLang's
own reading of a request fail. Official point tried: SGLang has none for checks of one's own.

    text, ids      normalize_batch_and_arguments    `n`; between prefill and decode each choice is a request
    record         _create_tokenized_object         each field's type, as the scheduler will decode it, and its range
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from sglang_apb.patches import door, insides
from sglang_apb.patches._patch import Patch

from sglang_apb import admission, requests
from sglang_apb.admission import AdmissionError, Limits


def _normalize(original: Callable[[Any], None], self: Any) -> None:
    with _misfits_as_sentences():
        admission.check_num_choices(door.num_choices(self))
        if insides.pair_half():
            door.spread_choices(self)
        original(self)
        door.check_prompts(self)


def _check_record(original: Callable[..., Any], self: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
    with _misfits_as_sentences():
        record = original(self, obj, *args, **kwargs)
        if door.is_generation(record):
            door.check_types(record)
            model = self.model_config
            admission.check(record, Limits(model.vocab_size, model.hidden_size, insides.pair_half()))
            page_size = insides.resolved(self.server_args).page_size
            requests.check(len(record.input_ids or ()), record.sampling_params.custom_params, page_size)
        return record


def _check_completion(result: str | None, self: Any, request: Any) -> str | None:
    if result is None and insides.pair_half() and request.echo and request.logprobs:
        return "echo with logprobs is not available when prefill and decode are two servers: leave one of them out"
    return result


@contextmanager
def _misfits_as_sentences() -> Iterator[None]:
    """SGLang answers a ValueError with HTTP 400, and everything else with 500."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        raise AdmissionError(f"the request does not have the form that it should: {error}") from error


PATCHES = (
    Patch(
        "sglang.srt.managers.io_struct.GenerateReqInput.normalize_batch_and_arguments", "around", ("self",), _normalize
    ),
    Patch(
        "sglang.srt.managers.tokenizer_manager.TokenizerManager._create_tokenized_object",
        "around",
        ("self", "obj", "input_text", "input_ids", "input_embeds", "mm_inputs", "token_type_ids"),
        _check_record,
    ),
    Patch(
        "sglang.srt.entrypoints.openai.serving_completions.OpenAIServingCompletion._validate_request",
        "after",
        ("self", "request"),
        _check_completion,
    ),
)
