"""`sglang-apb bench`: what it times, computes and says, against servers that only pretend to prefill."""

from __future__ import annotations

import gzip
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from sglang_apb import cli, layout
from sglang_apb.commands import CommandError
from sglang_apb.commands.bench import compared
from sglang_apb.commands.bench import models as bench_models
from sglang_apb.commands.bench import plain as bench_plain
from sglang_apb.commands.bench import plot as bench_plot
from sglang_apb.commands.bench import servers as bench_servers
from sglang_apb.commands.bench import table as bench_table
from sglang_apb.commands.bench import timed_prompts as bench_prompts
from sglang_apb.commands.bench.models import DecoderShape
from sglang_apb.commands.bench.servers import BenchServer
from sglang_apb.commands.bench.table import Timing
from sglang_apb.commands.processes import ProcessGroup
from sglang_apb.commands.servers import ServiceError
from sglang_apb.config import ApbConfig

TRACED = [
    {"ph": "X", "cat": "kernel", "name": "nvjet", "ts": 0, "dur": 7000},
    {"ph": "X", "cat": "user_annotation", "name": "sparse attention, layer 0", "ts": 0, "dur": 9},
]
REPORT = {"method": "apb", "num_ranks": 1, "num_blocks": 16, "attention_share": 0.25}
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 10,
}
SHAPE = DecoderShape.of(SMALL)
assert SHAPE is not None


def timing(server: str, length: int, *seconds: float, reason: str | None = None, **report: Any) -> Timing:
    return Timing(server, length, list(seconds), prefill=report, reason=reason)


# what a timing amounts to


def test_a_median_needs_times_and_no_refusal() -> None:
    assert timing("fa3", 8, 3.0, 1.0, 2.0).median == 2.0
    assert timing("fa3", 8, 1.0, 2.0).median == 1.5
    assert timing("fa3", 8).median is None
    assert timing("fa3", 8, 1.0, reason="the server ended").median is None


def test_the_ratio_is_to_the_best_plain_server_of_the_same_length() -> None:
    timings = [timing("flashinfer", 8, 4.0), timing("fa3", 8, 3.0), timing("fa3", 9, 0.1), timing("apb", 8, 1.5)]
    assert bench_table.ratio(timings, 8) == 2.0
    assert bench_table.ratio([*timings, timing("fa3-cp", 8, 2.25)], 8) == 1.5
    assert bench_table.ratio(timings, 9) is None, "APB has no figure"
    refused = [timing("fa3", 8, reason="HTTP 400"), timing("apb", 8, 1.5)]
    assert bench_table.ratio(refused, 8) is None, "plain SGLang has none"
    assert bench_table.ratio([timing("flashinfer", 8, 4.0), *refused], 8) == 4.0 / 1.5


def test_rates_follow_from_the_median() -> None:
    rate = bench_table.rate_of(timing("fa3", 1000, 2.0), flop=8 * 10**12, num_gpus=2)
    assert rate == bench_table.Rate(tokens_per_s=500.0, flop=8 * 10**12, tflop_per_s_per_gpu=2.0)
    assert bench_table.rate_of(timing("fa3", 1000, 2.0), None, 2) == bench_table.Rate(500.0, None, None)
    assert bench_table.rate_of(timing("fa3", 1000), 8, 2) is None


# floating-point operations


def test_flop_of_exact_attention_counted_by_hand() -> None:
    # A row of a layer: Q and O 2*8*8, K and V 2*8*4, the MLP 3*8*16 weights, 576 together, 2 operations each.
    # Three rows see 1 + 2 + 3 keys: 6 pairs, 4 operations for each of 4 heads times 2 numbers. Last row: 8*10 weights.
    assert bench_models.exact_flop(SHAPE, 3) == 2 * (3 * 2 * 576 + 6 * 4 * 8) + 2 * 80 == 7456


def test_flop_of_apb_counted_by_hand() -> None:
    # Two blocks of 3 tokens that see themselves only, and a question of 2 that both ranks compute: 6 + 6 pairs, and
    # 2 * 6 + 3 of the question. Rows: 3 + 2 on each rank. Of the last layer, what follows Q, K and V (128 weights) is
    # for the question alone: 2 rows on each rank, and 15 pairs.
    config = ApbConfig(block=3, anchor=0, passing=0, question_tokens=2)
    plan = layout.plan(8, config, num_ranks=2)
    first, last = 10 * 2 * 576 + 27 * 4 * 8, 10 * 2 * 128 + 4 * 2 * 448 + 15 * 4 * 8
    assert bench_models.apb_flop(SHAPE, plan) == first + last + 2 * 80 == 19168
    assert bench_models.apb_flop(SHAPE, plan, one_pass=False) == 2 * first + 2 * 80 == 24928


