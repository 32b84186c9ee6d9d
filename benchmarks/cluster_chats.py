"""A prefill/decode cluster under many chats at once: is every answer the one that a plain SGLang server gives?

    python benchmarks/cluster_chats.py --model DIR --sp-size 2
    python benchmarks/cluster_chats.py --model DIR --chats 20 --lengths 300,900,1400 -- --dtype float32   # on a CPU

All servers have SGLang's defaults (prefix cache, overlap, CUDA graphs). Half of the chats are about documents that
others ask about, too, so that their beginnings are found in the prefix cache; some stream, and some clients leave,
before their answer or after its first token. Unless --config says otherwise, everything is passed on, which is exact
attention: an answer may then part from plain SGLang's only where two tokens are about as likely, and rounding decides.
What follows -- goes to all servers.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import requests
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from asking import ALL_PASSED, prompts

from sglang_apb.commands.bench.arguments import count, counts
from sglang_apb.commands.bench.table import markdown
from sglang_apb.commands.report import prefill_report
from sglang_apb.commands.servers import LocalCluster, LocalServer, LocalService, ServiceError, default_sp_size, num_gpus

ARGUMENTS = ("--cuda-graph-max-bs-decode", "16", "--enable-cache-report")
QUESTIONS_PER_DOCUMENT = 5
ANSWER_TOKENS = 24
TOP_TOKENS = 5  # as many as OpenAI's API gives of each place
LEAVES_AFTER_S = 0.3
TIMEOUT_S = 300.0
RIGHT, NEAR_TIE, WRONG, LEFT = "right", "near-ties", "wrong", "clients that left"


@dataclass(frozen=True)
class Chat:
    """`leaves`: the client goes after the answer's first token if it streams, or else before there is one."""

    content: str
    stream: bool
    leaves: bool


@dataclass(frozen=True)
class Reply:
    """`tokens` as OpenAI's API describes them: token, logprob, top_logprobs."""

    text: str
    tokens: list[dict[str, Any]]
    cached_tokens: int
    prefill: dict[str, Any]


def make_chats(model: Path, num_chats: int, lengths: list[int]) -> list[Chat]:
    """Of about these numbers of tokens, in an order that is the same at every call."""
    num_shared = num_chats // 2
    documents = [number // QUESTIONS_PER_DOCUMENT for number in range(num_shared)]
    documents += range(len(set(documents)), len(set(documents)) + num_chats - num_shared)
    texts = make_documents(model, documents[-1] + 1, lengths)
    contents = [
        f"{texts[document]}\n\nQuestion {number}: what is it about?" for number, document in enumerate(documents)
    ]
    random.Random(0).shuffle(contents)
    return [Chat(content, number % 3 == 0, number % 10 == 9) for number, content in enumerate(contents)]


def make_documents(model: Path, num_documents: int, lengths: list[int]) -> list[str]:
    from transformers import AutoTokenizer

    # Each has a length, and with it a text, of its own.
    all_ids = prompts(model, tuple(lengths[number % len(lengths)] + number for number in range(num_documents)))
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids in all_ids]


def ask_all(service: LocalService, chats: list[Chat], at_once: int) -> list[Reply | Exception | None]:
    with ThreadPoolExecutor(at_once) as pool:
        return list(tqdm(pool.map(partial(ask, service), chats), total=len(chats), unit="chat"))


def ask(service: LocalService, chat: Chat) -> Reply | Exception | None:
    """The answer, why there is none, or None when the client left before the answer's end."""
    try:
        service.check()
        return _post(service.url, chat)
    except requests.Timeout as error:
        return None if chat.leaves else error
    except (requests.RequestException, ServiceError, ValueError) as error:
        return error


def _post(url: str, chat: Chat) -> Reply | None:
    body: dict[str, Any] = {
        "model": "default",
        "messages": [{"role": "user", "content": chat.content}],
        "max_tokens": ANSWER_TOKENS,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": TOP_TOKENS,
    }
    if chat.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    timeout = LEAVES_AFTER_S if chat.leaves and not chat.stream else TIMEOUT_S
    with requests.post(f"{url}/v1/chat/completions", json=body, stream=chat.stream, timeout=timeout) as response:
        if not response.ok:
            raise requests.HTTPError(f"HTTP {response.status_code}: {response.text[:300]}")
        if not chat.stream:
            return _reply([response.json()])
        chunks = []
        for chunk in _chunks(response):
            chunks.append(chunk)
            if chat.leaves and _tokens(chunk):
                return None
    return _reply(chunks)


