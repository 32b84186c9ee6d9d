"""What a benchmark's answers come to: tables for the screen, and the same as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sglang_apb.commands.bench.table import NO_FIGURE, markdown
from sglang_apb.commands.eval.contestants import EXACT
from sglang_apb.commands.eval.questions import Answer
from sglang_apb.commands.eval.scores import Score, difference, mean_score

MEAN = "mean"


@dataclass(frozen=True)
class Outcome:
    """An answer, and its score."""

    score: Score
    answer: Answer


@dataclass(frozen=True)
class Summary:
    """Of all outcomes; contestants, tasks and lengths in the order in which they came."""

    outcomes: Sequence[Outcome]

    @property
    def contestants(self) -> list[str]:
        return list(dict.fromkeys(outcome.score.contestant for outcome in self.outcomes))

    @property
    def lengths(self) -> list[int]:
        return sorted({outcome.score.length for outcome in self.outcomes})

    def scores(self, contestant: str, length: int | None = None, task: str | None = None) -> list[Score]:
        return [
            score
            for score in (outcome.score for outcome in self.outcomes)
            if score.contestant == contestant and length in (None, score.length) and task in (None, score.task)
        ]

    def tables(self) -> str:
        """A table a length, one of all lengths, one of what the answers took, and who has not answered everything."""
        parts = [self._scores_at(length) for length in self.lengths]
        if len(self.lengths) > 1:
            parts.append(self._score_table("all lengths", None, [MEAN]))
        counts = {name: len(self.scores(name)) for name in self.contestants}
        missing = [
            f"- {name} has answered {count} of {max(counts.values())} prompts: means are over what each has answered, "
            "differences over what both have"
            for name, count in counts.items()
            if count < max(counts.values())
        ]
        return "\n\n".join([*parts, self._cost_table(), *missing])

    def _scores_at(self, length: int) -> str:
        tasks = list(dict.fromkeys(outcome.score.task for outcome in self.outcomes if outcome.score.length == length))
        return self._score_table(f"{length:,} tokens", length, [*tasks, MEAN] if len(tasks) > 1 else tasks)

    def _score_table(self, title: str, length: int | None, tasks: Sequence[str]) -> str:
        others = [name for name in self.contestants if name != EXACT and EXACT in self.contestants]
        rows = []
        for row in tasks:
            task = None if row == MEAN else row
            scores = {name: self.scores(name, length, task) for name in self.contestants}
            cells = [_number(mean_score(scores[name])) for name in self.contestants]
            rows.append([row, *cells, *(_text(difference(scores[name], scores[EXACT])) for name in others)])
        return markdown([title, *self.contestants, *(f"{name} - {EXACT}" for name in others)], rows)

    def _cost_table(self) -> str:
        rows = [
            [row["contestant"], f"{row['length']:,}", str(row["num_answers"]), *_cost_cells(row)]
            for row in self.costs()
        ]
        return markdown(
            ["contestant", "tokens", "answers", "found", "of exact attention", "to the first token, median"], rows
        )

    def costs(self) -> list[dict[str, Any]]:
        """Of each contestant and length: share of the tokens found, of exact attention's work, and median seconds to
        the first token.
        """
        rows = []
        for name in self.contestants:
            for length in self.lengths:
                answers = [o.answer for o in self.outcomes if (o.score.contestant, o.score.length) == (name, length)]
                if answers:
                    shares = [answer.prefill.get("attention_share", 1.0) for answer in answers]
                    rows.append(
                        {
                            "contestant": name,
                            "length": length,
                            "num_answers": len(answers),
                            "cached_share": round(statistics.fmean(a.num_cached / a.num_tokens for a in answers), 4),
                            "attention_share": round(statistics.fmean(shares), 4),
                            "first_token_s": round(statistics.median(answer.first_token_s for answer in answers), 4),
                        }
                    )
        return rows

    def as_json(self) -> dict[str, Any]:
        rows = []
        for name in self.contestants:
            for length in [*self.lengths, None]:
                tasks = dict.fromkeys(score.task for score in self.scores(name, length))
                for task in [*(tasks if length is not None else []), None]:
                    rows.append(self._score_row(name, length, task))
        return {"scores": rows, "costs": self.costs()}

    def _score_row(self, name: str, length: int | None, task: str | None) -> Mapping[str, Any]:
        scores = self.scores(name, length, task)
        to_exact = difference(scores, self.scores(EXACT, length, task)) if name != EXACT else None
        return {
            "contestant": name,
            "length": length,
            "task": task,
            "num_answers": len(scores),
            "mean": mean_score(scores),
            "to_exact": None if to_exact is None else asdict(to_exact),
        }


def _number(value: float | None) -> str:
    return NO_FIGURE if value is None else f"{value:.1f}"


def _text(value: object) -> str:
    return NO_FIGURE if value is None else str(value)


def _cost_cells(row: Mapping[str, Any]) -> list[str]:
    return [f"{row['cached_share']:.0%}", f"{row['attention_share']:.0%}", f"{row['first_token_s']:.2f} s"]
