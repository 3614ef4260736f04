"""docs/metrics.md's table, row by row, read by Prometheus' own parser; and what the log says."""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.api_client import Client, ok
from server.test_api import COMPLETIONS

import octavo
from octavo.config import EngineConfig
from octavo.frontend.outputs import Delta
from octavo.messages import EngineInfo, EngineStats, SamplingParams, StructuredOutput
from octavo.server import log_lines
from octavo.server.engine_metrics import EngineMetrics
from octavo.server.log_lines import LineWriter, RequestLines, throughput_lines
from octavo.server.metrics import Metrics
from octavo.server.settings import cache_config

PAGE = Path(octavo.__file__).parents[1] / "docs/metrics.md"
ROWS = dict(re.findall(r"^\| `((?:vllm:|octavo:|http_)\w+)` \| (\w+) \|", PAGE.read_text(), re.MULTILINE))
INFO = EngineInfo(1024, 4096, 64, 16, "llama")


def read(metrics: Metrics) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(asyncio.run(metrics.text()).decode())}


def values(family: Any, name: str, **labels: str) -> list[float]:
    """Of a family's samples that have these labels."""
    return [s.value for s in family.samples if s.name == name and labels.items() <= s.labels.items()]


def busy() -> Metrics:
    """Two engines. The second has answered a request for two sequences, of which one was preempted, and failed at another."""
    metrics = Metrics("m", 2, cache_config(EngineConfig(), INFO), [("mlp", "ptpc_fp8", 100), ("norms", "bf16", 5)])
    watch = metrics.watch("a", 10, 2, 1, max_tokens=50)
    metrics.on_step(EngineStats(3, 4, 0.5, 11, 10, 6, 1, ["a-0"], num_deferred=2, image_queries=5, image_hits=3), 1)
    watch.saw(Delta(0, "x", [1], num_cached_tokens=6))
    watch.saw(Delta(1, "x", [1], None, "stop", num_cached_tokens=6))
    watch.saw(Delta(0, "y", [1]))
    watch.saw(Delta(0, "z", [2, 3], None, "length", num_preemptions=1))
    watch.close()
    failing = metrics.watch("b", 5, 1, 1)
    failing.failed()
    failing.close()
    metrics.answered("POST", "/v1/completions", 503, 0.2)
    return metrics


def test_every_row_of_the_table_is_exported_and_nothing_else() -> None:
    families = read(busy())
    ours = {name: family.type for name, family in families.items() if name.startswith(("vllm:", "octavo:", "http_"))}
    assert ours == ROWS
    assert len(ROWS) > 35
    for name in ("process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds", "python_gc_collections"):
        assert families[name].samples, name


def test_every_series_has_an_engine_of_its_own() -> None:
    for name, family in read(busy()).items():
        if name.startswith("vllm:"):
            assert {sample.labels["engine"] for sample in family.samples} == {"0", "1"}, name
            if name != "vllm:cache_config_info":
                assert {sample.labels["model_name"] for sample in family.samples} == {"m"}, name


# What the dashboard of vLLM's examples/observability/prometheus_grafana reads.
PUBLISHED = """e2e_request_latency_seconds_bucket e2e_request_latency_seconds_sum e2e_request_latency_seconds_count
prompt_tokens_total generation_tokens_total inter_token_latency_seconds_bucket inter_token_latency_seconds_sum
num_requests_running num_requests_waiting time_to_first_token_seconds_bucket time_to_first_token_seconds_count
kv_cache_usage_perc request_prompt_tokens_bucket request_generation_tokens_bucket request_success_total
request_queue_time_seconds_sum request_prefill_time_seconds_sum request_decode_time_seconds_sum
request_max_num_generation_tokens_sum"""


def test_dashboards_find_what_they_read() -> None:
    families = read(busy()).values()
    there = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    asked = [f"vllm:{name}" for name in PUBLISHED.split()]
    assert not [name for name in asked if "model_name" not in there.get(name, ())]
    text = (PAGE.parents[1] / "deploy/grafana/dashboards/octavo.json").read_text()
    expressions = [target["expr"] for panel in json.loads(text)["panels"] for target in panel["targets"]]
    named = {name for expression in expressions for name in re.findall(r"(?:vllm:|octavo:|http_|process_)\w+", expression)}
    assert len(named) > 15
    assert not named - set(there)
    legends = re.findall(r"\{\{(\w+)\}\}", text)
    assert set(legends) <= set().union(*there.values())


