"""Prometheus metrics. Names and labels are vLLM's where the same thing exists there."""

import threading
import time
from collections.abc import Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from latentcore.engine.async_engine import AsyncEngine
from latentcore.engine.engine import StepStats
from latentcore.engine.outputs import StepOutputs

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)


class Metrics:
    """The metrics of one engine. `on_step` runs on the engine's thread, the rest anywhere."""

    def __init__(self, engine: AsyncEngine, model_name: str, read_bandwidth: float | None) -> None:
        """`read_bandwidth`: what this machine reads, bytes a second, or None if not measured."""
        self._engine = engine
        self._registry = CollectorRegistry()
        self._read_bandwidth = read_bandwidth
        self._lock = threading.Lock()
        self._last_token: dict[str, float] = {}
        labels = {"model_name": model_name}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(
                f"latentcore:{name}", text, labels, buckets=buckets, registry=self._registry
            )
            return metric.labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"latentcore:{name}", text, labels, registry=self._registry).labels(
                **labels
            )

        self._ttft = histogram("time_to_first_token_seconds", "Time to first token.", _LONG)
        self._itl = histogram("inter_token_latency_seconds", "Time between tokens.", _SHORT)
        self._e2e = histogram("e2e_request_latency_seconds", "Time of a whole request.", _LONG)
        self._queue = histogram("request_queue_time_seconds", "Time spent waiting.", _LONG)
        self._step = histogram("step_time_seconds", "Time of an engine step.", _SHORT)
        self._model = histogram("model_time_seconds", "Time of a step in the model.", _SHORT)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens read.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        self._success = Counter(
            "latentcore:request_success",
            "Requests finished.",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        # There from the start, at 0, so that rates and dashboards have something to show.
        for reason in ("stop", "length", "abort"):
            self._success.labels(**labels, finished_reason=reason)
        self._failed = counter("request_failure", "Requests lost to a failed step.")
        self._share = Gauge(
            "latentcore:read_bandwidth_share",
            "Weight bytes read a second in the last pure decode step, as a share of the measured.",
            labels,
            registry=self._registry,
        ).labels(**labels)
        self._labels = labels
        self._registry.register(_EngineCollector(engine, model_name))
        engine.observe(self.on_step)

    def on_step(self, stats: StepStats, step: StepOutputs) -> None:
        """Takes note of one engine step."""
        now = time.monotonic()
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generated.inc(stats.generated_tokens)
        self._failed.inc(len(step.failures))
        if stats.num_sequences:
            self._step.observe(stats.step_time)
            self._model.observe(stats.model_time)
        if stats.pure_decode and self._read_bandwidth and stats.model_time > 0:
            batch = stats.num_sequences
            read = self._engine.loaded.runner.weight_bytes_per_token(batch) * batch
            self._share.set(read / stats.model_time / self._read_bandwidth)
        for output in step.outputs:
            metrics = output.metrics
            last = self._last_token.get(output.request_id)
            if last is not None:
                self._itl.observe(now - last)
            elif metrics.time_to_first_token is not None:
                self._ttft.observe(metrics.time_to_first_token)
                if metrics.first_scheduled_time is not None:
                    self._queue.observe(metrics.first_scheduled_time - metrics.arrival_time)
            if not output.finished:
                self._last_token[output.request_id] = now
                continue
            self._last_token.pop(output.request_id, None)
            self._e2e.observe(now - metrics.arrival_time)
            for choice in output.outputs:
                if choice.finish_reason is not None:
                    self._success.labels(
                        model_name=self._labels["model_name"],
                        finished_reason=choice.finish_reason,
                    ).inc()
        for request_id in (*step.failures, *step.aborted):
            self._last_token.pop(request_id, None)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's present state, read when it is asked for."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        snapshot = self._engine.snapshot()
        gauges = (
            ("num_requests_running", "Requests being computed.", snapshot.num_running),
            ("num_requests_waiting", "Requests waiting.", snapshot.num_waiting),
            ("kv_cache_usage_perc", "Share of the latent cache held.", snapshot.cache_usage),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"latentcore:{name}", text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        counters = (
            ("prefix_cache_queries", "Prompt tokens looked up.", snapshot.prefix_queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found cached.", snapshot.prefix_hit_tokens),
            ("num_preemptions", "Sequences pre-empted.", snapshot.num_preemptions),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(f"latentcore:{name}", text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
