"""Which of the weights that a fine-tune has come by are kept: the best epoch, an average, or part of the way there."""

import torch
from torch import Tensor

from training.course import Course
from training.learner import Learner, put_learned
from training.stop_slice import StopFigures, StopSlice

_WAYS = (1.0, 0.5, 0.25, 0.0)  # parts of the way from the first step to what the epochs learned that are tried


def choose_weights(course: Course, trial: Learner, stop: StopSlice) -> tuple[dict[str, Tensor] | None, str]:
    """Returns the weights to keep and why, or None where the parent is as good.

    Averages of nearby weights are flatter and do better on what is new (Izmailov et al. 2018, "Averaging weights
    leads to wider optima"), and so does part of the way (Wortsman et al. 2022, "Robust fine-tuning of zero-shot
    models"). `trial` is a learner to try weights in; it comes with those after the first step.
    """
    epochs = course.best_epochs()
    if not epochs:
        return None, "no slate of the stop slice has a gain, so nothing shows that the new weights are better"
    start = trial.learned()
    tried: list[tuple[StopFigures, int, float, dict[str, Tensor]]] = []
    for count in sorted({1, len(epochs)}):
        weights = [course.snapshots[epoch] for epoch in epochs[:count]]
        mean = {name: torch.stack([one[name] for one in weights]).mean(0) for name in weights[0]}
        for way in _WAYS:
            # How much a place is looked at is no matter of the parent's: it has none.
            part = {
                name: weight if name == "position_bias" else torch.lerp(start[name], weight, way)
                for name, weight in mean.items()
            }
            put_learned(trial.ranker, part)
            with torch.no_grad():
                trial.position_bias.copy_(part["position_bias"])
            figures = stop.measure(trial)
            assert figures is not None
            tried.append((figures, count, way, part))
    # Against the parent with the same position bias. Of equals the first: fewest epochs, all of the way.
    figures, count, way, part = min(tried, key=lambda one: one[0].loss - one[0].parent_loss)
    said = f"stop loss {figures.loss:.4f} against the parent's {figures.parent_loss:.4f}"
    if not figures.loss < figures.parent_loss:
        return None, f"nothing beats the parent: {said}"
    if way == 0.0:
        return part, f"{said}, the first step alone"
    said += f", weights of {count} epochs averaged" if count > 1 else ", weights of the best epoch"
    return part, said if way == 1.0 else f"{said}, {way:.0%} of the way from the first step"
