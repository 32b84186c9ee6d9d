"""What the door (`request_checks.py`) reads and writes of a request as its client sent it: `n`, rooms, types."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

_PROMPTS = ("text", "input_ids", "input_embeds", "image_data", "video_data", "audio_data")


def is_generation(record: Any) -> bool:
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput

    return isinstance(record, TokenizedGenerateReqInput)


def num_choices(request: Any) -> Any:
    """`n` as the client gave it, of any type; of several prompts that of the first, with which SGLang compares."""
    sampling = request.sampling_params
    first = sampling[0] if isinstance(sampling, list) and sampling else sampling
    return first.get("n") if isinstance(first, dict) else None


def spread_choices(request: Any) -> None:
    """Makes prompts of one choice each of a request for `n`, with bootstrap rooms of their own, the same on both
    servers. SGLang sends all choices of a prompt, and one more request that fills its cache, with the prompt's room.
    """
    n = num_choices(request) or 1
    sampling = request.sampling_params
    all_sampling = sampling if isinstance(sampling, list) else [sampling]
    if n == 1 or any(one.get("n") != n for one in all_sampling):
        return  # SGLang refuses the latter
    for one in all_sampling:
        one["n"] = 1
    prompts = next(given for given in (request.text, request.input_ids, request.input_embeds) if given is not None)
    is_single = isinstance(prompts, str) or isinstance(prompts[0], int) or _is_numbers(prompts[0])
    for name in _PROMPTS if is_single else vars(request):
        value = getattr(request, name)
        if is_single and value is not None:
            setattr(request, name, [value] * n)
        elif isinstance(value, list) and len(value) == len(prompts):
            setattr(request, name, [one for one in value for _ in range(n)])
    if isinstance(request.rid, list):
        request.rid = [f"{rid}_{i}" for i, rid in enumerate(request.rid)]
    if isinstance(request.bootstrap_room, list):
        request.bootstrap_room = [room + i % n for i, room in enumerate(request.bootstrap_room)]


def _is_numbers(row: Any) -> bool:
    return isinstance(row, list) and bool(row) and isinstance(row[0], float)


def check_prompts(request: Any) -> None:
    """Raises ValueError, IndexError or TypeError for what SGLang would run into when it takes a batch apart."""
    for one in [request] if request.is_single else [request[number] for number in range(request.batch_size)]:
        if not isinstance(one.rid, str):
            raise ValueError(f"rid={one.rid!r:.80} must be a text, or for several prompts a list of texts")
        if not isinstance(one.input_ids, list | None):
            raise ValueError(f"input_ids has {one.input_ids!r:.80} where a prompt's list of token ids should be")


def check_types(record: Any) -> None:
    """Raises ValueError or OverflowError where the scheduler could not read `record`.

    Left out is what SGLang's own processors put there: it may be large.
    """
    from sglang.srt.managers.embed_types import PositionalEmbeds
    from sglang.srt.managers.io_struct import msgpack_decode, msgpack_encode

    if not isinstance(record.positional_embed_overrides, PositionalEmbeds | None):
        raise ValueError("positional_embed_overrides is not for clients: leave it out")
    alone = msgspec.structs.replace(record, mm_inputs=None, positional_embed_overrides=None, time_stats=None)
    try:
        msgpack_decode(msgpack_encode(alone))
    except msgspec.ValidationError as error:
        what, _, path = str(error).partition(" - at ")
        raise ValueError(f"{_field_at(record, path)}: {what[0].lower()}{what[1:]}") from None


def _field_at(record: Any, path: str) -> str:
    """The name of what is at msgspec's `path`, such as `$[8][25]`: structs travel as arrays, this one behind a tag."""
    names, inner = [], record
    for place in map(int, re.findall(r"\[(\d+)\]", path)):
        fields = getattr(inner, "__struct_fields__", ())
        index = place - 1 if inner is record else place
        if not 0 <= index < len(fields):
            break
        names.append(fields[index])
        inner = getattr(inner, names[-1])
    return ".".join(names)


_REFUSED = "\0refused room "


@dataclass(frozen=True)
class RefusedRoom:
    """Of a request that the door has refused; `host` and `port` are prefill's, as its client or router gave them."""

    number: int
    host: str
    port: int | None
    reason: str


def refuse_rooms(tokenizer_manager: Any, request: Any, reason: str) -> None:
    """Tells this server's schedulers that requests with the rooms of `request` will not come, if none has."""
    from sglang.srt.managers.io_struct import AbortReq

    # A request for embeddings has none.
    given = [getattr(request, f"bootstrap_{name}", None) for name in ("room", "host", "port")]
    count = max(len(value) if isinstance(value, list) else 1 for value in given)
    columns = [value if isinstance(value, list) else [value] * count for value in given]
    for room, host, port in zip(*columns, strict=False):
        if isinstance(room, int):
            place = msgspec.json.encode([room, str(host or ""), port if isinstance(port, int) else None]).decode()
            tokenizer_manager._dispatch_to_scheduler(AbortReq(rid=f"{_REFUSED}{place}", abort_message=reason))


def refused_room(abort: Any) -> RefusedRoom | None:
    """What such a message is about; None for another one."""
    if not abort.rid.startswith(_REFUSED):
        return None
    room, host, port = msgspec.json.decode(abort.rid.removeprefix(_REFUSED))
    return RefusedRoom(room, host, port, abort.abort_message or "")
