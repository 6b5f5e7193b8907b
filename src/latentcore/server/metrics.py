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
from latentcore.engine.outputs import RequestOutput, StepOutputs

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5)
_LONG = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560)
_STEP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
_CHOICES = (1, 2, 5, 10, 20)

ENGINE = "0"
"""The label `engine`, which tells vLLM's engines apart; here there is one."""


class Metrics:
    """The metrics of one engine. `on_step` runs on the engine's thread, the rest anywhere."""

    def __init__(self, engine: AsyncEngine, model_name: str, read_bandwidth: float | None) -> None:
        """`read_bandwidth`: what this machine reads, bytes a second, or None if not measured."""
        self._engine = engine
        self._registry = CollectorRegistry()
        self._read_bandwidth = read_bandwidth
        self._lock = threading.Lock()
        self._last_token: dict[str, float] = {}
        labels = {"model_name": model_name, "engine": ENGINE}

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            metric = Histogram(
                f"latentcore:{name}", text, labels, buckets=buckets, registry=self._registry
            )
            return metric.labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"latentcore:{name}", text, labels, registry=self._registry).labels(
                **labels
            )

        lengths = _lengths(engine.preparer.limits.max_model_len)
        self._ttft = histogram("time_to_first_token_seconds", "Time to first token.", _LONG)
        self._itl = histogram("inter_token_latency_seconds", "Time between tokens.", _SHORT)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time a token after the first.", _SHORT
        )
        self._e2e = histogram("e2e_request_latency_seconds", "Time of a whole request.", _LONG)
        self._queue = histogram("request_queue_time_seconds", "Time spent waiting.", _LONG)
        self._inference = histogram(
            "request_inference_time_seconds", "Time from being scheduled to the end.", _LONG
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "Time from being scheduled to the first token.", _LONG
        )
        self._decode = histogram(
            "request_decode_time_seconds", "Time from the first token to the last.", _LONG
        )
        self._request_prompt = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", lengths
        )
        self._request_generation = histogram(
            "request_generation_tokens", "Tokens generated for a request.", lengths
        )
        self._request_longest = histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest choice.", lengths
        )
        self._params_n = histogram("request_params_n", "Choices asked for.", _CHOICES)
        self._params_max_tokens = histogram(
            "request_params_max_tokens", "Longest answer allowed, in tokens.", lengths
        )
        self._iteration = histogram(
            "iteration_tokens_total", "Tokens of prompts and generated ones in a step.", _STEP
        )
        self._step = histogram("step_time_seconds", "Time of an engine step.", _SHORT)
        self._model = histogram("model_time_seconds", "Time of a step in the model.", _SHORT)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens read.")
        self._generated = counter("generation_tokens", "Tokens generated.")
        success = Counter(
            "latentcore:request_success",
            "Requests that ended, by the reason.",
            [*labels, "finished_reason"],
            registry=self._registry,
        )
        # There from the start, at 0, so that rates and dashboards have something to show.
        self._ended = {
            reason: success.labels(**labels, finished_reason=reason)
            for reason in ("stop", "length", "abort", "error")
        }
        self._failed = counter("request_failure", "Requests lost to a failed step.")
        self._share = Gauge(
            "latentcore:read_bandwidth_share",
            "Weight bytes read a second in the last pure decode step, as a share of the measured.",
            labels,
            registry=self._registry,
        ).labels(**labels)
        self._registry.register(_EngineCollector(engine, labels))
        engine.observe(self.on_step)

    def on_step(self, stats: StepStats, step: StepOutputs) -> None:
        """Takes note of one engine step."""
        now = time.monotonic()
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._generated.inc(stats.generated_tokens)
        self._failed.inc(len(step.failures))
        self._ended["error"].inc(len(step.failures))
        self._ended["abort"].inc(len(step.aborted))
        if stats.num_sequences:
            self._step.observe(stats.step_time)
            self._model.observe(stats.model_time)
            self._iteration.observe(stats.prompt_tokens + stats.generated_tokens)
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
            for choice in output.outputs:
                if choice.finish_reason is not None:
                    self._ended[choice.finish_reason].inc()
            if output.finished:
                self._last_token.pop(output.request_id, None)
                self._note_end(output, now)
            else:
                self._last_token[output.request_id] = now
        for request_id in (*step.failures, *step.aborted):
            self._last_token.pop(request_id, None)

    def _note_end(self, output: RequestOutput, now: float) -> None:
        metrics = output.metrics
        self._e2e.observe(now - metrics.arrival_time)
        self._request_prompt.observe(len(output.prompt_token_ids))
        self._request_generation.observe(metrics.num_generation_tokens)
        self._request_longest.observe(metrics.max_num_generation_tokens)
        self._params_n.observe(output.n)
        self._params_max_tokens.observe(output.max_tokens)
        scheduled, first = metrics.first_scheduled_time, metrics.first_token_time
        if scheduled is not None:
            self._inference.observe(now - scheduled)
            if first is not None:
                self._prefill.observe(first - scheduled)
                self._decode.observe(now - first)
                if metrics.max_num_generation_tokens > 1:
                    self._tpot.observe((now - first) / (metrics.max_num_generation_tokens - 1))

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)


def _lengths(longest: int) -> tuple[float, ...]:
    """Bounds 1, 2, 5, 10, ... up to the longest request, in tokens."""
    bounds = [digit * 10**power for power in range(8) for digit in (1, 2, 5)]
    return tuple(float(bound) for bound in bounds if bound <= longest)


class _EngineCollector(Collector):
    """The engine's present state, read when it is asked for."""

    def __init__(self, engine: AsyncEngine, labels: dict[str, str]) -> None:
        self._engine = engine
        self._labels = labels

    def collect(self) -> Iterator[Metric]:
        snapshot = self._engine.snapshot()
        gauges = (
            ("num_requests_running", "Requests being computed.", snapshot.num_running),
            ("num_requests_waiting", "Requests waiting.", snapshot.num_waiting),
            ("kv_cache_usage_perc", "Share of the latent cache held.", snapshot.cache_usage),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(f"latentcore:{name}", text, labels=[*self._labels])
            gauge.add_metric([*self._labels.values()], value)
            yield gauge
        counters = (
            ("prefix_cache_queries", "Prompt tokens looked up.", snapshot.prefix_queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found cached.", snapshot.prefix_hit_tokens),
            ("num_preemptions", "Sequences pre-empted.", snapshot.num_preemptions),
        )
        for name, text, value in counters:
            counter = CounterMetricFamily(f"latentcore:{name}", text, labels=[*self._labels])
            counter.add_metric([*self._labels.values()], value)
            yield counter
        cache = self._engine.loaded.runner
        info = GaugeMetricFamily(
            "latentcore:cache_config_info",
            "The latent cache's size.",
            labels=[*self._labels, "block_size", "num_gpu_blocks"],
        )
        sizes = [str(cache.block_size), str(cache.num_blocks)]
        info.add_metric([*self._labels.values(), *sizes], 1)
        yield info