def test_with_everything_passed_on_apb_costs_what_exact_attention_does() -> None:
    plan = layout.plan(3000, ApbConfig(passing="all"))
    assert bench_models.apb_flop(SHAPE, plan, one_pass=False) == bench_models.exact_flop(SHAPE, 3000)


@pytest.mark.parametrize(
    ("name", "num_weights", "vocab"), [("llama-3.1-8b", 8.03e9, 128256), ("qwen3-8b", 8.19e9, 151936)]
)
def test_a_model_has_the_flop_that_its_size_says(name: str, num_weights: float, vocab: int) -> None:
    shape = DecoderShape.of(bench_models.SHAPES[name])
    assert shape is not None
    # All weights but those of one of the two embeddings are used twice each by a row.
    assert bench_models.exact_flop(shape, 1) == pytest.approx(2 * (num_weights - vocab * 4096), rel=0.001)


def test_other_families_are_not_counted() -> None:
    assert DecoderShape.of(SMALL | {"architectures": ["MixtralForCausalLM"]}) is None
    assert DecoderShape.of({}) is None


# tables


def test_the_table_is_markdown_with_lengths_as_rows_and_servers_as_columns() -> None:
    timings = [
        timing("flashinfer", 8192, 0.2104),
        timing("flashinfer", 131072, 14.87),
        timing("apb", 8192, 0.1052),
        timing("apb", 131072, reason="HTTP 400: too long"),
    ]
    assert bench_table.ttft_table(timings).splitlines() == [
        "|  tokens | flashinfer |     apb | best plain / apb |",
        "| ------: | ---------: | ------: | ---------------: |",
        "|   8,192 |    0.210 s | 0.105 s |            2.00x |",
        "| 131,072 |    14.87 s |       - |                - |",
    ]


def test_under_the_table_stands_why_there_is_no_figure_and_how_apb_prefilled() -> None:
    timings = [
        timing("fa3", 16, reason="the server ended"),
        timing("fa3", 32, reason="the server ended"),
        timing("apb", 16, 1.0),
        timing("apb", 2048, 1.0, **REPORT),
    ]
    assert bench_table.notes(timings) == [
        "fa3, 16 and 32 tokens: the server ended",
        "apb, 16 tokens: prefilled with exact attention, the prompt is below min_tokens",
        "apb, 2,048 tokens: 16 blocks, 25% of exact attention's query-key pairs",
    ]


def test_the_rates_leave_out_what_has_no_figure() -> None:
    timings = [timing("fa3", 4000, 2.0), timing("fa3", 8000, reason="HTTP 400"), timing("apb", 4000, 1.0)]
    table = bench_table.rate_table(timings, lambda t: 10**15 if t.server == "fa3" else None, num_gpus=2, unit="GPU")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert cells[0] == ["tokens", "server", "tokens/s", "TFLOP", "TFLOP/s per GPU"]
    assert cells[2:] == [["4,000", "fa3", "2,000", "1,000", "250"], ["4,000", "apb", "4,000", "-", "-"]]


CRASH = """
import sys
print("[2026-01-01 TP0] Scheduler hit an exception: Traceback (most recent call last):", file=sys.stderr)
print("  File 'model.py', line 1, in forward", file=sys.stderr)
print("torch.OutOfMemoryError: CUDA out of memory.", file=sys.stderr)
print("RuntimeError: Rank 0 scheduler died", file=sys.stderr)
sys.exit(137)
"""


def server_that_runs(script: str, log_dir: Path) -> BenchServer:
    server = BenchServer("model", port=34990, log_dir=log_dir)
    server.groups = (ProcessGroup("server", [sys.executable, "-c", script], log_dir / "server.log"),)
    return server


def test_a_server_that_crashed_says_why_in_one_line(tmp_path: Path) -> None:
    with server_that_runs(CRASH, tmp_path) as server, pytest.raises(ServiceError) as error:
        server.raise_why(requests.ConnectionError("Connection aborted"))
    assert str(error.value) == "the server ended with status 137: torch.OutOfMemoryError: CUDA out of memory."


