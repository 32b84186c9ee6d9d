"""`sglang-apb eval prompts FILE`: your own prompts, a JSON object a line with `messages` or `prompt`, perhaps `answer`.

For each, exact attention's greedy answer, the one after a sparse prefill, where they part, and how likely exact
attention's answer is after a sparse prefill: the mean log-probability of its tokens, beside exact attention's own. That
can be told where the context's KV does not depend on what follows: with block, anchor and passing given, and key_diff.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from tqdm import tqdm

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench.arguments import count
from sglang_apb.commands.bench.table import NO_FIGURE, markdown
from sglang_apb.commands.eval.asking import request
from sglang_apb.commands.eval.contestants import (
    EXACT,
    add_server_arguments,
    check_config_length,
    check_length,
    contestants_of,
    model_of,
    running,
)
from sglang_apb.commands.eval.questions import Answer, AnswerFile, Question, open_answers
from sglang_apb.commands.eval.scores import Score, difference
from sglang_apb.commands.eval.templates import chat_ids, tokenizer_of
from sglang_apb.commands.report import prefill_report, write_result

HELP = "your own prompts: is a sparse prefill good enough for them?"
NAME = "prompts"
# Nats a token by which exact attention's answer may become less likely: a twentieth.
_TOLERATED = 0.05
_SHOWN_WIDTH = 40
_KEYS = ("role", "content")
# Of a report; what else is in it (the question, the transfer's bytes) differs between two prompts.
_WHAT_BLOCKS_SEE = ("method", "num_blocks", "anchor", "passing", "selector")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON lines: messages or prompt, perhaps answer")
    add_server_arguments(parser, NAME)
    parser.add_argument("--max-tokens", type=count, default=64, help="of each answer")


def run(args: argparse.Namespace) -> int:
    contestants = contestants_of(args)
    if EXACT not in [each.name for each in contestants]:
        raise CommandError(f"exact attention's server is missing: give --url {EXACT}=URL")
    contestants.sort(key=lambda each: each.name != EXACT)  # whose answers the others are asked for
    asked = read(args.file, args.max_tokens)
    tokenizer = tokenizer_of(model_of(args, contestants))
    token_ids = {question.key: _token_ids(tokenizer, question) for question in asked}
    longest = max(map(len, token_ids.values())) + args.max_tokens + 1
    check_config_length(args, longest)
    files = open_answers(args.output, {each.name: each.made_with(args) for each in contestants})
    try:
        waiting = [each for each in contestants if _missing(asked, files[each.name], files[EXACT])]
        with closing(running(waiting, args, args.output / "logs")) as waves:
            for contestant, url in (each for wave in waves for each in wave):
                check_length(url, longest)
                missing = _missing(asked, files[contestant.name], files[EXACT])
                for question in tqdm(missing, desc=contestant.name, unit="prompt"):
                    exact = files[EXACT].get(question) if contestant.name != EXACT else None
                    files[contestant.name].add(ask(url, question, token_ids[question.key], exact))
    finally:
        _report(args, asked, files)
    return 0


def _missing(asked: Sequence[Question], answers: AnswerFile, exact: AnswerFile) -> list[Question]:
    """What is not answered yet, or was compared with another answer of exact attention's."""
    return [question for question in asked if not _is_current(answers.get(question), exact.get(question))]


def _is_current(answer: Answer | None, exact: Answer | None) -> bool:
    if answer is None:
        return False
    compared_with = answer.more.get("exact_token_ids")
    return compared_with is None or (exact is not None and compared_with == exact.more["token_ids"])


def read(path: Path, max_tokens: int) -> list[Question]:
    """Raises CommandError with the number of a line that is broken."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise CommandError(f"{path} cannot be read: {error}") from error
    questions = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            questions.append(_question(json.loads(line), number, max_tokens))
        except (ValueError, TypeError, AttributeError) as error:
            raise CommandError(f"{path}, line {number}: {error}") from error
    if not questions:
        raise CommandError(f"{path} has no prompts")
    return questions


def _question(row: Any, number: int, max_tokens: int) -> Question:
    if not isinstance(row, dict) or ("messages" in row) == ("prompt" in row):
        raise ValueError("an object with messages or prompt is wanted")
    answer = row.get("answer")
    if not isinstance(answer, str | None) or not isinstance(row.get("prompt", ""), str):
        raise ValueError("prompt and answer must be texts")
    if answer == "":
        raise ValueError("answer is empty: leave it out")
    messages = row.get("messages", [])
    if not all(isinstance(one, dict) and all(isinstance(one.get(key), str) for key in _KEYS) for one in messages):
        raise ValueError("messages must be a list of objects with role and content")
    if "messages" in row and not messages:
        raise ValueError("messages is empty")
    text = row["prompt"] if "prompt" in row else json.dumps(messages)
    references = () if answer is None else (answer,)
    return Question(NAME, 0, number, text, references, max_tokens, is_completion="prompt" in row)


def _token_ids(tokenizer: Any, question: Question) -> list[int]:
    if question.is_completion:
        return list(tokenizer(question.text).input_ids)
    return chat_ids(tokenizer, json.loads(question.text))


def ask(url: str, question: Question, token_ids: list[int], exact: Answer | None) -> Answer:
    """The greedy answer; and how likely `exact`, another server's answer to it, is here. Raises CommandError."""
    started = time.perf_counter()
    body = _generate(url, token_ids, question.max_tokens, return_logprob=True)
    seconds = time.perf_counter() - started
    own = body["meta_info"]["output_token_logprobs"]
    more: dict[str, Any] = {"token_ids": [entry[1] for entry in own], "logprobs": [entry[0] for entry in own]}
    report = prefill_report(body)
    if exact is not None:
        more["exact_token_ids"] = exact.more["token_ids"]
        more["logprobs_of_exact"] = logprobs_of(url, token_ids, exact.more["token_ids"], report)
    return Answer(question.key, question.digest, body["text"], len(token_ids), round(seconds, 4), report, more)


