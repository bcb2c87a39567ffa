"""Whether a challenger may serve: checks on the newest examples, each with its figure and its bound. Pure.

The burden of proof lies with the challenger. It must be shown not to be worse by more than a margin (a non-inferiority
test on paired differences, so slates that both rank alike cost nothing), and it must be sane: an average may hide
scores that are no numbers, no order at all, or popularity alone. A figure that is not a number never passes.

A margin alone lets quality creep away: each round is held against the one before, and many small losses pass. And it
lets noise in: a challenger that has learned nothing, or that of a broken log, orders nearly as its parent does. So a
challenger must be better besides, by more than chance is likely to make it.

Shapes: E examples, U readers, R resamples.
"""

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from tailrace.settings import GateSettings
from training.evaluate import Evaluation
from training.slate_metrics import Reals, resample_sums

LEAST_RANKED = 30  # slates with a gain; a bootstrap of fewer is too sure of itself
_LEAST_OF_AUC = 1 / 3  # of what a champion's is above chance; all orders within a good slate are nearly alike
LEAST_NEW_PLACES = 30  # first places that the champion gives to new items; the share of fewer is chance


class Check(msgspec.Struct, frozen=True):
    """One condition: what was found, the bound it was held against, and the same as a sentence."""

    name: str
    figure: float
    bound: float
    passed: bool
    text: str


class Verdict(msgspec.Struct, frozen=True):
    """Whether the challenger is promoted, why, and every check. `reasons` are those that failed, or what was shown."""

    promoted: bool
    reasons: list[str]
    checks: list[Check]


def decide(
    champion: Evaluation,
    challenger: Evaluation,
    latency_ratio: float,
    settings: GateSettings,
    *,
    referee_error: float = 0.0,
    usual_auc: float | None = None,
    seed: int = 0,
) -> Verdict:
    """Returns the verdict on a challenger evaluated on the same examples as the champion.

    `latency_ratio` is of `training.rescoring.latency_ratio`, `referee_error` of `training.judged_gains`: how unsure it
    is what was not shown would have earned. `usual_auc` is the champion's within slates when it was judged itself, if
    it was. Parity is proved before: `training.export`.

    Raises ValueError where the two were not: their slates that can tell differ.
    """
    own_E, usual_E = challenger.judged_E, champion.judged_E
    if own_E.shape != usual_E.shape or (np.isfinite(own_E) != np.isfinite(usual_E)).any():
        raise ValueError("champion and challenger were evaluated on different examples")
    own, usual = challenger.sanity, champion.sanity
    checks = [
        _at_least("enough slates", challenger.ranked, LEAST_RANKED, "slates with a gain: {:.0f}, at least {:.0f}"),
        _at_most("finite scores", own.not_finite, 0, "scores that are not finite: {:.0f}, at most {:.0f}"),
        _at_least("score spread", own.spread, settings.min_spread, "spread of scores in a slate {:.3g}, at least {:g}"),
        _log_check(champion, challenger, usual_auc),
        *_ndcg_checks(champion, challenger, settings, referee_error, seed),
        _at_most(
            "popular items",
            own.popular_share - usual.popular_share,
            settings.max_popular_shift,
            f"first places of the most popular candidates {usual.popular_share:.1%} → {own.popular_share:.1%}: "
            "{:+.3f}, at most {:+.3f}",
        ),
        _new_items_check(champion, challenger, settings),
        _at_most(
            "latency",
            latency_ratio,
            settings.max_latency_ratio,
            "time to score, as a ratio to the champion's: {:.2f}, at most {:.2f}",
        ),
    ]
    failed = [check.text for check in checks if not check.passed]
    shown = [check.text for check in checks if check.name == "ndcg_10"]
    return Verdict(promoted=not failed, reasons=failed or shown, checks=checks)


