"""What Prometheus is told, under the names that vLLM gives it, with our own prefix."""

from __future__ import annotations

from time import perf_counter

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from coral.decoding.state import Cycle
from coral.serving.worker import Status

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
_LABELS = ("model_name", "engine")


class Metrics:
    """All series of one server, whose model is called `name`."""

    def __init__(self, name: str) -> None:
        self.registry, self._name = CollectorRegistry(), name
        self._running = self._gauge("num_requests_running", "Texts that are read or written.")
        self._waiting = self._gauge("num_requests_waiting", "Texts that wait for a place.")
        self._used = self._gauge("kv_cache_usage_perc", "Share of the memory for keys and values; 1 is all.")
        self._queries = self._gauge("prefix_cache_queries_total", "Tokens of prompts that were looked up.")
        self._hits = self._gauge("prefix_cache_hits_total", "Of those, tokens copied from another text.")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._written = self._counter("generation_tokens", "Tokens written.")
        self._drafts = self._counter("spec_decode_num_drafts", "Cycles that drafted.")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Draft tokens.")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft tokens that were accepted.")
        self._places = Counter(
            "coral:spec_decode_num_accepted_tokens_per_pos",
            "Draft tokens accepted at each depth below the root.",
            (*_LABELS, "position"),
            registry=self.registry,
        )
        self._ended = Counter(
            "coral:request_success",
            "Texts that ended.",
            (*_LABELS, "finished_reason"),
            registry=self.registry,
        )
        self._first = self._histogram("time_to_first_token_seconds", "From request to first token.")
        self._between = self._histogram("inter_token_latency_seconds", "Between tokens; a cycle's share.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From request to end.")
        self._prompts = self._histogram("request_prompt_tokens", "Tokens of a prompt.", _COUNTS)
        self._answers = self._histogram("request_generation_tokens", "Tokens of a text.", _COUNTS)

    def _gauge(self, name: str, what: str) -> Gauge:
        return Gauge(f"coral:{name}", what, _LABELS, registry=self.registry).labels(self._name, "0")

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(f"coral:{name}", what, _LABELS, registry=self.registry).labels(self._name, "0")

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        found = Histogram(f"coral:{name}", what, _LABELS, buckets=buckets, registry=self.registry)
        return found.labels(self._name, "0")

    def exposition(self, status: Status) -> bytes:
        """All series as text, the gauges as the engine was after its last step."""
        self._running.set(status.running)
        self._waiting.set(status.waiting)
        self._used.set(status.used)
        self._queries.set(status.prompt_tokens)
        self._hits.set(status.reused_tokens)
        return generate_latest(self.registry)


class Clock:
    """Tells the metrics of one text, whose request came when this was made."""

    def __init__(self, metrics: Metrics, prompt_tokens: int) -> None:
        self.metrics, self.begin, self.last, self.tokens = metrics, perf_counter(), 0.0, 0
        metrics._prompt.inc(prompt_tokens)
        metrics._prompts.observe(prompt_tokens)

    def cycle(self, cycle: Cycle, finish: str) -> None:
        """Note a cycle, with which the text ended if `finish` says why."""
        metrics, now, count = self.metrics, perf_counter(), len(cycle.tokens)
        if self.tokens == 0:
            metrics._first.observe(now - self.begin)
        else:
            for _ in range(count):
                metrics._between.observe((now - self.last) / count)
        self.last, self.tokens = now, self.tokens + count
        metrics._written.inc(count)
        if cycle.num_drafted:
            metrics._drafts.inc()
            metrics._drafted.inc(cycle.num_drafted)
            metrics._accepted.inc(cycle.num_accepted)
            for place in range(cycle.num_accepted):
                metrics._places.labels(metrics._name, "0", str(place)).inc()
        if finish:
            metrics._ended.labels(metrics._name, "0", finish).inc()
            metrics._answers.observe(self.tokens)
            metrics._whole.observe(now - self.begin)
