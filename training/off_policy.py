"""What another policy would have earned, from slates that were logged with their propensities. Pure.

The log says with what chance each item was put at its position, given those before it. So the chance of a prefix is a
product, known exactly for the logging policy and, from its own probabilities, for the target; and the click at a
position is weighed by the ratio of the prefix up to it. That is reward interaction IPS (McInerney, Brost, Chandar,
Mehrotra and Carterette 2020): unbiased if readers go from the top down, that is, if a click depends on nothing further
below. Weighing the whole slate needs no such assumption and has far more variance; weighing by item and position alone
(Li, Abbasi-Yadkori, Kveton et al. 2018) has less, but needs each policy's marginal chance at a position, which a
sequential log does not hold, and that a click depends on nothing above.

The doubly robust estimate is cascade DR (Kiyohara, Saito, Matsuhiro, Narita, Shimizu and Yamamoto 2022). Its reward
model may be the caller's; else it is each position's own rate under the target, fitted on the other half of the log.

Intervals are Student's with few degrees of freedom where weights are rare and large; in the world of
tests/unit/test_off_policy.py they cover the truth as often as they say, where normal ones cover too little and those
with Hall's (1992) correction of skewness do so too for the estimates that normalise.

Shapes: E examples (slates), K positions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student_t

from tailrace.errors import TooLittleOverlap
from training.examples import Example
from training.ranking_metrics import Interval

Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]

LEAST_EFFECTIVE = 100.0
_DRIFT_SIGMAS, _DRIFT_SLATES = 4.0, 8.0  # weights average 1, give or take, where the log lacks nothing


@dataclass(frozen=True)
class LoggedSlates:
    """Slates as rows: clicks and propensities float64 [E,K]; where `shown_EK` is false they mean nothing."""

    clicks_EK: Reals
    propensities_EK: Reals
    shown_EK: Flags


class OffPolicy(msgspec.Struct, frozen=True):
    """The click rate (clicks per item shown) of the target policy, estimated in three ways, beside the one logged.

    `gain` is doubly robust less logged, of the same slates. `effective_slates` is how many slates of the target's own
    the log is worth at the deepest position (Kish 1965), and `mean_weight` the mean weight there, 1 but for chance.
    """

    logged: Interval
    ips: Interval
    snips: Interval
    doubly_robust: Interval
    gain: Interval
    slates: int
    effective_slates: float
    mean_weight: float


def logged_slates(examples: Sequence[Example]) -> LoggedSlates:
    """Returns the shown parts of the examples; those without propensities must be left out before."""
    return LoggedSlates(
        clicks_EK=_rows([one.clicked_N[: one.num_shown] for one in examples], 0.0),
        propensities_EK=_rows([one.propensities_N[: one.num_shown] for one in examples], 1.0),
        shown_EK=_rows([np.ones(one.num_shown) for one in examples], 0.0) > 0,
    )


def target_probabilities(examples: Sequence[Example], policy: Callable[[Example], Reals]) -> Reals:
    """Returns float64 [E,K] of a policy that says, for each item shown, its own chance given those above."""
    return _rows([np.asarray(policy(one), np.float64) for one in examples], 1.0)


def estimate(
    logged: LoggedSlates,
    target_EK: Reals,
    *,
    predicted_EK: Reals | None = None,
    expected_EK: Reals | None = None,
    least_effective: float = LEAST_EFFECTIVE,
    confidence: float = 0.95,
) -> OffPolicy:
    """Returns the click rate that the target policy would have had on these requests.

    `target_EK` is the target's chance of each logged item at its position, given the logged items before it.
    A reward model is optional and both or neither: `predicted_EK`, the modelled chance of a click on the logged item
    there, and `expected_EK`, the same averaged over what the target might put there after the same items. It must not
    have seen these clicks. Raises ValueError for chances outside their range, TooLittleOverlap where the log is worth
    less than `least_effective` slates of the target's, or lacks what the target would show.
    """
    # 1. The weight of each prefix.
    shown_EK = logged.shown_EK
    _require_chances(logged, target_EK)
    ratios_EK = np.where(shown_EK, target_EK / np.where(shown_EK, logged.propensities_EK, 1.0), 1.0)
    weights_EK: Reals = np.asarray(np.cumprod(ratios_EK, axis=1), np.float64)
    effective, mean_weight = _require_overlap(weights_EK[:, -1], least_effective)
    # 2. Each slate's own contribution to each estimate.
    rewards_EK = np.where(shown_EK, logged.clicks_EK, 0.0) / np.maximum(shown_EK.sum(1, keepdims=True), 1)
    ips_E = (weights_EK * rewards_EK).sum(1)
    if predicted_EK is None or expected_EK is None:
        robust_E = _with_fitted_rates(weights_EK, rewards_EK, shown_EK)
    else:
        share_EK = np.where(shown_EK, 1 / np.maximum(shown_EK.sum(1, keepdims=True), 1), 0.0)
        model = (predicted_EK * share_EK, expected_EK * share_EK)
        robust_E = _with_fitted_rates(weights_EK, rewards_EK, shown_EK, model)
    # 3. Means and intervals.
    return OffPolicy(
        logged=_mean_interval(rewards_EK.sum(1), confidence),
        ips=_mean_interval(ips_E, confidence),
        snips=_mean_interval(_normalized(weights_EK, rewards_EK, shown_EK), confidence),
        doubly_robust=_mean_interval(robust_E, confidence),
        gain=_mean_interval(robust_E - rewards_EK.sum(1), confidence),
        slates=len(weights_EK),
        effective_slates=effective,
        mean_weight=mean_weight,
    )


def _normalized(weights_EK: Reals, rewards_EK: Reals, shown_EK: Flags) -> Reals:
    """Returns float64 [E] whose mean is the self-normalised estimate, linearised about it for the interval.

    Normalised position by position (Swaminathan and Joachims 2015), among the slates that reach it.
    """
    reach_K = shown_EK.sum(0)
    mean_weight_K = np.where(shown_EK, weights_EK, 0.0).sum(0) / np.maximum(reach_K, 1)
    rates_K = _rates(weights_EK, rewards_EK, shown_EK)
    residuals_EK = np.where(shown_EK, weights_EK * (rewards_EK - rates_K), 0.0)
    reached_EK = np.where(shown_EK, rates_K, 0.0)
    result: Reals = (reached_EK + residuals_EK / np.where(mean_weight_K > 0, mean_weight_K, 1.0)).sum(1)
    return result


def _with_fitted_rates(
    weights_EK: Reals, rewards_EK: Reals, shown_EK: Flags, model: tuple[Reals, Reals] | None = None
) -> Reals:
    """Returns float64 [E]: each slate's doubly robust value, of rates fitted on the other half of the slates.

    What is expected from position k on is the modelled reward there plus the rates of those below: the latter must not
    depend on the item at k, or the weights would no longer cancel.
    """
    before_EK = np.concatenate([np.ones((len(weights_EK), 1)), weights_EK[:, :-1]], axis=1)
    values_E = np.zeros(len(weights_EK))
    odd_E = np.arange(len(weights_EK)) % 2 == 1
    for own_E in (odd_E, ~odd_E):
        rates_K = _rates(weights_EK[~own_E], rewards_EK[~own_E], shown_EK[~own_E])
        rates_EK = np.where(shown_EK[own_E], rates_K, 0.0)
        below_EK = rates_EK[:, ::-1].cumsum(1)[:, ::-1] - rates_EK
        of_item_EK, of_target_EK = (rates_EK, rates_EK) if model is None else (part[own_E] for part in model)
        weighed = weights_EK[own_E] * (rewards_EK[own_E] - of_item_EK - below_EK)
        values_E[own_E] = (weighed + before_EK[own_E] * (of_target_EK + below_EK)).sum(1)
    return values_E


def _rates(weights_EK: Reals, rewards_EK: Reals, shown_EK: Flags) -> Reals:
    """Returns float64 [K]: each position's reward under the target, self-normalised; 0 where none reaches it."""
    weighed_K = np.where(shown_EK, weights_EK, 0.0).sum(0)
    result: Reals = (weights_EK * rewards_EK).sum(0) / np.where(weighed_K > 0, weighed_K, 1.0)
    return result


