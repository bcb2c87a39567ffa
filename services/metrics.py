"""What a gateway replica counts, for Prometheus. Each replica has its own registry and says which replica it is."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_STAGE_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5)


class GatewayMetrics:
    """Counters of one gateway replica. Stages are timed in the ranker and travel back with its answers."""

    def __init__(self, replica: str) -> None:
        self.registry = CollectorRegistry()
        only = {"registry": self.registry, "namespace": "tailrace"}
        self.info = Gauge("gateway_info", "1, labelled with the replica that answered", ["replica"], **only)
        self.info.labels(replica).set(1)
        self.requests = Counter("http_requests", "HTTP requests", ["route", "status"], **only)
        self.latency = Histogram("http_request_seconds", "HTTP latency", ["route"], buckets=_SECONDS, **only)
        self.running = Gauge("gateway_running", "requests being answered", **only)
        self.waiting = Gauge("gateway_waiting", "requests waiting for a place", **only)
        self.answers = Counter("recommendations", "answers by rung of the ladder", ["degraded"], **only)
        self.impressions = Counter("impressions", "impressions by what became of them", ["outcome"], **only)
        self.events = Counter("events", "posted events by verdict", ["verdict"], **only)
        self.stages = Histogram("ranker_stage_seconds", "ranker stages", ["stage"], buckets=_STAGE_SECONDS, **only)
        self.ranker_waiting = Gauge("ranker_waiting", "jobs in the queue of the ranker replica last heard of", **only)
        self.model = Gauge("model_info", "1 for the model version of the last answer", ["version"], **only)
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
