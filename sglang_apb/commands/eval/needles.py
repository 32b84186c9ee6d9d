"""`sglang-apb eval needles`: how often a fact is found that is hidden in filler text; small models can do it, too.

Prompts are made to a length in tokens, and the same for the same seed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sglang_apb.commands import CommandError
from sglang_apb.commands.eval import benchmark
from sglang_apb.commands.eval.questions import Question
from sglang_apb.commands.eval.templates import tokenizer_of

HELP = "a fact hidden in filler text"
NAME = "needles"
_ANSWER_TOKENS = 16

CountTokens = Callable[[str], int]

INTRODUCTION = (
    "A special magic number is hidden in the following text. Make sure to remember it. "
    "You will be asked about it afterwards.\n\n"
)
QUESTION = "\n\nWhat is the special magic number for {city} mentioned in the text?"
# A small model answers when it only has to go on: the answer's first words are part of the prompt.
ANSWER_START = " The special magic number for {city} mentioned in the text is"
NEEDLE = "The special magic number for {city} is {number}."


def _items(text: str) -> tuple[str, ...]:
    return tuple(" ".join(item.split()) for item in text.split("|"))


CITIES = _items(
    """Amsterdam | Ankara | Athens | Bergen | Berlin | Bogota | Bristol | Cairo | Dakar | Delhi | Dublin
    | Geneva | Hanoi | Helsinki | Jakarta | Karachi | Lagos | Lima | Lisbon | London | Madrid | Manila
    | Melbourne | Milan | Mumbai | Nairobi | Oslo | Paris | Prague | Quito | Riga | Rome | Santiago | Seoul
    | Sofia | Tokyo"""
)
_SUBJECTS = _items(
    """The survey team | A retired engineer | The town library | Our neighbour | The harbour master
    | A group of students | The museum's curator | An old farmer | The weather station | The railway company
    | A young painter | The local council"""
)
_VERBS = _items(
    """described | repaired | photographed | visited | measured | catalogued | rebuilt | inspected | discussed
    | restored | mapped | sketched"""
)
_OBJECTS = _items(
    """the stone bridge | a set of brass instruments | the eastern garden | several wooden boats
    | the lighthouse stairs | an unfinished manuscript | the market square | a narrow canal | the orchard wall
    | two water mills | the long corridor | a collection of maps"""
)
_CIRCUMSTANCES = _items(
    """before the first snow | with great patience | after a long discussion | while the river was low
    | during the summer fair | without any outside help | for the third time that decade
    | in spite of the strong wind | as the letters had suggested | on a quiet afternoon | under a grey sky
    | long after the others had left"""
)
_REMARKS = _items(
    """Nobody objected. | The costs were shared by everyone involved. | Some of the tools were borrowed.
    | It took longer than planned, yet the result was sound. | The weather stayed mild throughout.
    | A short note about it appeared in the newspaper. | Opinions differed on whether it was worth the effort.
    | Later visitors rarely noticed the difference. | Children watched from the other side of the road.
    | The work began early and ended at dusk."""
)


@dataclass(frozen=True)
class NeedlePrompt:
    """`text` ends with the first words of the answer; a right answer goes on with `number`.

    `depth` is where the needle stands in the filler, from 0 (start) to 1 (end).
    """

    text: str
    city: str
    number: str
    depth: float
    num_tokens: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmark.add_arguments(parser, NAME, lengths=(4096, 7168), num_samples=10)
    parser.add_argument("--seed", type=int, default=0, help="of the prompts")


def run(args: argparse.Namespace) -> int:
    return benchmark.run(args, NAME, make_questions, rate)


def make_questions(args: argparse.Namespace, model: str, folder: Path) -> list[Question]:
    tokenizer = tokenizer_of(model)
    try:
        return [
            Question("needle", length, index, prompt.text, (prompt.number,), _ANSWER_TOKENS, is_completion=True)
            for length in args.lengths
            for index, prompt in enumerate(
                build_prompts(
                    length - _ANSWER_TOKENS, args.num_samples, args.seed, lambda text: len(tokenizer(text).input_ids)
                )
            )
        ]
    except ValueError as error:
        raise CommandError(str(error)) from error


def rate(question: Question, text: str) -> float:
    return 100.0 * (question.references[0] in text)


def build_prompts(length: int, num_prompts: int, seed: int, count_tokens: CountTokens) -> list[NeedlePrompt]:
    """`num_prompts` prompts of at most `length` tokens and at least a sentence less, needles at even depths.

    Raises ValueError when `length` has no room for the question.
    """
    return [
        build_prompt(length, (index + 0.5) / num_prompts, f"{seed}-{length}-{index}", count_tokens)
        for index in range(num_prompts)
    ]


def build_prompt(length: int, depth: float, seed: str, count_tokens: CountTokens) -> NeedlePrompt:
    """One prompt of at most `length` tokens. Raises ValueError when that is too short for the question."""
    generator = random.Random(seed)
    city = generator.choice(CITIES)
    number = str(generator.randrange(1_000_000, 10_000_000))
    sentences = _filler(generator, num_characters=8 * length)

    def text_with(num_sentences: int) -> str:
        at = round(depth * num_sentences)
        parts = [*sentences[:at], NEEDLE.format(city=city, number=number), *sentences[at:num_sentences]]
        question = (QUESTION + ANSWER_START).format(city=city)
        return INTRODUCTION + " ".join(parts) + question

    num_sentences = benchmark.largest(len(sentences), lambda count: count_tokens(text_with(count)) <= length)
    if num_sentences is None:
        raise ValueError(f"a needle prompt does not fit in {length} tokens: ask for at least 128")
    text = text_with(num_sentences)
    return NeedlePrompt(text, city, number, depth, count_tokens(text))


def _filler(generator: random.Random, num_characters: int) -> Sequence[str]:
    """Sentences of at least `num_characters` in all."""
    sentences: list[str] = []
    total = 0
    for sentence in _sentences(generator):
        sentences.append(sentence)
        total += len(sentence)
        if total >= num_characters:
            return sentences
    raise AssertionError("sentences never run out")


def _sentences(generator: random.Random) -> Iterator[str]:
    while True:
        subject, verb, thing, circumstance = map(generator.choice, (_SUBJECTS, _VERBS, _OBJECTS, _CIRCUMSTANCES))
        yield f"{subject} {verb} {thing} {circumstance}."
        if generator.random() < 0.3:
            yield generator.choice(_REMARKS)