def test_a_server_that_runs_on_without_an_answer_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_servers, "_END_GRACE_S", 0.5)
    with server_that_runs("import time; time.sleep(60)", tmp_path) as server:
        with pytest.raises(ServiceError, match="no answer: Read timed out"):
            server.raise_why(requests.ReadTimeout("Read timed out"))
        assert server.groups[0].exit_status is None


# the command as a whole


def test_prompts_are_the_same_for_every_server_and_new_for_every_repeat() -> None:
    prompt = bench_prompts.random_prompt(0, 1000, 0, 50)
    assert prompt == bench_prompts.random_prompt(0, 1000, 0, 50)
    assert len(prompt) == 1000 and set(prompt) == set(range(50))
    others = [bench_prompts.random_prompt(*key, 50) for key in ((1, 1000, 0), (0, 1000, 1), (0, 1001, 0))]
    assert all(prompt[:8] != other[:8] for other in others)


Answer = Callable[[dict[str, Any]], tuple[int, dict[str, Any]] | None]


class PretendedServers:
    """Stands in for BenchServer: `answers` maps a server's name to what it does; None closes the connection.

    A server whose name is missing does not start. `asked` has the bodies of each server's requests, in order.
    """

    def __init__(self, answers: dict[str, Answer]):
        self.answers = answers
        self.asked: dict[str, list[dict[str, Any]]] = {}
        self.running: list[str] = []

    def __call__(self, model: str, *, port: int, log_dir: Path, arguments: Any, report: Any) -> PretendedServer:
        return PretendedServer(self, log_dir.name)


