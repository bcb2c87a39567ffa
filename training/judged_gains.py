"""What the gate holds an order against: what every ranked candidate earned, or would have been expected to. Pure.

Logged clicks favour whoever made the slate, three times over.

What stood high was seen more, so the gains of what was shown are divided by the chance that its place was looked at
(`training.examination`).

What was not shown has no label. To leave it out, or to ask the champion alone what to expect of it, would favour
whoever errs elsewhere: the champion's errors are many among what it chose, and another's few. To count it as not
clicked would favour the champion, the more the better another is. So it counts with what a referee expects: a
regression of the clicks on the scores of both, stacked (Wolpert 1992, "Stacked generalization"), as the direct method
would have it (Dudik, Langford and Li 2011, "Doubly robust policy evaluation and learning"). It believes each as far as
it was right among what was shown. Of what the champion thinks less of than of anything that it showed, nobody can tell
whether it was right: there the champion alone is asked, or a challenger that had forgotten what keeps it from every
slate would be believed.

And only a sample of the unshown is logged, among which a rank is better than it would be among all (Krichene and
Rendle 2020, "On sampled metrics for item recommendation"). So each stands for as many as it was drawn from. That blurs
a challenger's first places more than the champion's, and so errs towards the champion.

Shapes: N candidates, K places, I shown items of all slates together, M models, E examples.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from training.calibration import Flags
from training.examination import places_seen
from training.examples import Example
from training.slate_metrics import Reals, line_up, pooled_ndcgs

Scores = Sequence[NDArray[np.floating]]

_RIDGE = 1e-6  # only so that clicks which the scores tell apart for sure leave an answer
_DOUBT = 1e-4  # the same of a challenger: where both say one thing of what was shown, the champion is believed
_MOST_SEEN = 1 - 1e-6  # never for sure: a miss at a place that all look at has a chance
_REFEREES = 12  # drawn to see how unsure one is
_HARDLY_EVER = 0.01  # of what was shown, the part that the champion thought least of


@dataclass(frozen=True)
class Referee:
    """What both models' scores say of a click at a place that is looked at as the first is.

    The logit is `champion` and `challenger` times what each scores, plus `intercept`. Where the champion scores less
    than `known_from` it is `alone` times that score, plus `alone_intercept`.
    """

    champion: float
    challenger: float
    intercept: float
    alone: float = 0.0
    alone_intercept: float = 0.0
    known_from: float = -np.inf

    def chances(self, champion_N: NDArray[np.floating], challenger_N: NDArray[np.floating]) -> Reals:
        """Returns float64 [N]: the chance of a click; 0 where a score is no number."""
        with np.errstate(invalid="ignore"):
            both_N = self.champion * champion_N + self.challenger * challenger_N + self.intercept
            logits_N = np.where(champion_N < self.known_from, self.alone * champion_N + self.alone_intercept, both_N)
        expected_N = np.isfinite(champion_N) & np.isfinite(challenger_N) & np.isfinite(logits_N)
        return np.where(expected_N, 1 / (1 + np.exp(-np.clip(logits_N, -60.0, 60.0))), 0.0)


NOTHING_EXPECTED = Referee(0.0, 0.0, -np.inf)


def fit_referee(
    champion_I: NDArray[np.floating], challenger_I: NDArray[np.floating], clicked_I: Flags, seen_I: Reals
) -> Referee:
    """Returns what explains the clicks on shown items best, by logistic regression with weights of 0 or more.

    `seen_I` is the chance that an item's place was looked at, relative to the first. Where both say the same of what
    was shown, nothing tells which is right elsewhere, and the champion is believed. Where the champion's scores say
    nothing of clicks, by themselves, nothing is expected of what was not shown: it would speak for whoever ranks the
    other way round.
    """
    finite_I = np.isfinite(champion_I) & np.isfinite(challenger_I)
    if not finite_I.any():
        return NOTHING_EXPECTED
    scores_I2 = np.stack([champion_I, challenger_I], axis=1)[finite_I].astype(np.float64)
    told = clicked_I[finite_I], np.minimum(seen_I[finite_I], _MOST_SEEN)
    (alone,), alone_intercept = _regress(scores_I2[:, :1], *told, ridge_M=[_RIDGE])
    if alone == 0.0:
        return NOTHING_EXPECTED
    (champion, challenger), intercept = _regress(scores_I2, *told, ridge_M=[_RIDGE, _DOUBT])
    known_from = float(np.quantile(scores_I2[:, 0], _HARDLY_EVER))
    return Referee(champion, challenger, intercept, alone, alone_intercept, known_from)


def _regress(
    scores_IM: Reals, clicked_I: Flags, seen_I: Reals, *, ridge_M: Sequence[float]
) -> tuple[list[float], float]:
    """Returns the likeliest weights of M scores, each 0 or more, and the intercept, of the logit of a click if seen."""
    centre_M, spread_M = scores_IM.mean(0), scores_IM.std(0)
    spread_M = np.where(spread_M < 1e-9, np.inf, spread_M)  # scores that do not differ are worth nothing
    inputs_IX = np.column_stack([(scores_IM - centre_M) / spread_M, np.ones(len(scores_IM))])
    ridge_X = np.array([*ridge_M, _RIDGE])

    def loss(weights_X: Reals) -> tuple[float, Reals]:
        chances_I = 1 / (1 + np.exp(-np.clip(inputs_IX @ weights_X, -30.0, 30.0)))
        seen_clicks_I = seen_I * chances_I
        missed_I = seen_clicks_I * (1 - chances_I) / (1 - seen_clicks_I)
        slopes_I = np.where(clicked_I, 1 - chances_I, -missed_I)
        likelihood = np.log(np.where(clicked_I, seen_clicks_I, 1 - seen_clicks_I)).mean()
        found = weights_X @ (ridge_X * weights_X) / 2 - likelihood
        return float(found), ridge_X * weights_X - slopes_I @ inputs_IX / len(clicked_I)

    models = scores_IM.shape[1]
    bounds = [*[(0, None)] * models, (None, None)]
    weights_X = minimize(loss, np.zeros(models + 1), jac=True, method="L-BFGS-B", bounds=bounds).x
    weights_M = weights_X[:-1] / spread_M
    return weights_M.tolist(), float(weights_X[-1] - weights_M @ centre_M)


def judged_gains(
    examples: Sequence[Example], champion_scores: Scores, challenger_scores: Scores, referee: Referee, seen_K: Reals
) -> list[Reals]:
    """Returns float64 [N] per example: gains at a place that is looked at as the first is.

    The last of `seen_K` stands for the places after it.
    """
    clicks = sum(int(example.clicked_N[: example.num_shown].sum()) for example in examples)
    gained = sum(float(example.gains_N[: example.num_shown].sum()) for example in examples)
    gain_per_click = gained / max(clicks, 1)
    found = []
    for example, own_N, other_N in zip(examples, champion_scores, challenger_scores, strict=True):
        gains_N = gain_per_click * referee.chances(own_N, other_N)
        gains_N[: example.num_shown] = example.gains_N[: example.num_shown] / places_seen(example, seen_K)
        found.append(gains_N)
    return found


def referee_error(
    told: Sequence[Example],
    champion_scores: Scores,
    challenger_scores: Scores,
    seen_K: Reals,
    *,
    since: int,
    top: int,
    seed: int,
) -> float:
    """Returns how unsure the mean difference of judged NDCG is for the referee's sake, as a standard error.

    The difference is that of the examples from number `since` on; the referee is told by all. Of other readers there
    would have been another referee: so readers are drawn again, and each draw's judges the same examples.
    """
    rng = np.random.default_rng([seed, 31])
    _, reader_E = np.unique([one.user_id for one in told], return_inverse=True)
    numbers = [np.flatnonzero(reader_E == reader) for reader in range(int(reader_E.max()) + 1)]
    own, other = (
        [of[: one.num_shown] for one, of in zip(told, scores, strict=True)]
        for scores in (champion_scores, challenger_scores)
    )
    clicked = [one.clicked_N[: one.num_shown] for one in told]
    seen = [places_seen(one, seen_K) for one in told]
    held, champion, challenger = told[since:], champion_scores[since:], challenger_scores[since:]
    found = []
    for _ in range(_REFEREES):
        drawn = np.concatenate([numbers[reader] for reader in rng.integers(len(numbers), size=len(numbers))])
        referee = fit_referee(*(np.concatenate([of[index] for index in drawn]) for of in (own, other, clicked, seen)))
        gains = judged_gains(held, champion, challenger, referee, seen_K)
        usual_E, own_E = (judged_ndcgs(held, scores, gains, top) for scores in (champion, challenger))
        found.append(float(np.nanmean(own_E - usual_E)))
    return float(np.std(found, ddof=1))


def judged_ndcgs(examples: Sequence[Example], scores: Scores, gains: Sequence[Reals], top: int) -> Reals:
    """Returns float64 [E]: NDCG of `gains` up to rank `top`, the sample of those not shown standing for all of them.

    By the mean ideal of all examples; not a number where there is nothing to gain or to order.
    """
    times = [np.minimum(stands_for(example), top) for example in examples]  # more of the same fill no further place
    whole_scores, whole_gains = (
        [np.repeat(of, count_N) for of, count_N in zip(values, times, strict=True)] for values in (scores, gains)
    )
    return pooled_ndcgs(line_up(whole_scores, whole_gains, [np.zeros(len(of), np.bool_) for of in whole_gains]), top)


def stands_for(example: Example) -> NDArray[np.int64]:
    """Returns int64 [N]: how many candidates each logged one stands for, to the nearest whole number."""
    logged = len(example.item_ids) - example.num_shown
    times_N = np.ones(len(example.item_ids), dtype=np.int64)
    if logged:
        times_N[example.num_shown :] = max(round((example.num_candidates - example.num_shown) / logged), 1)
    return times_N
