"""What a gateway replica counts, for Prometheus. Each replica has its own registry and says which replica it is."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_STAGE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5)


class GatewayMetrics:
    """Counters of one gateway replica. Stages are timed in the ranker and travel back with its answers."""

    def __init__(self, replica: str) -> None:
        self.registry = held = CollectorRegistry()
        info = Gauge("tailrace_gateway_info", "1, labelled with the replica that answered", ["replica"], registry=held)
        info.labels(replica).set(1)
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
        self._version = ""
        for outcome in ("produced", "dropped"):
            self.impressions.labels(outcome)

    def note_model(self, version: str) -> None:
        """Notes which model answered last."""
        if version != self._version:
            self.model.clear()
            self.model.labels(version).set(1)
            self._version = version

    def render(self) -> bytes:
        """Returns everything in Prometheus' text format."""
        return generate_latest(self.registry)
