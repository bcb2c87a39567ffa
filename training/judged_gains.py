"""What the gate holds an order against: what every ranked candidate earned, or would have been expected to. Pure.

Logged clicks favour whoever made the slate, three times over.

What stood high was seen more, so the gains of what was shown are divided by the chance that its place was looked at
(`training.examination`).

What was not shown has no label. To leave it out, or to ask the champion alone what to expect of it, would favour
whoever errs elsewhere: the champion's errors are many among what it chose, and another's few. To count it as not
clicked would favour the champion, the more the better another is. So it counts with what a referee expects: a
regression of the clicks on the scores of both, stacked (Wolpert 1992, "Stacked generalization"), as the direct method
would have it (Dudik, Langford and Li 2011, "Doubly robust policy evaluation and learning"). It believes each as far as
it was right among what was shown.

And only a sample of the unshown is logged, among which a rank is better than it would be among all (Krichene and
Rendle 2020, "On sampled metrics for item recommendation"). So each stands for as many as it was drawn from.

Shapes: N candidates, K places, I shown items of all slates together, E examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from training.calibration import Flags, fit_platt
from training.examples import Example
from training.slate_metrics import Reals, line_up, pooled_ndcgs

Scores = Sequence[NDArray[np.floating]]

_RIDGE = 1e-6  # only so that clicks which the scores tell apart for sure leave an answer


@dataclass(frozen=True)
class Referee:
    """The logit of a click is `champion` and `challenger` times what each scores, plus `intercept`."""

    champion: float
    challenger: float
    intercept: float

    def chances(self, champion_N: NDArray[np.floating], challenger_N: NDArray[np.floating]) -> Reals:
        """Returns float64 [N]: the chance of a click; 0 where a score is no number."""
        with np.errstate(invalid="ignore"):
            logits_N = self.champion * champion_N + self.challenger * challenger_N + self.intercept
        result: Reals = 1 / (1 + np.exp(-np.clip(np.nan_to_num(logits_N, nan=-np.inf), -60.0, 60.0)))
        return result


NOTHING_EXPECTED = Referee(0.0, 0.0, -np.inf)


def fit_referee(champion_I: NDArray[np.floating], challenger_I: NDArray[np.floating], clicked_I: Flags) -> Referee:
    """Returns what explains the clicks on shown items best, by logistic regression with weights of 0 or more.

    Where the champion's scores say nothing of clicks, by themselves, nothing is expected of what was not shown: it
    would speak for whoever ranks the other way round.
    """
    finite_I = np.isfinite(champion_I) & np.isfinite(challenger_I)
    if fit_platt(champion_I[finite_I], clicked_I[finite_I]).slope <= 0:
        return NOTHING_EXPECTED
    scores_I2 = np.stack([champion_I, challenger_I], axis=1)[finite_I].astype(np.float64)
    centre_2, spread_2 = scores_I2.mean(0), scores_I2.std(0)
    spread_2 = np.where(spread_2 < 1e-9, np.inf, spread_2)  # scores that do not differ are worth nothing
    inputs_I3 = np.column_stack([(scores_I2 - centre_2) / spread_2, np.ones(len(scores_I2))])
    signs_I = np.where(clicked_I[finite_I], 1.0, -1.0)

    def loss(weights_3: Reals) -> tuple[float, Reals]:
        margins_I = signs_I * (inputs_I3 @ weights_3)
        slopes_I = -signs_I / (1 + np.exp(np.clip(margins_I, -60.0, 60.0)))
        found = np.logaddexp(0.0, -margins_I).mean() + _RIDGE * weights_3 @ weights_3 / 2
        return float(found), slopes_I @ inputs_I3 / len(signs_I) + _RIDGE * weights_3

    weights_3 = minimize(loss, np.zeros(3), jac=True, method="L-BFGS-B", bounds=[(0, None), (0, None), (None, None)]).x
    champion, challenger = (weights_3[:2] / spread_2).tolist()
    return Referee(champion, challenger, float(weights_3[2] - np.array([champion, challenger]) @ centre_2))


def judged_gains(
    examples: Sequence[Example], champion_scores: Scores, challenger_scores: Scores, referee: Referee, seen_K: Reals
) -> list[Reals]:
    """Returns float64 [N] per example: gains at a place that is looked at as the first is.

    The last of `seen_K` stands for the places after it.
    """
    shown = sum(example.num_shown for example in examples)
    clicks = sum(int(example.clicked_N[: example.num_shown].sum()) for example in examples)
    gained = sum(float(example.gains_N[: example.num_shown].sum()) for example in examples)
    seen = sum(float(_seen(example, seen_K).sum()) for example in examples)
    # The chances are those of places as they were shown, of a mixture of all of them.
    gain_per_chance = gained / max(clicks, 1) * shown / max(seen, 1e-9)
    found = []
    for example, own_N, other_N in zip(examples, champion_scores, challenger_scores, strict=True):
        gains_N = gain_per_chance * referee.chances(own_N, other_N)
        gains_N[: example.num_shown] = example.gains_N[: example.num_shown] / _seen(example, seen_K)
        found.append(gains_N)
    return found


def judged_ndcgs(examples: Sequence[Example], scores: Scores, gains: Sequence[Reals], top: int) -> Reals:
    """Returns float64 [E]: NDCG of `gains` up to rank `top` among all candidates, of those not shown by the sample.

    By the mean ideal of all examples; not a number where there is nothing to gain or to order.
    """
    times = [_stands_for(example) for example in examples]
    whole_scores, whole_gains = (
        [np.repeat(of, count_N) for of, count_N in zip(values, times, strict=True)] for values in (scores, gains)
    )
    return pooled_ndcgs(line_up(whole_scores, whole_gains, [np.zeros(len(of), np.bool_) for of in whole_gains]), top)


def _stands_for(example: Example) -> NDArray[np.int64]:
    """Returns int64 [N]: how many candidates each logged one stands for."""
    logged = len(example.item_ids) - example.num_shown
    unshown = max(example.num_candidates - example.num_shown, logged)
    times_N = np.ones(len(example.item_ids), dtype=np.int64)
    if logged:
        times_N[example.num_shown :] = round(unshown / logged)
    return times_N


def _seen(example: Example, seen_K: Reals) -> Reals:
    result: Reals = seen_K[np.minimum(np.arange(example.num_shown), len(seen_K) - 1)]
    return result