def _chunks(response: requests.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        data = line.removeprefix(b"data: ")
        if data and data != b"[DONE]":
            yield json.loads(data)


def _reply(parts: list[dict[str, Any]]) -> Reply:
    """Of a whole answer, or of a stream's chunks. Raises ValueError when it is not complete."""
    usage = parts[-1].get("usage") if parts else None
    if not usage:
        raise ValueError(f"the answer has no end: {json.dumps(parts[-1:])[:300]}")
    choices = [choice for part in parts for choice in part.get("choices") or []]
    return Reply(
        text="".join((choice.get("message") or choice["delta"]).get("content") or "" for choice in choices),
        tokens=[token for part in parts for token in _tokens(part)],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        prefill=next(filter(None, map(prefill_report, reversed(parts))), {}),
    )


def _tokens(part: dict[str, Any]) -> list[dict[str, Any]]:
    choices = part.get("choices") or []
    return [token for choice in choices for token in (choice.get("logprobs") or {}).get("content") or []]


def judge(found: Reply | Exception | None, wanted: Reply, near_tie: float) -> tuple[str, str]:
    """What became of a chat, and what is to be said of it."""
    if found is None:
        return LEFT, ""
    if isinstance(found, Exception):
        return WRONG, f"{type(found).__name__}: {found}".partition("\n")[0]  # without the log's last lines
    if found.text == wanted.text:
        return RIGHT, ""
    return _parted(found, wanted, near_tie)


def _parted(found: Reply, wanted: Reply, near_tie: float) -> tuple[str, str]:
    pairs = zip(found.tokens, wanted.tokens, strict=False)
    place, ours, theirs = next(
        ((place, a, b) for place, (a, b) in enumerate(pairs) if a["token"] != b["token"]), (None, None, None)
    )
    if place is None:
        return WRONG, f"{found.text!r} instead of {wanted.text!r}"
    likely = {top["token"]: top["logprob"] for top in theirs["top_logprobs"]}
    other = likely.get(ours["token"])
    said = f"token {place} is {ours['token']!r} ({other}) instead of {theirs['token']!r} ({theirs['logprob']})"
    return NEAR_TIE if other is not None and theirs["logprob"] - other < near_tie else WRONG, said


def report(found: list[Reply | Exception | None], wanted: list[Reply], near_tie: float, is_alive: bool) -> int:
    """Prints what parted, and a table. Returns the exit status."""
    outcomes: Counter[str] = Counter()
    for number, (ours, theirs) in enumerate(zip(found, wanted, strict=True)):
        outcome, said = judge(ours, theirs, near_tie)
        outcomes[outcome] += 1
        if said:
            print(f"chat {number}, {outcome}: {said}")
    replies = [reply for reply in found if isinstance(reply, Reply)]
    columns = {
        "chats": str(len(found)),
        **{outcome: str(outcomes[outcome]) for outcome in (RIGHT, NEAR_TIE, WRONG, LEFT)},
        "sparse": str(sum(reply.prefill.get("method") == "apb" for reply in replies)),
        "cached tokens": f"{sum(reply.cached_tokens for reply in replies):,}",
        "all alive": "yes" if is_alive else "no",
    }
    print(markdown(list(columns), [list(columns.values())]))
    return 0 if is_alive and not outcomes[WRONG] else 1


def expected(args: argparse.Namespace, chats: list[Chat]) -> list[Reply]:
    """Plain SGLang's answers. Raises ServiceError when there is one missing."""
    patient = [Chat(chat.content, stream=False, leaves=False) for chat in chats]
    with LocalServer(
        args.model, port=args.port, log_dir=args.log_dir / "plain", arguments=[*ARGUMENTS, *args.server_args]
    ) as plain:
        plain.wait_ready()
        replies = ask_all(plain, patient, args.at_once)
    answers = [reply for reply in replies if isinstance(reply, Reply)]
    if len(answers) < len(replies):
        raise ServiceError(f"the plain server: {next(reply for reply in replies if not isinstance(reply, Reply))}")
    return answers


def main() -> int:
    args = _arguments()
    chats = make_chats(Path(args.model), args.chats, args.lengths)
    wanted = expected(args, chats)
    started = time.monotonic()
    with LocalCluster(
        args.model,
        port=args.port + 10,
        log_dir=args.log_dir / "cluster",
        sp_size=args.sp_size,
        arguments=[*ARGUMENTS, *args.server_args],
        prefill_arguments=["--prefill-backend-config", args.config],
    ) as cluster:
        cluster.wait_ready()
        found = ask_all(cluster, chats, args.at_once)
        # Once more, and alone: all servers are there, and right.
        last = ask(cluster, Chat(chats[0].content, stream=False, leaves=False))
    print(f"{args.chats} chats, {args.at_once} at once, on {args.sp_size} ranks: {time.monotonic() - started:.0f} s")
    is_alive = judge(last, wanted[0], args.near_tie)[0] in (RIGHT, NEAR_TIE)
    return report(found, wanted, args.near_tie, is_alive)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="its folder")
    parser.add_argument("--log-dir", type=Path, default=Path("logs") / time.strftime("chats-%Y%m%d-%H%M%S"))
    parser.add_argument("--chats", type=count, default=200)
    parser.add_argument("--at-once", type=count, default=8)
    parser.add_argument("--lengths", type=counts, default=[400, 1500, 3000, 6000], help="of documents, in tokens")
    parser.add_argument("--sp-size", type=count, default=default_sp_size(), help="ranks of the prefill server")
    parser.add_argument("--config", default=ALL_PASSED, help="the prefill server's --prefill-backend-config")
    parser.add_argument(
        "--near-tie",
        type=float,
        default=0.1 if num_gpus() else 0.001,
        help="log-probabilities of two tokens that change places may be so far apart; 0.1, or 0.001 on a CPU",
    )
    parser.add_argument("--port", type=count, default=33100, help="the plain server's; the cluster's are 10 further")
    parser.add_argument("server_args", nargs="*", metavar="-- ARGS", help="for all servers")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ServiceError as error:
        sys.exit(str(error))