def _mean_interval(values_E: Reals, confidence: float) -> Interval:
    """Returns the mean with a Student interval; the rarer and larger the weights, the fewer its degrees of freedom.

    A deviation estimated from heavy tails is itself unsure, by the kurtosis: as sure as that of 2n / (kurtosis - 1)
    normal values (matching two moments, as Satterthwaite 1946).
    """
    count, mean, deviation = len(values_E), float(values_E.mean()), float(values_E.std(ddof=1))
    if deviation == 0:
        return Interval(mean, mean, mean)
    kurtosis = float(((values_E - mean) ** 4).mean() / ((values_E - mean) ** 2).mean() ** 2)
    freedom = max(2 * count / max(kurtosis - 1, 1e-9), 3.0)
    half = float(student_t.ppf((1 + confidence) / 2, freedom)) * deviation / float(np.sqrt(count))
    return Interval(mean, mean - half, mean + half)


def _require_overlap(weights_E: Reals, least_effective: float) -> tuple[float, float]:
    """Returns effective slates and mean weight. Raises TooLittleOverlap."""
    squares = float((weights_E**2).sum())
    effective = float(weights_E.sum()) ** 2 / squares if squares > 0 else 0.0
    mean = float(weights_E.mean()) if len(weights_E) else 0.0
    if not effective >= least_effective:
        raise TooLittleOverlap(len(weights_E), effective, mean, f"at least {least_effective:.0f} are needed")
    # What the target shows seldom may be missing by chance, and then the weights do not say how much they vary.
    drift = _DRIFT_SIGMAS * float(weights_E.std(ddof=1)) / np.sqrt(len(weights_E)) + _DRIFT_SLATES / len(weights_E)
    if abs(mean - 1) > drift:
        raise TooLittleOverlap(len(weights_E), effective, mean, "weights that do not average 1 mean missing slates")
    return effective, mean


def _require_chances(logged: LoggedSlates, target_EK: Reals) -> None:
    own, theirs = logged.propensities_EK[logged.shown_EK], target_EK[logged.shown_EK]
    if not ((own > 0) & (own <= 1)).all():
        raise ValueError("a logged propensity is not above 0 and at most 1")
    if not ((theirs >= 0) & (theirs <= 1 + 1e-6)).all():
        raise ValueError("a target's probability is not between 0 and 1")


def _rows(values: Sequence[NDArray[np.generic]], fill: float) -> Reals:
    """Returns arrays of several lengths as rows of one width, float64."""
    lengths_E = np.array([len(of) for of in values], dtype=np.int64)
    inside_EK = np.arange(max(int(lengths_E.max(initial=0)), 1)) < lengths_E[:, None]
    rows_EK = np.full(inside_EK.shape, fill)
    if len(values):
        rows_EK[inside_EK] = np.concatenate(list(values))
    return rows_EK