def test_what_is_counted() -> None:
    families = read(busy())
    expected = {
        "num_requests_waiting": 6,
        "gpu_cache_usage_perc": 0.5,
        "prefix_cache_queries_total": 10,
        "gpu_prefix_cache_hits_total": 6,
        "mm_cache_queries_total": 5,
        "mm_cache_hits_total": 3,
        "num_preemptions_total": 1,
        "prompt_tokens_total": 10,
        "prompt_tokens_cached_total": 6,
        "generation_tokens_total": 5,
        "inter_token_latency_seconds_count": 2,
        "time_per_output_token_seconds_count": 2,
        "request_time_per_output_token_seconds_count": 1,
        "request_inference_time_seconds_count": 1,
        "request_prefill_kv_computed_tokens_sum": 4,
        "request_generation_tokens_sum": 5,
        "request_max_num_generation_tokens_sum": 4,
        "request_params_n_sum": 2,
        "request_params_max_tokens_sum": 50,
        "request_num_preemptions_sum": 1,
    }
    for name, value in expected.items():
        family = families[f"vllm:{re.sub('_(total|sum|count)$', '', name)}"]
        assert values(family, f"vllm:{name}", engine="1") == [value], name
        assert values(family, f"vllm:{name}", engine="0") == [0], name
    waiting = families["vllm:num_requests_waiting_by_reason"]
    for reason, value in (("capacity", 4), ("deferred", 2)):
        assert values(waiting, waiting.name, engine="1", reason=reason) == [value]
    for reason, value in (("stop", 1), ("length", 1), ("abort", 0), ("error", 1)):
        assert values(families["vllm:request_success"], "vllm:request_success_total", engine="1", finished_reason=reason) == [
            value
        ]
    info = families["vllm:cache_config_info"].samples[0].labels
    assert (info["block_size"], info["num_gpu_blocks"], info["cache_dtype"]) == ("16", "64", "auto")
    labels = {"method": "POST", "handler": "/v1/completions", "status": "5xx"}
    assert values(families["http_requests"], "http_requests_total", **labels) == [1]


def test_old_names_have_the_buckets_of_the_new_ones() -> None:
    families = read(busy())
    old, new = (families[f"vllm:{name}"] for name in ("time_per_output_token_seconds", "inter_token_latency_seconds"))
    assert len(old.samples) > 40
    assert [
        (s.name.replace("time_per_output_token_seconds", "inter_token_latency_seconds"), s.labels, s.value) for s in old.samples
    ] == [(s.name, s.labels, s.value) for s in new.samples]


def test_sleep_is_a_state() -> None:
    metrics = Metrics("m")
    metrics.sleeps(2)
    family = read(metrics)["vllm:engine_sleep_state"]
    assert {s.labels["sleep_state"]: s.value for s in family.samples} == {
        "awake": 0, "weights_offloaded": 0, "discard_all": 1,
    }  # fmt: skip


def test_http_requests_are_counted_by_route(client: Client) -> None:
    """Paths that nobody serves are one series, whatever their number."""
    client.complete(max_tokens=1)
    client.post(COMPLETIONS, {"prompt": []})
    for n in range(3):
        client.get(f"/nowhere/{n}")
    client.get("/v1/models/demo")
    client.api_keys.append("secret")
    client.post(COMPLETIONS, {"prompt": "a"})
    found = {(s.labels["handler"], s.labels["status"]): s.value for s in read(client.served.metrics)["http_requests"].samples}
    assert found == {
        (COMPLETIONS, "2xx"): 1,
        (COMPLETIONS, "4xx"): 2,
        ("none", "4xx"): 3,
        ("/v1/models/{name:path}", "2xx"): 1,
    }


def test_load_counts_other_requests(client: Client) -> None:
    client.served.gate.running = 4
    assert ok(client.get("/load")) == {"server_load": 4}


class Lines(LineWriter):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, line: str) -> None:
        self.lines.append(line)


