"""The plots of a round's report, as PNG. Pure: figures in, bytes out; matplotlib's Agg alone, no window, no pyplot.

Colours are told apart by the colour-blind too (Okabe and Ito 2008), and each model has its own mark.
"""

import io
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from training.evaluate import Evaluation
from training.ranking_metrics import Interval

_CHAMPION, _CHALLENGER = "#0072B2", "#D55E00"
_STYLES = ((_CHAMPION, "o", "champion"), (_CHALLENGER, "s", "challenger"))


def plot_losses(history: Sequence[Mapping[str, float | None]]) -> bytes:
    """Returns one curve per figure over the epochs; those whose name says NDCG have their own axis."""
    names = list(dict.fromkeys(name for record in history for name in record))
    is_ndcg = {name: "ndcg" in name.lower() for name in names}
    figure, (losses, ndcgs) = _axes("loss", "NDCG@10")
    for name in names:
        values = [(epoch, record.get(name)) for epoch, record in enumerate(history, 1)]
        points = [(epoch, value) for epoch, value in values if value is not None]
        axes = ndcgs if is_ndcg[name] else losses
        axes.plot([epoch for epoch, _ in points], [value for _, value in points], marker="o", label=name)
    for axes in (losses, ndcgs):
        axes.set_xlabel("epoch")
        axes.set_xticks(range(1, len(history) + 1))
        if axes.lines:
            axes.legend(fontsize=7)
    return _png(figure)


def plot_reliability(champion: Evaluation, challenger: Evaluation) -> bytes:
    """Returns the share clicked over the chance predicted, one point per bin."""
    figure, (axes,) = _axes("share clicked")
    most = 0.0
    for (colour, mark, label), model in zip(_STYLES, (champion, challenger), strict=True):
        predicted = [one.predicted for one in model.reliability]
        clicked = [one.clicked for one in model.reliability]
        axes.plot(predicted, clicked, color=colour, marker=mark, label=label)
        most = max([most, *predicted, *clicked])
    axes.plot([0, most], [0, most], color="grey", linestyle=":", label="as predicted")
    axes.set_xlabel("predicted chance of a click")
    axes.legend(fontsize=8)
    return _png(figure)


def plot_intervals(title: str, rows: Mapping[str, tuple[Interval, Interval]]) -> bytes:
    """Returns one row per name with the champion's interval above the challenger's."""
    figure, (axes,) = _axes("", height=1.2 + 0.45 * len(rows))
    for place, pair in enumerate(rows.values()):
        for (colour, mark, label), interval, shift in zip(_STYLES, pair, (-0.14, 0.14), strict=True):
            axes.plot([interval.low, interval.high], [place + shift] * 2, color=colour)
            axes.plot([interval.mean], [place + shift], color=colour, marker=mark, label="" if place else label)
    axes.set_yticks(range(len(rows)), [name.replace("$", r"\$") for name in rows])
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    if rows:
        axes.legend(fontsize=8)
    return _png(figure)


def _axes(*labels: str, height: float = 3.2) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * max(len(labels), 1.4), height), layout="constrained")
    FigureCanvasAgg(figure)
    found = [figure.add_subplot(1, len(labels), number) for number in range(1, len(labels) + 1)]
    for axes, label in zip(found, labels, strict=True):
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    return figure, found


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
