"""What a gateway replica counts, for Prometheus.

A scrape reaches one replica of several, another one the next time. So every figure says which replica's it is: a
counter that seemed to jump between two of them would give rates that never were.
"""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_STAGE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5)
_MAX_VERSIONS = 8


class GatewayMetrics:
    """Counters of one gateway replica. Stages are timed in the ranker and travel back with its answers."""

    def __init__(self, replica: str) -> None:
        held = CollectorRegistry()
        self.registry = CollectorRegistry()
        self.registry.register(_OfReplica(held, replica))
        Gauge("tailrace_gateway_info", "1: the replica that answered", registry=held).set(1)
        self.requests = Counter("tailrace_http_requests", "HTTP requests", ["route", "status"], registry=held)
        self.latency = Histogram(
            "tailrace_http_request_seconds", "HTTP latency", ["route"], buckets=_SECONDS, registry=held
        )
        self.running = Gauge("tailrace_gateway_running", "requests being answered", registry=held)
        self.waiting = Gauge("tailrace_gateway_waiting", "requests waiting for a place", registry=held)
        self.answers = Counter("tailrace_recommendations", "answers by rung", ["degraded"], registry=held)
        self.impressions = Counter("tailrace_impressions", "impressions by outcome", ["outcome"], registry=held)
        self.events = Counter("tailrace_events", "posted events by verdict", ["verdict"], registry=held)
        self.stages = Histogram(
            "tailrace_ranker_stage_seconds", "ranker stages", ["stage"], buckets=_STAGE_SECONDS, registry=held
        )
        self.ranker_waiting = Gauge(
            "tailrace_ranker_waiting", "jobs in the queues of the ranker replica last heard of", registry=held
        )
        self.model = Gauge("tailrace_model_info", "1 for the version of the last answer", ["version"], registry=held)
        self.version_answers = Counter(
            "tailrace_version_answers", "answers by model version and rung", ["version", "degraded"], registry=held
        )
        self.version_score = Histogram(
            "tailrace_version_score_seconds",
            "time to score by model version",
            ["version"],
            buckets=_STAGE_SECONDS,
            registry=held,
        )
        self._rungs: dict[str, set[str]] = {}  # of each version counted apart, longest unheard of first
        self._timed: set[str] = set()
        self._version = ""
        for outcome in ("produced", "dropped"):
            self.impressions.labels(outcome)

    def note_model(self, version: str, degraded: str, score_ms: float | None) -> None:
        """Counts an answer for the model that gave it, and notes that it was the last. Old versions are forgotten."""
        self.version_answers.labels(version, degraded).inc()
        if score_ms is not None and degraded in ("none", "no_profile"):  # the prior alone is no time to score
            self.version_score.labels(version).observe(score_ms / 1000)
            self._timed.add(version)
        self._rungs[version] = self._rungs.pop(version, set()) | {degraded}
        if len(self._rungs) > _MAX_VERSIONS:
            forgotten = next(iter(self._rungs))
            for rung in self._rungs.pop(forgotten):
                self.version_answers.remove(forgotten, rung)
            if forgotten in self._timed:
                self._timed.remove(forgotten)
                self.version_score.remove(forgotten)
        if version != self._version:
            self.model.clear()
            self.model.labels(version).set(1)
            self._version = version

    def render(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self.registry)


class _OfReplica(Collector):
    """What a registry holds, with the replica's name on every sample."""

    def __init__(self, held: CollectorRegistry, replica: str) -> None:
        self._held, self._replica = held, replica

    def collect(self) -> Iterable[Metric]:
        """Yields the registry's metrics."""
        for metric in self._held.collect():
            metric.samples = [one._replace(labels={**one.labels, "replica": self._replica}) for one in metric.samples]
            yield metric
