"""`sglang-apb eval infinitebench`: tasks of InfiniteBench (Zhang et al. 2024, arXiv:2402.13718) that need no download.

passkey, number_string and kv_retrieval are made by the rules of its `construct_synthetic_dataset.py`, math_find and
code_run by those of the paper (appendix A); each to a length in tokens, where the benchmark has about 100K. With
--data, a folder of its published files (`TASK.jsonl`), prompts of these and of four more tasks are taken from there,
cut in the middle to the length as the benchmark does. Prompts and scores are after its `prompt.py` and
`compute_scores.py`, but models may answer in a sentence: answers are longer, and the first letter or the last number
that stands alone counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sglang_apb.commands import CommandError
from sglang_apb.commands.bench.arguments import choices
from sglang_apb.commands.eval import benchmark
from sglang_apb.commands.eval.infinitebench_texts import TEMPLATES, answer_tokens
from sglang_apb.commands.eval.questions import Question
from sglang_apb.commands.eval.templates import num_template_tokens, tokenizer_of

HELP = "tasks of InfiniteBench"
NAME = "infinitebench"
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
# The tasks that are made here.
MADE = ("passkey", "number_string", "kv_retrieval", "math_find", "code_run")
# A template's tokens are measured without these, which come on top.
_MARGIN = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark.add_arguments(parser, NAME, lengths=(32768,), num_samples=20)
    parser.add_argument(
        "--tasks", type=_tasks, default=list(MADE), help=f"comma-separated; {','.join(MADE)} if left out"
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of the published files, TASK.jsonl each")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts that are made")


def run(args: argparse.Namespace) -> int:
    if args.data is None and (missing := [task for task in args.tasks if task not in MADE]):
        raise CommandError(f"{missing[0]} is not made here: give the folder of InfiniteBench's files with --data")
    return benchmark.run(args, NAME, make_questions, rate)


def make_questions(args: argparse.Namespace, model: str, folder: Path) -> list[Question]:
    tokenizer, room = tokenizer_of(model), num_template_tokens(model) + _MARGIN
    if args.data is not None:
        return [
            _cut(question, tokenizer, length, length - room - question.max_tokens)
            for length in args.lengths
            for task in args.tasks
            for question in _read(args.data, task, args.num_samples)
        ]
    return [
        Question(task, length, index, text, answers, answer_tokens(task))
        for length in args.lengths
        for task in args.tasks
        for index, (text, answers) in enumerate(
            _fit(
                task,
                length - room - answer_tokens(task),
                args.num_samples,
                args.seed,
                lambda text: len(tokenizer(text).input_ids),
            )
        )
    ]


def rate(question: Question, text: str) -> float:
    """Right or wrong; of a book's question the F1 of the answer's words."""
    if question.task == "longbook_qa_eng":
        return 100 * max(_f1(_words(text), _words(reference)) for reference in question.references)
    return 100.0 * _RIGHT.get(question.task, _has_word)(text, question.references)


# ---- what is made


def _fit(
    task: str, num_tokens: int, num_samples: int, seed: int, count_tokens: Callable[[str], int]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Prompts of at most so many tokens, and little less. Raises CommandError."""
    for index in range(num_samples):

        def make(size: int, index: int = index) -> tuple[str, tuple[str, ...]]:
            return _MAKERS[task](random.Random(f"{seed}-{task}-{index}"), size, index / max(num_samples - 1, 1))

        # Each more is a token at least.
        size = benchmark.largest(num_tokens, lambda size: size == 0 or count_tokens(make(size)[0]) <= num_tokens)
        if not size:
            raise CommandError(f"InfiniteBench's {task} does not fit in {num_tokens} tokens: give --lengths more")
        yield make(size)


def _in_noise(needle: str, size: int, depth: float) -> str:
    at = round(depth * size)
    return _NOISE * at + needle + _NOISE * (size - at)


def _passkey(draw: random.Random, size: int, depth: float) -> tuple[str, tuple[str, ...]]:
    key = "".join(draw.choices("0123456789", k=5))
    context = _in_noise(f"The pass key is {key}. Remember it. {key} is the pass key.\n", size, depth)
    return TEMPLATES["passkey"].format(context=context, input="What is the pass key?"), (key,)


def _number_string(draw: random.Random, size: int, depth: float) -> tuple[str, tuple[str, ...]]:
    """Ten digits, of which five repeat the one before them."""
    digits = draw.choices("0123456789", k=5)
    for _ in range(5):
        place = draw.randrange(len(digits))
        digits.insert(place, digits[place])
    key = "".join(digits)
    context = _in_noise(
        f"The sequence of digits is {key}. Remember it. {key} is the sequence of digits.\n", size, depth
    )
    return TEMPLATES["number_string"].format(context=context, input="What is the sequence of digits?"), (key,)


def _kv_retrieval(draw: random.Random, size: int, depth: float) -> tuple[str, tuple[str, ...]]:
    pairs = [(_uuid(draw), _uuid(draw)) for _ in range(size)]
    key, value = pairs[round(depth * (size - 1))]
    context = f"JSON data:\n{json.dumps(dict(pairs))}"
    asked = f'Key: "{key}"\nThe value associated with the specified key is: '
    return TEMPLATES["kv_retrieval"].format(context=context, input=asked), (value,)


