"""What the gateway counts by model version: bounded, however many versions come and go."""

import re

from services.metrics import GatewayMetrics


def test_answers_are_counted_by_version_and_rung_and_old_versions_are_forgotten() -> None:
    metrics = GatewayMetrics("one")
    for number in range(20):
        metrics.note_model(f"v{number}", "none", 12.0)
        metrics.note_model(f"v{number}", "no_text", 0.5)
        metrics.note_model("champion", "none", 12.0)
        metrics.note_model("popular", "popular", None)
    told = metrics.render().decode()
    assert 'tailrace_version_answers_total{degraded="none",replica="one",version="champion"} 20.0' in told
    assert 'tailrace_version_answers_total{degraded="no_text",replica="one",version="v19"} 1.0' in told
    assert 'tailrace_version_score_seconds_count{replica="one",version="champion"} 20.0' in told
    assert 'tailrace_version_answers_total{degraded="popular",replica="one",version="popular"} 20.0' in told
    versions = set(re.findall(r'tailrace_version_\w+\{.*version="([^"]+)"', told))
    assert len(versions) == 8 and "v0" not in versions


def test_time_to_score_is_told_of_the_top_rung_alone() -> None:
    metrics = GatewayMetrics("one")
    metrics.note_model("v1", "no_text", 0.5)
    assert "tailrace_version_score_seconds_count" not in metrics.render().decode()


def test_every_figure_says_which_replica_it_is_of() -> None:
    metrics = GatewayMetrics("one")
    metrics.answers.labels("none").inc()
    metrics.latency.labels("/v1/recommendations").observe(0.02)
    figures = [line for line in metrics.render().decode().splitlines() if not line.startswith("#")]
    assert figures and all('replica="one"' in line for line in figures)
    assert 'tailrace_http_request_seconds_bucket{le="0.02",replica="one",route="/v1/recommendations"} 1.0' in figures
