"""What is asked and what is answered, whatever benchmark it is of; answers are kept as they come."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from sglang_apb.commands import CommandError


@dataclass(frozen=True)
class Question:
    """`text` is a chat's only message or, of a completion, what the answer goes on with.

    length: in tokens, for which it was made. references: what a right answer has in it. prefix: how a chat's answer
    begins, which the model is to go on with.
    """

    task: str
    length: int
    index: int
    text: str
    references: tuple[str, ...]
    max_tokens: int
    is_completion: bool = False
    prefix: str = ""

    @property
    def key(self) -> str:
        return f"{self.task}/{self.length}/{self.index}"

    @property
    def digest(self) -> str:
        return xxhash.xxh3_64_hexdigest(json.dumps(asdict(self)).encode())


@dataclass(frozen=True)
class Answer:
    """`num_tokens` of the prompt, of which `num_cached` were found in the prefix cache, where servers report it;
    `first_token_s` from the request on; `prefill` as `prefill_report` gives it; `more` is the benchmark's.
    """

    key: str
    digest: str
    text: str
    num_tokens: int
    first_token_s: float
    prefill: dict[str, Any]
    more: dict[str, Any] = field(default_factory=dict)
    num_cached: int = 0


class AnswerFile:
    """One contestant's answers, a JSON object a line, after one that says how they were made (`made_with`).

    Raises CommandError when `path` has answers that were made otherwise, or to other questions.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]):
        self.path = path
        self._answers: dict[str, Answer] = {}
        self._lock = threading.Lock()
        if path.exists():
            self._read(dict(made_with))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(made_with) + "\n")

    def _read(self, made_with: dict[str, Any]) -> None:
        # A line that has no end was being written when the process was killed.
        *lines, unfinished = self.path.read_text().split("\n")
        if not lines:
            lines = [json.dumps(made_with)]
        if unfinished or len(lines) == 1:
            self.path.write_text("".join(f"{line}\n" for line in lines))
        found = self._parse(1, lines[0])
        if found != made_with:
            raise CommandError(
                f"{self.path} has answers that were made with {json.dumps(found)}, not with {json.dumps(made_with)}: "
                "give another --output, or the contestant another name"
            )
        for number, line in enumerate(lines[1:], 2):
            try:
                answer = Answer(**self._parse(number, line))
            except TypeError as error:
                raise CommandError(f"{self.path}, line {number}: {error}") from error
            self._answers[answer.key] = answer

    def _parse(self, number: int, line: str) -> Any:
        try:
            return json.loads(line)
        except ValueError as error:
            raise CommandError(f"{self.path}, line {number} is no JSON: {error}") from error

    def missing(self, questions: Iterable[Question]) -> list[Question]:
        """Those that are not answered yet, the first of each task before the second: a run that is broken off has some
        of every task.
        """
        missing = [question for question in questions if self.get(question) is None]
        return sorted(missing, key=lambda question: question.index)

    def get(self, question: Question) -> Answer | None:
        answer = self._answers.get(question.key)
        if answer is not None and answer.digest != question.digest:
            raise CommandError(f"{self.path} has the answer to another {question.key}: give another --output")
        return answer

    def add(self, answer: Answer) -> None:
        """By any thread."""
        with self._lock:
            self._answers[answer.key] = answer
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(answer)) + "\n")


def open_answers(folder: Path, made_with: Mapping[str, Mapping[str, Any]]) -> dict[str, AnswerFile]:
    """Of each contestant by its name. Raises CommandError."""
    return {name: AnswerFile(folder / "answers" / f"{name}.jsonl", with_) for name, with_ in made_with.items()}