def _uuid(draw: random.Random) -> str:
    return str(uuid.UUID(int=draw.getrandbits(128), version=4))


def _math_find(draw: random.Random, size: int, depth: float) -> tuple[str, tuple[str, ...]]:
    """One of seven numbers of a list: the three largest, the three smallest, and the median."""
    numbers = draw.sample(range(10 * size + 100), 2 * size + 7)
    ordered = sorted(numbers)
    places = {"largest": -1, "second largest": -2, "third largest": -3}
    places |= {"smallest": 0, "second smallest": 1, "third smallest": 2, "median": len(ordered) // 2}
    which = draw.choice(list(places))
    asked = f"What is the {which} number in the following list? You should answer with only one number, no other words."
    return TEMPLATES["math_find"].format(context=numbers, input=asked), (str(ordered[places[which]]),)


def _code_run(draw: random.Random, size: int, depth: float) -> tuple[str, tuple[str, ...]]:
    """Functions that call another one and add a number, two to ten deep, among others that are not called."""
    num_deep = draw.randint(2, 10)
    names = [f"func_{number}" for number in draw.sample(range(10 * (size + num_deep)), size + num_deep)]
    chain, others = names[:num_deep], names[num_deep:]
    added = {name: draw.randint(-99, 99) for name in names}
    calls = dict(itertools.pairwise(chain)) | {name: draw.choice(names) for name in others}
    texts = []
    for name in draw.sample(names, len(names)):
        inner = f"{calls[name]}(x)" if name in calls else "x"
        texts.append(f"def {name}(x):\n    return {inner} {'-' if added[name] < 0 else '+'} {abs(added[name])}\n")
    argument = draw.randint(0, 99)
    value = argument + sum(added[name] for name in chain)
    call = f"{chain[0]}({argument})"
    return TEMPLATES["code_run"].format(name=chain[0], call=call, context="\n".join(texts)), (str(value),)


_MAKERS: dict[str, Callable[[random.Random, int, float], tuple[str, tuple[str, ...]]]] = {
    "passkey": _passkey,
    "number_string": _number_string,
    "kv_retrieval": _kv_retrieval,
    "math_find": _math_find,
    "code_run": _code_run,
}


# ---- what is published


def _read(folder: Path, task: str, num_samples: int) -> list[Question]:
    """Raises CommandError."""
    path = folder / f"{task}.jsonl"
    if not path.exists():
        raise CommandError(f"{path} does not exist: --data is to be the folder of InfiniteBench's files")
    questions: list[Question] = []
    try:
        with path.open(encoding="utf-8") as file:
            for index, line in enumerate(itertools.islice(file, num_samples)):
                questions.append(_published(task, index, json.loads(line)))
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise CommandError(f"{path}, line {len(questions) + 1}: {type(error).__name__} {error}") from error
    if not questions:
        raise CommandError(f"{path} has no prompts")
    return questions


def _published(task: str, index: int, row: dict[str, Any]) -> Question:
    answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
    if not answers:
        raise ValueError("answer is empty")
    options = row.get("options") or []
    if task in ("longbook_choice_eng", "code_debug"):  # the option's text; what is wanted is its letter
        answers = ["ABCD"[options.index(answers[0])]]
    call = re.search(r"(func_\w+)\([^)]*\)", row["input"]) if task == "code_run" else None
    fields = {"name": call[1], "call": call[0]} if call else {}
    text = TEMPLATES[task].format(context=row["context"], input=row["input"], options=options, **fields)
    return Question(task, 0, index, text, tuple(map(str, answers)), answer_tokens(task))


def _cut(question: Question, tokenizer: Any, length: int, num_tokens: int) -> Question:
    """Its first and its last tokens, where it has more."""
    ids = tokenizer(question.text).input_ids
    half, text = num_tokens // 2, question.text
    if len(ids) > num_tokens:
        text = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[len(ids) - half :])
    return replace(question, length=length, text=text)


# ---- what is right


def _first_number(text: str, references: Sequence[str]) -> bool:
    found = re.search(r"\d+\.\d+|\d+", text)
    return found is not None and found[0] == references[0]


def _last_number(text: str, references: Sequence[str]) -> bool:
    return re.findall(r"-?\d+", text)[-1:] == [references[0]]


def _has_word(text: str, references: Sequence[str]) -> bool:
    words = re.sub(r"[\n:\"'.,?!{}]", " ", text).split()
    return references[0] in words


def _has_name(text: str, references: Sequence[str]) -> bool:
    return _has_word(text.upper(), [references[0].upper()])


def _has_letter(text: str, references: Sequence[str]) -> bool:
    found = re.search(r"\b[ABCD]\b", text)
    return found is not None and found[0] in references


_RIGHT: dict[str, Callable[[str, Sequence[str]], bool]] = {
    "passkey": _first_number,
    "number_string": _first_number,
    "math_find": _first_number,
    "code_run": _last_number,
    "longdialogue_qa_eng": _has_name,
    "longbook_choice_eng": _has_letter,
    "code_debug": _has_letter,
}


def _words(text: str) -> list[str]:
    kept = re.sub(r"[^\w\s]", "", text.lower())
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(found: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def _tasks(text: str) -> list[str]:
    return choices(text, TEMPLATES)