def test_a_line_tells_the_throughput_while_there_is_work() -> None:
    async def main() -> list[str]:
        metrics, writer = Metrics("m", 2), Lines()
        task = asyncio.ensure_future(throughput_lines(metrics, writer, 0.1))
        await asyncio.sleep(0.15)
        assert not writer.lines, "an idle server says nothing"
        watch = metrics.watch("a", 100, 1, 1)
        metrics.on_step(EngineStats(2, 3, 0.25, 100, 100, 50, 0, ["a"]), 1)
        watch.saw(Delta(0, "x", [1, 2], None, "stop"))
        watch.close()
        await asyncio.sleep(0.1)
        metrics.on_step(EngineStats(), 1)
        await asyncio.sleep(0.25)
        task.cancel()
        return writer.lines

    (line,) = asyncio.run(main())
    assert re.fullmatch(
        r"octavo: Engine 001: Avg prompt throughput: [\d.]+ tokens/s, Avg generation throughput: [\d.]+ tokens/s, "
        r"Running: 2 reqs, Waiting: 3 reqs, GPU KV cache usage: 25\.0%, Prefix cache hit rate: 50\.0%",
        line,
    )


def test_a_request_has_a_line_without_its_text(client: Client) -> None:
    writer = Lines()
    for most in (0, 6):
        client.served.log_request = RequestLines(writer, client.engine.tokenizer, most).write
        client.complete(prompt="def f\nsecret", temperature=0.5, stop=["END"], n=2, max_tokens=2)
    plain, with_text = writer.lines
    assert re.match(
        r"octavo: request cmpl-\w+-0: \d+ prompt tokens \(3 cached\), \d+ generated, (stop|length)\+(stop|length), ", plain
    )
    for part in ("temperature=0.5", "n=2", "max_tokens=2", "stop=('END',)"):
        assert part in plain
    assert "def" not in plain
    assert with_text.endswith(', prompt "def f\\n"')
    assert "secret" not in with_text


def test_a_prompt_in_the_log_neither_ends_its_line_nor_steers_a_terminal(client: Client) -> None:
    writer = Lines()
    client.served.log_request = RequestLines(writer, client.engine.tokenizer, 60).write
    client.complete(prompt='é "\x1b[31m\n\u0085\u2028\x9b31m\u202e\x7f', max_tokens=1)
    (line,) = writer.lines
    assert line.endswith(r', prompt "é \"\u001b[31m\n\u0085\u2028\u009b31m\u202e\u007f"')


def test_tokens_are_counted_by_the_event_loop_alone(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that did it, too, could count some twice; then fewer would come, by which no counter goes back."""
    threads: list[threading.Thread] = []
    count = EngineMetrics.count_generated

    def counted(self: EngineMetrics) -> None:
        threads.append(threading.current_thread())
        count(self)

    monkeypatch.setattr(EngineMetrics, "count_generated", counted)
    assert "vllm:generation_tokens_total" in client.get("/metrics").text
    assert set(threads) == {threading.current_thread()}


def test_a_grammar_is_named_and_long_values_are_cut() -> None:
    metrics, writer = Metrics("m"), Lines()
    watch = metrics.watch("a", 1, 1)
    watch.close()
    params = SamplingParams(structured=StructuredOutput("regex", "private" * 99), stop=["y" * 999])
    RequestLines(writer, None, 3).write("a", watch, params, [5, 6, 7, 8])
    assert "structured=regex" in writer.lines[0]
    assert len(writer.lines[0]) < 500
    assert ", abort, " in writer.lines[0]
    assert writer.lines[0].endswith(", prompt [5, 6, 7]")


def test_a_reader_that_stands_still_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines are dropped then, and their number is said."""
    goes_on, said = threading.Event(), []

    def say(line: str) -> None:
        goes_on.wait(10)
        said.append(line)

    monkeypatch.setattr(log_lines, "say", say)
    monkeypatch.setattr(log_lines, "MOST_LINES", 5)
    writer = LineWriter()
    began = time.perf_counter()
    for n in range(50):
        writer.write(str(n))
    assert time.perf_counter() - began < 1
    goes_on.set()
    deadline = time.monotonic() + 10
    while "dropped" not in "".join(said):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert said[0] == "0"
    assert any(re.fullmatch(r"octavo: 4[45] lines of the log were dropped, .*", line) for line in said)