def logprobs_of(url: str, token_ids: list[int], continuation: list[int], report: dict[str, Any]) -> list[float] | None:
    """Log-probabilities of `continuation`'s tokens after a prefill of `token_ids` that had `report`.

    As a part of the question they stand where decoded tokens would: their rows see all of the context, whose blocks
    are those of the prompt alone. None where the question, or the prompt's length, had a say in what blocks hand on.
    """
    custom = None
    if question := report.get("question_tokens"):
        if report.get("selector") != "key_diff":
            return None
        custom = {"prefill": {"question_tokens": question + len(continuation)}}
    more = {"return_logprob": True, "logprob_start_len": len(token_ids) - 1}
    body = _generate(url, [*token_ids, *continuation], 1, custom, **more)
    if _prefilled(prefill_report(body)) != _prefilled(report):
        return None
    return [entry[0] for entry in body["meta_info"]["input_token_logprobs"][1:]]


def _prefilled(report: dict[str, Any]) -> list[Any]:
    return [report.get(key) for key in _WHAT_BLOCKS_SEE]


def _generate(url: str, token_ids: list[int], max_tokens: int, custom: Any = None, **more: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": max_tokens} | ({"custom_params": custom} if custom else {})
    return request("POST", f"{url}/generate", json={"input_ids": token_ids, "sampling_params": sampling, **more})


def _report(args: argparse.Namespace, asked: Sequence[Question], files: dict[str, AnswerFile]) -> None:
    exact = files[EXACT]
    rows = []
    for name, file in files.items():
        for question in asked:
            answer, right = file.get(question), exact.get(question)
            if name != EXACT and answer is not None and right is not None:
                rows.append(_compared(name, question, answer, right))
    if not rows:
        return
    print(_table(rows))
    verdicts = [_verdict(name, rows) for name in files if any(row["contestant"] == name for row in rows)]
    print("\n" + "\n".join(verdicts))
    result = args.output / "result.json"
    write_result(result, model=args.model, settings={"file": args.file.name}, prompts=rows, verdicts=verdicts)
    print(f"written to {result}")


def _compared(name: str, question: Question, answer: Answer, exact: Answer) -> dict[str, Any]:
    pairs = zip(answer.more["token_ids"], exact.more["token_ids"], strict=False)
    parted = next((place for place, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    return {
        "contestant": name,
        "line": question.index,
        "num_tokens": answer.num_tokens,
        "attention_share": answer.prefill.get("attention_share", 1.0),
        "parted_at": parted,
        "logprob_exact": statistics.fmean(exact.more["logprobs"]),
        "logprob_sparse": statistics.fmean(likely) if (likely := answer.more["logprobs_of_exact"]) else None,
        "exact_is_right": _is_right(question, exact),
        "sparse_is_right": _is_right(question, answer),
        "exact": exact.text,
        "sparse": answer.text,
    }


def _is_right(question: Question, answer: Answer) -> bool | None:
    return question.references[0].lower() in answer.text.lower() if question.references else None


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [
        [
            row["contestant"],
            str(row["line"]),
            f"{row['num_tokens']:,}",
            f"{row['attention_share']:.0%}",
            NO_FIGURE if row["parted_at"] is None else str(row["parted_at"]),
            f"{row['logprob_exact']:.3f}",
            NO_FIGURE if row["logprob_sparse"] is None else f"{row['logprob_sparse']:.3f}",
            repr(row["sparse"])[:_SHOWN_WIDTH],
        ]
        for row in rows
    ]
    header = ["contestant", "line", "tokens", "attention", "parts at", "log p, exact", "after sparse", "sparse answer"]
    return markdown(header, cells)


def _verdict(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """One sentence: whether to turn it on for these prompts."""
    own = [row for row in rows if row["contestant"] == name]
    same = sum(row["parted_at"] is None for row in own)
    said = f"{name}: {same} of {len(own)} answers are exact attention's"
    lowest, highest = 0.0, 0.0
    if likely := [row for row in own if row["logprob_sparse"] is not None]:
        columns = (("logprob_sparse", name), ("logprob_exact", EXACT))
        sparse, exact = ([Score(who, NAME, 0, row["line"], row[key]) for row in likely] for key, who in columns)
        change = difference(sparse, exact)
        assert change is not None
        half_width = math.inf if change.half_width is None else change.half_width
        lowest, highest = change.mean - half_width, change.mean + half_width
        interval = "" if change.half_width is None else f" ± {change.half_width:.3f}"
        said += f"; its tokens' log-probabilities change by {change.mean:+.3f}{interval}"
    judged = [row for row in own if row["exact_is_right"] is not None]
    lost = sum(row["exact_is_right"] for row in judged) - sum(row["sparse_is_right"] for row in judged)
    if judged:
        right = sum(row["sparse_is_right"] for row in judged)
        said += f"; {right} of {len(judged)} are right, {right + lost} with exact attention"
    if highest < -_TOLERATED or lost > 0 or not (likely or judged or same == len(own)):
        return f"{said}: stay with exact attention for these prompts."
    if lowest < -_TOLERATED:
        return f"{said}: these prompts are too few to tell, ask more."
    return f"{said}: turn it on for these prompts."
