"""Whether a canary should take over, go, or be watched for longer. Pure: evidence in, judgement out.

What is judged, on requests and impressions of the same time:

- errors: the canary's share of requests that missed the top rung, less the champion's, against `gate.max_error_share`;
- latency: the ratio of the median times to score, against `gate.max_latency_ratio`;
- clicks: the canary's click rate, less the champion's after the stated relative loss (`gate.max_click_loss`).

The watchdog looks every few seconds, and a test made for one look, repeated, would sooner or later condemn any canary.
So errors and clicks are held against a bound that holds at all times at once: Robbins' normal mixture, one-sided (mixed
over the half-normal), in the asymptotic form of Waudby-Smith, Arbour, Sinha, Kennedy and Ramdas, "Time-uniform central
limit theory and asymptotic confidence sequences", Annals of Statistics 52(6), 2024; tightest at
`gate.canary_impressions`. Clicks of one user hang together and a user always has the same version, so the click rate's
variance is taken between groups of users (Chamandy, Muralidharan and Wager, "Teaching statistics at Google scale",
The American Statistician 69(4), 2015), not between impressions.

A champion just promoted is judged by how the one before it did: on failures of the model itself, and on clicks, where
twice the loss is allowed. The two did not serve at the same time, and the hour changes what people click.

A canary always ends: what is still open after four times the planned impressions is decided by the estimate, and one
that nobody meets is taken back in time (`gate.max_canary_s`).
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tailrace.settings import GateSettings

GROUPS = 64  # of users, by a hash of their id

_MIN_REQUESTS = 20  # before errors are judged: a sequence of bounds needs a beginning that is nearly normal
_MIN_IMPRESSIONS = 50  # before clicks are judged
_MIN_GROUPS = 8
_MIN_TIMED = 100  # requests before medians are compared
_PATIENCE = 4  # times the planned impressions
_PROBATION_REQUESTS = 1000
_APART = 2.0  # times the loss of clicks that is allowed, where the two did not serve at the same time

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Evidence:
    """How one version has done while it was watched. [G]: by group of users.

    `below_top`: requests that missed the top rung; `errors`: those in which the model itself failed.
    """

    requests: int
    below_top: int
    errors: int
    score_p50_ms: float | None
    impressions: int
    shown_G: Counts  # items shown
    clicked_G: Counts  # items clicked, of those shown
    refused: str = ""  # why a replica would not load it


NO_EVIDENCE = Evidence(0, 0, 0, None, 0, np.zeros(GROUPS, np.int64), np.zeros(GROUPS, np.int64))


@dataclass(frozen=True)
class Judgement:
    """What to do, and why, in words for an operator."""

    action: Literal["promote", "rollback", "wait"]
    reason: str


@dataclass(frozen=True)
class _Difference:
    """An estimate, and how far the truth may be from it on either side, with confidence, whenever one looks."""

    estimate: float
    radius: float

    @property
    def surely_above_zero(self) -> bool:
        return self.estimate - self.radius > 0.0

    @property
    def surely_below_zero(self) -> bool:
        return self.estimate + self.radius < 0.0


def judge(champion: Evidence, canary: Evidence, gate: GateSettings) -> Judgement:
    """Returns what to do with a canary that is served beside the champion."""
    # 1. What is wrong with it at once.
    harm = _harm(champion, canary, gate)
    if harm:
        return Judgement("rollback", harm)
    # 2. Clicks: lost for sure, or kept for sure.
    kept = _clicks_kept(champion, canary, gate.max_click_loss, gate)
    rates = f"click rate {_rate(canary):.4f}, the champion's {_rate(champion):.4f}, {canary.impressions} impressions"
    if kept is not None and kept.surely_below_zero:
        return Judgement("rollback", f"loses more than {gate.max_click_loss:.0%} of the clicks: {rates}")
    if canary.impressions < gate.canary_impressions:
        return Judgement("wait", f"{canary.impressions} of {gate.canary_impressions} impressions")
    if kept is not None and kept.surely_above_zero:
        return Judgement("promote", f"keeps the clicks: {rates}")
    # 3. Too close to tell, for too long.
    if canary.impressions < _PATIENCE * gate.canary_impressions:
        return Judgement("wait", f"not clear yet: {rates}")
    if _rate(canary) < (1.0 - gate.max_click_loss) * _rate(champion):
        return Judgement("rollback", f"could not show that it keeps the clicks: {rates}")
    return Judgement("promote", f"no loss of clicks was found: {rates}")


def on_probation(champion: Evidence, since_s: float, gate: GateSettings) -> bool:
    """Returns whether a champion promoted so long ago has yet to answer, or to show, as much as it is judged by.

    It ends in time, too: what was before is no measure of what comes weeks later.
    """
    too_few = champion.requests < _PROBATION_REQUESTS or champion.impressions < _PATIENCE * gate.canary_impressions
    return too_few and since_s <= gate.max_canary_s


def newest_known(before: Evidence, since: Evidence) -> Evidence:
    """Returns what is known of a version that served twice: requests and clicks each of the newest that can tell."""
    requests, clicks = (
        since if enough else before
        for enough in (since.requests >= _MIN_REQUESTS, since.impressions >= _MIN_IMPRESSIONS)
    )
    return replace(
        requests, impressions=clicks.impressions, shown_G=clicks.shown_G, clicked_G=clicks.clicked_G, refused=""
    )


def judge_fresh(before: Evidence, champion: Evidence, gate: GateSettings) -> Judgement:
    """Returns whether a champion just promoted must go, going by the rates of the one before, as remembered.

    Both are settled evidence (`training.live_evidence`). Requests that missed the top rung and the time they took are
    not held against it: load is nobody's fault.
    """
    if champion.refused:
        return Judgement("rollback", f"refused: {champion.refused}")
    more = _share_difference(before.errors, before.requests, champion.errors, champion.requests, gate)
    if more is not None and more.surely_above_zero:
        shares = f"{champion.errors} of {champion.requests} requests; before, {before.errors} of {before.requests}"
        return Judgement("rollback", f"the model fails too often: {shares}")
    may_lose = min(_APART * gate.max_click_loss, 1.0)
    kept = _clicks_kept(before, champion, may_lose, gate)
    if kept is not None and kept.surely_below_zero:
        rates = f"click rate {_rate(champion):.4f}, before {_rate(before):.4f}, {champion.impressions} impressions"
        return Judgement("rollback", f"loses more than {may_lose:.0%} of the clicks: {rates}")
    return Judgement("wait", f"{champion.errors} of {champion.requests} requests failed")


def _harm(champion: Evidence, canary: Evidence, gate: GateSettings) -> str:
    if canary.refused:
        return f"refused: {canary.refused}"
    more = _share_difference(champion.below_top, champion.requests, canary.below_top, canary.requests, gate)
    if more is not None and more.surely_above_zero:
        shares = f"{canary.below_top} of {canary.requests}, champion {champion.below_top} of {champion.requests}"
        return f"too many requests missed the top rung: {shares}"
    own_ms, usual_ms = canary.score_p50_ms or 0.0, champion.score_p50_ms or math.inf
    if min(champion.requests, canary.requests) >= _MIN_TIMED and own_ms > gate.max_latency_ratio * usual_ms:
        return f"too slow: half of its scores take {own_ms:.1f} ms or more, the champion's {usual_ms:.1f} ms"
    return ""


def _share_difference(base_hits: int, base: int, hits: int, requests: int, gate: GateSettings) -> _Difference | None:
    """Returns by how much one share exceeds another and what is allowed; None with too few requests.

    Without a base the other share is taken to be zero. One hit and one miss are added to the variances: a share of 0
    or 1 so far is not known for sure.
    """
    if requests < _MIN_REQUESTS or 0 < base < _MIN_REQUESTS:
        return None
    base_share = base_hits / base if base else 0.0
    variance = _share_variance(hits, requests) + (_share_variance(base_hits, base) if base else 0.0)
    estimate = hits / requests - base_share - gate.max_error_share
    return _Difference(estimate, math.sqrt(variance) * _always_valid(requests, gate))


def _share_variance(hits: int, count: int) -> float:
    share = (hits + 1) / (count + 2)
    return share * (1.0 - share) / count


def _clicks_kept(usual: Evidence, new: Evidence, may_lose: float, gate: GateSettings) -> _Difference | None:
    """Returns by how much the new version's click rate exceeds what it must keep; None with too little to go by."""
    for one in (usual, new):
        if one.impressions < _MIN_IMPRESSIONS or np.count_nonzero(one.shown_G) < _MIN_GROUPS:
            return None
    must_keep = 1.0 - may_lose
    estimate = _rate(new) - must_keep * _rate(usual)
    variance = _rate_variance(new) + must_keep**2 * _rate_variance(usual)
    return _Difference(estimate, math.sqrt(variance) * _always_valid(new.impressions, gate))


