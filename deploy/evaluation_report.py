"""What an offline evaluation leaves behind: figures with intervals as a table's rows, as JSON, and as plots."""

from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from training.ranking_metrics import Interval, bootstrap_interval, hit_rates, ndcgs, reciprocal_ranks

Reals = NDArray[np.floating]

RESULTS_FILE = "results.json"
_PLOTTED_AT_ONCE = 6


class Figures(msgspec.Struct, frozen=True):
    """One ranking: each metric's mean with its interval, over `events`."""

    ranking: str
    events: int
    metrics: dict[str, Interval]


class Period(msgspec.Struct, frozen=True):
    """One stretch of time: NDCG@10 of each ranking within it."""

    begins_ms: int
    ends_ms: int
    events: int
    ndcg: dict[str, Interval]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, on what, and how."""

    title: str
    protocol: str
    facts: dict[str, Any]
    figures: list[Figures]
    differences: list[Figures] = []  # paired, to the ranking named in `facts`
    periods: list[Period] = []
    rounds: list[Any] = []


def figures_of_ranks(
    ranking: str, ranks_E: Reals, clusters_E: Sequence[Hashable], *, seed: int, resamples: int
) -> Figures:
    """Returns HR@10, NDCG@10 and MRR of ranks, with intervals over whole clusters (users)."""
    metrics = {"HR@10": hit_rates(ranks_E), "NDCG@10": ndcgs(ranks_E), "MRR": reciprocal_ranks(ranks_E)}
    return figures_of(ranking, metrics, clusters_E, seed=seed, resamples=resamples)


def figures_of(
    ranking: str, values: Mapping[str, Reals], clusters_E: Sequence[Hashable], *, seed: int, resamples: int
) -> Figures:
    """Returns the means of values by metric, with intervals over whole clusters."""
    metrics = {
        name: bootstrap_interval(values_E, clusters_E, seed=seed, resamples=resamples)
        for name, values_E in values.items()
    }
    return Figures(ranking, len(clusters_E), metrics)


def periods_of(
    at_ms_E: Sequence[int],
    ranks: Mapping[str, Reals],
    clusters_E: Sequence[Hashable],
    *,
    count: int,
    seed: int,
    resamples: int,
) -> list[Period]:
    """Returns `count` stretches of equally many events, fewer where there are few events."""
    periods = []
    for part in np.array_split(np.arange(len(at_ms_E)), min(count, max(len(at_ms_E) // 20, 1))):
        clusters = [clusters_E[index] for index in part]
        ndcg = {
            name: bootstrap_interval(ndcgs(ranks_E[part]), clusters, seed=seed, resamples=resamples)
            for name, ranks_E in ranks.items()
        }
        periods.append(Period(at_ms_E[part[0]], at_ms_E[part[-1]], len(part), ndcg))
    return periods


def write_evaluation(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Writes `results.json` and the plots into `folder`, made where it is missing; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / RESULTS_FILE
    results.write_bytes(msgspec.json.format(msgspec.json.encode(evaluation), indent=2))
    files = [results, _plot_figures(evaluation, folder / "figures.png")]
    if evaluation.periods:
        files.append(_plot_periods(evaluation, folder / "ndcg_over_time.png"))
    return files


def _plot_figures(evaluation: Evaluation, path: Path) -> Path:
    metrics = list(evaluation.figures[0].metrics)
    plot, axes = _new_plot(len(metrics), height=1.2 + 0.35 * len(evaluation.figures))
    names = [figures.ranking for figures in evaluation.figures]
    for axis, metric in zip(axes, metrics, strict=True):
        found = [figures.metrics[metric] for figures in evaluation.figures]
        means = [interval.mean for interval in found]
        reach = [[max(one.mean - one.low, 0) for one in found], [max(one.high - one.mean, 0) for one in found]]
        axis.barh(names, means, xerr=reach, color="#4c72b0", ecolor="#333333", capsize=2)
        axis.set_title(metric)
        axis.invert_yaxis()
        axis.grid(axis="x", alpha=0.3)
    for axis in axes[1:]:
        axis.set_yticklabels([])
    return _save(plot, evaluation.title, path)


def _plot_periods(evaluation: Evaluation, path: Path) -> Path:
    plot, axes = _new_plot(1, height=5.0)
    best = sorted(evaluation.figures, key=lambda figures: -figures.metrics["NDCG@10"].mean)[:_PLOTTED_AT_ONCE]
    middle = [
        datetime.fromtimestamp((period.begins_ms + period.ends_ms) / 2000, UTC).replace(tzinfo=None)
        for period in evaluation.periods
    ]
    for figures in best:
        found = [period.ndcg[figures.ranking] for period in evaluation.periods]
        (line,) = axes[0].plot(middle, [one.mean for one in found], marker="o", label=figures.ranking)
        low, high = [one.low for one in found], [one.high for one in found]
        axes[0].fill_between(middle, low, high, alpha=0.12, color=line.get_color())
    axes[0].set_ylabel("NDCG@10")
    axes[0].grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    plot.autofmt_xdate()
    return _save(plot, evaluation.title, path)


def _new_plot(columns: int, *, height: float) -> tuple[Any, list[Any]]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    plot, axes = pyplot.subplots(1, columns, figsize=(max(4.2 * columns + 2.0, 9.0), height), squeeze=False)
    return plot, list(axes[0])


def _save(plot: Any, title: str, path: Path) -> Path:
    from matplotlib import pyplot

    plot.suptitle(title)
    plot.tight_layout()
    plot.savefig(path, dpi=110)
    pyplot.close(plot)
    return path