def _log_check(champion: Evaluation, challenger: Evaluation, usual_auc: float | None) -> Check:
    """Whether the clicks follow from anything: else feedback is joined to the wrong items, and tells of nobody.

    A champion may have lost its touch, but then a challenger that has learned from this log has found it again.
    """
    found = max(champion.figures["auc"].high, challenger.figures["auc"].high)
    if usual_auc is None:
        return Check("log tells", found, 0.5, True, "the champion was never judged: nothing is known of its usual AUC")
    bound = 0.5 + _LEAST_OF_AUC * max(usual_auc - 0.5, 0.0)
    text = f"AUC within slates of either model: at most {found:.3f}; {usual_auc:.3f} was usual, {bound:.3f} is asked"
    return Check("log tells", found, bound, found >= bound, text)


def _ndcg_checks(
    champion: Evaluation, challenger: Evaluation, settings: GateSettings, referee_error: float, seed: int
) -> list[Check]:
    """Whether lower confidence bounds of the mean paired difference of NDCG@10 lie high enough.

    With much confidence it lies above minus the margin, and with some above 0.
    """
    tell_E = np.isfinite(challenger.judged_E)
    own_E, usual_E = challenger.judged_E[tell_E], champion.judged_E[tell_E]
    if not len(own_E):
        return [Check("ndcg_10", float("nan"), -settings.margin, False, "NDCG@10: no slate can tell")]
    differences_E = own_E - usual_E
    found = float(differences_E.mean())
    readers_E = challenger.readers_E[tell_E]

    def at_least(confidence: float) -> float:
        # Two errors that know nothing of each other: which slates there happened to be, and who taught the referee.
        by_slates = found - _lowest_mean(differences_E, readers_E, confidence, settings.bootstrap, seed)
        return found - float(np.hypot(by_slates, norm.ppf(confidence) * referee_error))

    lowest = at_least(settings.confidence)
    checks = [
        Check(
            "ndcg_10",
            lowest,
            -settings.margin,
            lowest >= -settings.margin,
            f"NDCG@10 as judged {usual_E.mean():.4f} → {own_E.mean():.4f} ({found:+.4f}); with "
            f"{settings.confidence:.0%} confidence at least {lowest:+.4f}, where {-settings.margin:+.4f} is allowed",
        )
    ]
    if settings.better_confidence:
        gained = at_least(settings.better_confidence)
        text = f"NDCG@10 better by {gained:+.4f} with {settings.better_confidence:.0%} confidence, above 0 is asked"
        checks.append(Check("better", gained, 0.0, gained > 0, text))
    return checks


def _lowest_mean(values_E: Reals, readers_E: NDArray[np.int64], confidence: float, resamples: int, seed: int) -> float:
    """Returns the lower bound of the mean by the bootstrap, of readers or of slates, whichever is lower.

    Slates of one reader hang together, so there is less to go by than there are slates; and a few readers who happen
    to agree prove little.
    """
    _, reader_E = np.unique(readers_E, return_inverse=True)
    lowest = []
    for group_E in (reader_E, np.arange(len(values_E))):
        columns_U2 = np.stack([np.bincount(group_E, weights=values_E), np.bincount(group_E).astype(np.float64)], axis=1)
        sums_R2 = resample_sums(columns_U2, resamples=resamples, seed=seed)
        lowest.append(float(np.quantile(sums_R2[:, 0] / sums_R2[:, 1], 1 - confidence)))
    return min(lowest)


def _new_items_check(champion: Evaluation, challenger: Evaluation, settings: GateSettings) -> Check:
    """New items are few, so their share may fall by so much of itself; with too few to tell there is no verdict."""
    own, usual = challenger.sanity.new_share, champion.sanity.new_share
    places = champion.sanity.new_places
    if places < LEAST_NEW_PLACES:
        text = f"new items hold {places} of the champion's first places: too few to compare"
        return Check("new items", own, 0.0, True, text)
    bound = (1 - settings.max_cold_shift) * usual
    text = f"new items in the first places {usual:.1%} → {own:.1%}, at least {bound:.1%}"
    return Check("new items", own, bound, own >= bound, text)


def _at_least(name: str, figure: float, bound: float, text: str) -> Check:
    return Check(name, float(figure), float(bound), figure >= bound, text.format(figure, bound))


def _at_most(name: str, figure: float, bound: float, text: str) -> Check:
    return Check(name, float(figure), float(bound), figure <= bound, text.format(figure, bound))