def _rate(evidence: Evidence) -> float:
    """Returns items clicked per item shown."""
    return float(evidence.clicked_G.sum() / max(evidence.shown_G.sum(), 1))


def _rate_variance(evidence: Evidence) -> float:
    """Returns the variance of the click rate between groups of users (delta method), or as if items were independent.

    The larger of the two: a few groups that happen to agree prove little.
    """
    shown, groups = int(evidence.shown_G.sum()), int(np.count_nonzero(evidence.shown_G))
    residuals_G = evidence.clicked_G - _rate(evidence) * evidence.shown_G
    between = groups / (groups - 1) * float(np.square(residuals_G).sum()) / shown**2
    return max(between, _share_variance(int(evidence.clicked_G.sum()), shown))


def _always_valid(count: int, gate: GateSettings) -> float:
    """Returns how many standard errors the truth may be off on one side, at any count, with `gate.confidence`."""
    alpha = min(max(1.0 - gate.confidence, 1e-6), 0.4)
    spread = -2.0 * math.log(2.0 * alpha)
    # The mixture's variance that makes the bound tightest at the planned count (the paper's equation for rho).
    seen = count * (spread + math.log(spread + 1.0)) / gate.canary_impressions
    return math.sqrt(2.0 * (1.0 + 1.0 / seen) * math.log(1.0 + math.sqrt(seen + 1.0) / (2.0 * alpha)))
