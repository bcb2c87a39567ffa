"""The plot of a lab: click rate by day and arm, one panel a seed."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deploy.lab import LabRun
from deploy.simulated_days import ARMS

_STYLES = {"recommended": ("C0", "-"), "control": ("C1", "--"), "oracle": ("C2", ":")}


def plot_runs(runs: Sequence[LabRun], path: Path) -> None:
    """Writes a PNG: click rate in per cent by day for each arm; a mark where another version began to serve."""
    figure = Figure(figsize=(5.0 * len(runs), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(runs), squeeze=False, sharey=True)[0]
    for panel, run in zip(panels, runs, strict=True):
        days = [day.day + 1 for day in run.days]
        for arm in ARMS:
            colour, line = _STYLES.get(arm, ("0.6", "-"))
            rates = [100 * day.arms[arm].click_rate for day in run.days]
            panel.plot(days, rates, line, color=colour, label=arm, marker="." if arm in _STYLES else None)
        for before, day in zip(run.days, run.days[1:], strict=False):
            if day.version != before.version:
                panel.axvline(day.day + 0.5, color="0.85", zorder=0)
        panel.set(title=f"seed {run.seed}", xlabel="day", ylabel="clicks per item shown, %", xticks=days)
        panel.set_yscale("log")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)
