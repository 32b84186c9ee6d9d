"""A few hundred requests of all shapes; tests/fuzz_servers.py makes as many as it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_servers import Outcome, fuzz
from request_shapes import PATHS, Shapes

pytestmark = pytest.mark.server
NUM_REQUESTS = 300


def test_requests_of_all_shapes_end_no_server(smollm2: Path, log_dirs: Iterator[Path]) -> None:
    outcome = Outcome()
    fuzz(smollm2, next(log_dirs), 0, NUM_REQUESTS, print, outcome)
    answers = {name.partition(": ")[2] for name in outcome.answers}
    assert {"200", "400"} <= answers, outcome.answers


def test_a_seed_makes_the_same_requests_again() -> None:
    fields = {"type": "object", "properties": {"stream": {"type": "boolean"}, "rid": {"type": "string"}}}
    body = {"requestBody": {"content": {"application/json": {"schema": fields}}}}
    paths = {path: {"post": body} for path in PATHS}
    made = [[str(shape) for shape in Shapes({"paths": paths, "components": {}}).make(seed, 40)] for seed in (3, 3, 4)]
    assert made[0] == made[1] != made[2]
