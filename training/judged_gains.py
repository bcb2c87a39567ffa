"""What the gate holds an order against: what every logged candidate earned, or would have been expected to. Pure.

Logged clicks favour whoever made the slate, twice. What stood high was seen more, so the gains of what was shown are
divided by the chance that its place was looked at (`training.examination`). And what was not shown has no label. To
leave it out would favour any other order: among the shown, all of which the champion thinks well of, its knowledge
tells nothing and its mistakes are many. To count it as not clicked would favour the champion's, the more the better
another is. So it counts with what the champion expects of it, once its scores are chances of a click as they turned
out: the direct method of Dudik, Langford and Li (2011, "Doubly robust policy evaluation and learning"), with a model
that credits a challenger for nothing that it alone believes. What it knows better must show among what was shown.

Shapes: N candidates, K places.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.calibration import Platt
from training.examples import Example

Reals = NDArray[np.float64]


def judged_gains(
    examples: Sequence[Example], champion_scores: Sequence[NDArray[np.floating]], platt: Platt, seen_K: Reals
) -> list[Reals]:
    """Returns float64 [N] per example: gains at a place that is looked at as the first is.

    `platt` makes chances of the champion's scores. Where these say nothing of clicks (a slope of 0 or less), nothing is
    expected of what was not shown: it would speak for whoever ranks the other way round. The last of `seen_K` stands
    for the places after it.
    """
    shown = sum(example.num_shown for example in examples)
    clicks = sum(int(example.clicked_N[: example.num_shown].sum()) for example in examples)
    gained = sum(float(example.gains_N[: example.num_shown].sum()) for example in examples)
    seen = sum(float(_seen(example, seen_K).sum()) for example in examples)
    # The chances are those of places as they were shown, of a mixture of all of them.
    gain_per_chance = gained / max(clicks, 1) * shown / max(seen, 1e-9) if platt.slope > 0 else 0.0
    found = []
    for example, scores_N in zip(examples, champion_scores, strict=True):
        logits_N = np.nan_to_num(platt.logits(scores_N), nan=-np.inf)
        gains_N = gain_per_chance / (1 + np.exp(-np.clip(logits_N, -30.0, 30.0)))
        gains_N[: example.num_shown] = example.gains_N[: example.num_shown] / _seen(example, seen_K)
        found.append(gains_N)
    return found


def _seen(example: Example, seen_K: Reals) -> Reals:
    result: Reals = seen_K[np.minimum(np.arange(example.num_shown), len(seen_K) - 1)]
    return result
