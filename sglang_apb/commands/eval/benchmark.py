"""A benchmark's run: its questions go to every contestant, answers are kept as they come, and are scored in the end."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sglang_apb.commands.bench.arguments import count, counts
from sglang_apb.commands.eval import picture
from sglang_apb.commands.eval.asking import ask_all
from sglang_apb.commands.eval.contestants import (
    Contestant,
    add_server_arguments,
    check_config_length,
    check_length,
    contestants_of,
    model_of,
    running,
)
from sglang_apb.commands.eval.questions import AnswerFile, Question, open_answers
from sglang_apb.commands.eval.scores import Score
from sglang_apb.commands.eval.summary import Outcome, Summary
from sglang_apb.commands.report import write_result

# `args`, the model whose tokenizer measures, and a folder where made prompts may be kept. Raises CommandError.
Make = Callable[[argparse.Namespace, str, Path], list[Question]]
# Of an answer's text: 0 to 100.
Rate = Callable[[Question, str], float]


def add_arguments(parser: argparse.ArgumentParser, name: str, lengths: Sequence[int], num_samples: int) -> None:
    add_server_arguments(parser, name)
    shown = ",".join(map(str, lengths))
    parser.add_argument(
        "--lengths", type=counts, default=list(lengths), help=f"prompt tokens, answers included; {shown} if left out"
    )
    parser.add_argument("--num-samples", type=count, default=num_samples, help="prompts a task and length")
    parser.add_argument("--at-once", type=count, default=4, help="prompts that each server is asked at a time")


def run(args: argparse.Namespace, name: str, make: Make, rate: Rate) -> int:
    contestants = contestants_of(args)
    check_config_length(args, max(args.lengths))
    model = model_of(args, contestants)
    made_with = {each.name: each.made_with(args) for each in contestants}
    files = open_answers(args.output, made_with)
    questions = make(args, model, args.output / "prompts")
    try:
        _ask_missing(args, contestants, questions, files)
    finally:  # what was answered is shown, and kept, whatever happened
        settings = {"benchmark": name, "at_once": args.at_once, "contestants": made_with}
        _report(args.output, model, settings, _outcomes(questions, files, rate))
    return 0


def largest(limit: int, fits: Callable[[int], bool]) -> int | None:
    """The largest count in [0, limit] that fits; None when 0 does not. `fits` must not turn true again.

    From small counts on: of what is far too large nobody wants to count the tokens.
    """
    if not fits(0):
        return None
    count, step = 0, 1
    while count + step <= limit and fits(count + step):
        count, step = count + step, 2 * step
    while step > 1:
        step //= 2
        if count + step <= limit and fits(count + step):
            count += step
    return count


def _ask_missing(
    args: argparse.Namespace,
    contestants: Sequence[Contestant],
    questions: Sequence[Question],
    files: Mapping[str, AnswerFile],
) -> None:
    waiting = [each for each in contestants if files[each.name].missing(questions)]
    with closing(running(waiting, args, args.output / "logs")) as waves:
        for wave in waves:
            for _, url in wave:
                check_length(url, max(args.lengths))
            _ask_wave(wave, questions, files, args)


def _ask_wave(
    wave: Sequence[tuple[Contestant, str]],
    questions: Sequence[Question],
    files: Mapping[str, AnswerFile],
    args: argparse.Namespace,
) -> None:
    stop = threading.Event()

    def ask_missing(contestant: Contestant, url: str) -> None:
        file = files[contestant.name]
        missing = file.missing(questions)
        ask_all(contestant.name, url, missing, file, at_once=args.at_once, stop=stop, twice=args.twice)

    pool = ThreadPoolExecutor(len(wave))
    try:
        for asked in [pool.submit(ask_missing, *each) for each in wave]:
            asked.result()
    finally:  # an interrupt ends the servers at once, and with them what they are asked
        stop.set()
        pool.shutdown(wait=False)


def _outcomes(questions: Sequence[Question], files: Mapping[str, AnswerFile], rate: Rate) -> list[Outcome]:
    return [
        Outcome(Score(name, question.task, question.length, question.index, rate(question, answer.text)), answer)
        for name, file in files.items()
        for question in questions
        if (answer := file.get(question)) is not None
    ]


def _report(folder: Path, model: str, settings: Mapping[str, Any], outcomes: Sequence[Outcome]) -> None:
    if not outcomes:
        return
    summary = Summary(outcomes)
    print(summary.tables())
    write_result(folder / "result.json", model=model, settings=settings, **summary.as_json())
    print(f"written to {folder / 'result.json'}")
    if find_spec("matplotlib") is not None:
        picture.write(folder / "scores.png", summary, f"{settings['benchmark']}, {Path(model).name}")
        print(f"drawn in {folder / 'scores.png'}")
