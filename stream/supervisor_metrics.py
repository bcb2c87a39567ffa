"""The supervisor's Prometheus endpoint, on loopback: what the workers say of themselves, and what it did to them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import structlog
from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stream.fleet import Fleet

log = structlog.get_logger()

_COUNTERS = {
    "events": "Events folded and saved",
    "repeated": "Events dropped because their id had been seen",
    "dead_letters": "Records that could not be used",
    "saves": "Batches saved",
    "thrown_away": "Batches thrown away because the store or the broker failed",
    "skipped_records": "Records that retention removed before they were read",
    "recreated_topics": "Times a topic was found created anew",
    "stats_published": "Item counters published",
}


class FleetCollector(Collector):
    """Turns the newest progress of every worker into metrics. `lag` is by partition, in records."""

    def __init__(self, fleet: Fleet) -> None:
        self.lag: Mapping[int, int] = {}
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Yields the metrics of this moment."""
        members = dict(self._fleet.members)
        workers = GaugeMetricFamily("tailrace_stream_workers", "Workers, answering or not", labels=["answers"])
        for answers in (True, False):
            count = sum(member.answered is answers for member in members.values())
            workers.add_metric([str(answers).lower()], count)
        yield workers
        for name, text in _COUNTERS.items():
            family = CounterMetricFamily(f"tailrace_stream_{name}", text, labels=["worker"])
            for number, member in members.items():
                if member.progress is not None:
                    family.add_metric([str(number)], getattr(member.progress, name))
            yield family
        rate = GaugeMetricFamily("tailrace_stream_events_per_second", "Events folded of late", labels=["worker"])
        for number, member in members.items():
            if member.progress is not None:
                rate.add_metric([str(number)], member.progress.events_per_s)
        yield rate
        restarts = CounterMetricFamily("tailrace_stream_restarts", "Worker processes started again", labels=["worker"])
        for number, count in dict(self._fleet.restarts).items():
            restarts.add_metric([str(number)], count)
        yield restarts
        lag = GaugeMetricFamily("tailrace_stream_lag_records", "Records not yet folded and saved", labels=["partition"])
        for partition, records in self.lag.items():
            lag.add_metric([str(partition)], records)
        yield lag


@contextmanager
def metrics_endpoint(fleet: Fleet, port: int) -> Iterator[FleetCollector]:
    """Yields the collector behind `http://127.0.0.1:<port>/metrics`. Port 0: nowhere. A taken port is logged."""
    collector = FleetCollector(fleet)
    registry = CollectorRegistry()
    registry.register(collector)
    if port == 0:
        yield collector
        return
    try:
        server, thread = start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError as error:
        log.error("no metrics: the port cannot be had", port=port, error=str(error))
        yield collector
        return
    try:
        yield collector
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