def run_pretended(
    kind: str, behaviour: dict[str, Answer], options: Sequence[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, PretendedServers]:
    """`bench KIND --backends one` on a small model's configuration, which it puts into `folder`."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(SMALL))
    servers = PretendedServers(behaviour)
    monkeypatch.setattr(compared, "check_ports", lambda ports: None)
    monkeypatch.setattr(compared, "BenchServer", servers)
    command = ["bench", kind, "--model", str(folder / "model"), "--log-dir", str(folder / "logs")]
    return cli.main([*command, "--backends", "one", *options]), servers


class PretendedServer:
    def __init__(self, servers: PretendedServers, name: str):
        self.servers, self.name = servers, name

    def __enter__(self) -> PretendedServer:
        assert self.servers.running == [], "one server at a time"
        self.servers.running.append(self.name)
        asked = self.servers.asked[self.name] = []
        answer = self.servers.answers.get(self.name, lambda body: None)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
                if self.path.endswith("_profile"):
                    self.profile(body)
                    return
                assert self.path == "/generate"
                asked.append(body)
                answered = answer(body)
                if answered is None:
                    return
                self.send_response(answered[0])
                self.end_headers()
                content = json.dumps(answered[1]).encode()
                if body.get("stream"):
                    num_tokens = body["sampling_params"]["max_new_tokens"]
                    content = b"data: %s\n\n" % content * num_tokens + b"data: [DONE]\n\n"
                self.wfile.write(content)

            def profile(self, options: dict[str, Any]) -> None:
                if self.path == "/start_profile":
                    folder = Path(options["output_dir"])
                    folder.mkdir(parents=True)
                    with gzip.open(folder / "1-TP-0.trace.json.gz", "wt") as file:
                        json.dump({"traceEvents": TRACED}, file)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Silent."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def wait_ready(self) -> None:
        if self.name not in self.servers.answers:
            raise ServiceError("the server ended with status 1: ValueError: no such backend")

    def check(self) -> None:
        """It runs."""

    def raise_why(self, error: Exception) -> None:
        raise ServiceError("the server ended with status 137: out of memory") from error

    def __exit__(self, *_: Any) -> None:
        self.http.shutdown()
        self.http.server_close()
        self.servers.running.remove(self.name)


def answers(seconds: float = 0.0, longest: int = 10**6, **report: Any) -> Answer:
    def answer(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if len(body["input_ids"]) > longest:
            return 400, {"error": {"message": f"The input is longer than {longest}"}}
        time.sleep(seconds)
        return 200, {"output_ids": [1], "meta_info": {"finish_reason": {"type": "length"}, "prefill": report}}

    return answer


@pytest.fixture
def bench(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[dict[str, Answer], list[str]], tuple[int, PretendedServers]]]:
    """Runs the command with `--backends one,two` on pretended servers, on what looks like a CPU."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(SMALL))
    monkeypatch.setattr(compared, "num_gpus", lambda: 0)
    monkeypatch.setattr(bench_servers, "num_gpus", lambda: 0)
    monkeypatch.setattr(bench_plain, "num_gpus", lambda: 0)
    monkeypatch.setattr(compared, "check_ports", lambda ports: None)

    def start(behaviour: dict[str, Answer], options: list[str]) -> tuple[int, PretendedServers]:
        servers = PretendedServers(behaviour)
        monkeypatch.setattr(compared, "BenchServer", servers)
        command = ["bench", "ttft", "--model", str(tmp_path / "model"), "--log-dir", str(tmp_path / "logs")]
        status = cli.main([*command, "--backends", "one,two", *options])
        assert servers.running == [], "every server is ended"
        return status, servers

    yield start


def test_a_prefill_server_of_a_pair_is_timed_without_its_decode_server(
    bench: Callable[..., tuple[int, PretendedServers]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only APB's requests say that nobody takes their KV. One more prompt than those timed is profiled."""
    output, traces = tmp_path / "ttft.json", tmp_path / "traces"
    options = ["--lengths", "32", "--repeats", "2", "--warm-up", "0", "--prefill-only", "--output", str(output)]
    behaviour = {"one": answers(), "two": answers(), "apb": answers(**REPORT)}
    status, servers = bench(behaviour, [*options, "--trace", str(traces)])
    assert status == 0
    assert not any("bootstrap_host" in body for name in ("one", "two") for body in servers.asked[name])
    assert [body["bootstrap_host"] for body in servers.asked["apb"]] == ["2.2.2.2"] * 3
    assert servers.asked["apb"][2]["input_ids"] not in [body["input_ids"] for body in servers.asked["apb"][:2]]
    result = json.loads(output.read_text())
    assert result["settings"]["prefill_only"] is True
    assert result["servers"]["apb"][-2:] == ["--disaggregation-bootstrap-port", "30208"], "after three servers' ports"
    assert len(next(timing for timing in result["timings"] if timing["server"] == "apb")["seconds"]) == 2
    printed = capsys.readouterr().out
    assert "| whole prefill" in printed and "7.0" in printed and (traces / "32").is_dir()


def test_bench_times_every_server_with_the_same_prompts(
    bench: Callable[..., tuple[int, PretendedServers]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results" / "ttft.json"
    options = ["--lengths", "64,32", "--repeats", "3", "--warm-up", "1", "--output", str(output), "--", "--dtype", "x"]
    behaviour = {"one": answers(0.2), "two": answers(0.1), "apb": answers(0.02, **REPORT)}
    status, servers = bench(behaviour, options)
    assert status == 0
    one, two, apb = (servers.asked[name] for name in ("one", "two", "apb"))
    assert one == two == apb
    assert [len(body["input_ids"]) for body in one] == [32] * 4 + [64] * 4
    assert len({tuple(body["input_ids"]) for body in one}) == 8
    assert one[0]["sampling_params"] == {"max_new_tokens": 1, "ignore_eos": True, "temperature": 0}

    printed = capsys.readouterr().out
    assert "| tokens |" in printed and "best plain / apb" in printed and "TFLOP/s per rank" in printed
    assert "apb, 64 tokens: 16 blocks, 25% of exact attention's query-key pairs" in printed
    result = json.loads(output.read_text())
    assert result["model"] == "model" and result["machine"]["sglang"] and result["date"]
    assert result["settings"]["lengths"] == [32, 64] and result["settings"]["seed"] == 0
    assert result["servers"]["two"][-2:] == ["--dtype", "x"]
    assert len(result["timings"]) == 6
    for row in result["timings"]:
        assert len(row["seconds"]) == 3 and len(row["warm_up_seconds"]) == 1
        assert row["median_s"] == sorted(row["seconds"])[1]
        assert row["rate"]["tokens_per_s"] == pytest.approx(row["length"] / row["median_s"])
        assert (row["prefill"] == REPORT) == (row["server"] == "apb")
    for row in result["results"]:
        assert row["best_plain_over_apb"] == row["median_s"]["two"] / row["median_s"]["apb"] > 1


def test_what_a_server_refuses_is_a_dash_with_the_reason(
    bench: Callable[..., tuple[int, PretendedServers]], capsys: pytest.CaptureFixture[str]
) -> None:
    def dies(body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        return answers()(body) if len(body["input_ids"]) < 40 else None

    options = ["--lengths", "32,48,64", "--repeats", "2"]
    status, servers = bench({"one": dies, "apb": answers(longest=50, **REPORT)}, options)
    assert status == 0
    assert [len(body["input_ids"]) for body in servers.asked["one"]] == [32] * 3 + [48], "a dead server is left"
    assert [len(body["input_ids"]) for body in servers.asked["apb"]] == [32] * 3 + [48] * 3 + [64]
    lines = capsys.readouterr().out.strip().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert [[cell == "-" for cell in row] for row in cells] == [
        [False, False, True, False, False],
        [False, True, True, False, True],
        [False, True, True, True, True],
    ]
    assert "- one, 48 and 64 tokens: the server ended with status 137: out of memory" in lines
    assert "- two, 32 and 48 and 64 tokens: the server ended with status 1: ValueError: no such backend" in lines
    assert "- apb, 64 tokens: HTTP 400: The input is longer than 50" in lines


def test_an_aborted_request_is_refused_too() -> None:
    response = requests.Response()
    response.status_code = 200
    response._content = b'{"meta_info": {"finish_reason": {"type": "abort", "message": "no room"}}}'
    assert bench_prompts._refusal(response) == "aborted: no room"


def test_a_run_without_any_figure_fails(
    bench: Callable[..., tuple[int, PretendedServers]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench({}, ["--lengths", "32"])[0] == 1
    assert "no server gave a figure" in capsys.readouterr().err


def test_an_interrupt_keeps_what_is_measured_and_ends_the_server(
    bench: Callable[..., tuple[int, PretendedServers]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = bench_prompts.time_prompts

    def interrupted(url: str, timing: Timing, *rest: Any) -> None:
        if timing.server == "two":
            raise KeyboardInterrupt
        measure(url, timing, *rest)

    monkeypatch.setattr(bench_prompts, "time_prompts", interrupted)
    output = tmp_path / "ttft.json"
    options = ["--lengths", "32", "--repeats", "1", "--output", str(output)]
    status, servers = bench({"one": answers(), "two": answers(), "apb": answers()}, options)
    assert status == 130 and "apb" not in servers.asked
    assert [row["server"] for row in json.loads(output.read_text())["timings"]] == ["one"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prefill-backend-config", '{"bloc": 3}'], "unknown option 'bloc'"),
        (["--plot", "picture.txt"], "must end in one of .png"),
        (["--warm-up", "-1"], "--warm-up must be at least 0"),
        (["--gpus", "2", "--backends", "fa3-cp"], "--backends fa3-cp needs two GPUs or more"),
    ],
)
def test_what_cannot_work_is_refused_before_a_server_starts(
    options: list[str],
    message: str,
    bench: Callable[..., tuple[int, PretendedServers]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, servers = bench({}, options)
    assert status == 1 and servers.asked == {}
    assert message in capsys.readouterr().err


def test_more_gpus_than_there_are_are_refused(
    bench: Callable[..., tuple[int, PretendedServers]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compared, "num_gpus", lambda: 2)
    assert bench({}, ["--gpus", "4"])[0] == 1
    assert "--gpus 4: this machine has 2" in capsys.readouterr().err


@pytest.mark.parametrize("lengths", ["0", "8,x", ""])
def test_bad_lengths_are_refused(lengths: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["bench", "ttft", "--model", "m", "--lengths", lengths])
    assert error.value.code == 2 and "--lengths" in capsys.readouterr().err


@pytest.mark.parametrize("name", bench_models.SHAPES)
def test_a_shape_is_a_folder_with_a_config_and_nothing_else(name: str) -> None:
    with bench_models.shape_folder(name) as folder:
        assert [path.name for path in Path(folder).iterdir()] == ["config.json"]
        assert bench_models.read_config(folder) == bench_models.SHAPES[name]
    assert not Path(folder).exists()


def test_a_model_without_a_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CommandError, match=r"has no config.json that can be read"):
        bench_models.read_config(str(tmp_path))


# the picture


def test_the_picture_is_drawn_with_what_there_is(tmp_path: Path) -> None:
    timings = [
        timing("fa3", 1024, 1.0, 1.1),
        timing("fa3", 2048, reason="HTTP 400"),
        timing("apb", 1024, 0.5),
        timing("triton", 1024, reason="the server ended"),
    ]
    path = tmp_path / "pictures" / "ttft.png"
    bench_plot.check(path)
    bench_plot.write(path, timings, "a model")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_plot, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match="--plot needs matplotlib: pip install matplotlib"):
        bench_plot.check(Path("ttft.png"))
