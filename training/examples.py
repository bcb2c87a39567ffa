"""What training learns from: impressions joined with what became of them. Pure.

Late labels: an impression is an example `wait_s` after it was shown, and each says which share of its clicks will have
arrived by the cut-off (`training.arrival`), so that what is yet to come is not taken for a "no". Re-weighted
duplicates, the alternative, would teach a "no" first and take it back a round later.

All times in the join are event times. N candidates, F features.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tailrace.errors import InvalidRecord
from tailrace.events import Click, Impression, Rating
from tailrace.features import FEATURE_NAMES, FEATURE_NAMES_HASH, decode_features
from tailrace.ids import ItemId, ModelVersion, RequestId, UserId
from tailrace.settings import TrainingSettings
from tailrace.tastes import Tastes, make_tastes
from training.attribution import Hashes, Relevant, attribute, feedback_table, hash_ids, known_ms

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Example:
    """One impression and what became of it.

    N candidates: first those shown, in the order of the slate, then the logged sample of those not shown.
    """

    request_id: RequestId
    user_id: UserId
    at_ms: int
    model_version: ModelVersion
    user_text: str
    item_ids: tuple[ItemId, ...]
    texts: tuple[str, ...]
    num_shown: int  # candidates [0:num_shown] were shown; their position is their index
    features_NF: Floats  # float32 [N, F], exactly as ranked
    tastes: Tastes  # the user's, and the tags of the N candidates
    scores_N: Floats  # float32 [N], as served
    propensities_N: Floats  # float32 [N]: chance of this item at this position given those before; NaN where not shown
    gains_N: Floats  # float32 [N], 0 or more: graded label; 0 where nothing good happened
    clicked_N: Flags  # bool [N]: any positive interaction, which is what click rate, AUC and log loss count
    ratings_N: Floats  # float32 [N], 1 to 5; NaN where not rated
    num_candidates: int = 0  # that were ranked; 0 where the log does not say, and then those that are here were
    explored: tuple[int, ...] = ()  # positions filled by lot, not by the first choice for them
    refused: tuple[int, ...] = ()  # positions where a "no" was said, and nothing good: skipped, hidden, rated low
    delays_s: tuple[float, ...] = ()  # how long after it was shown each clicked item was clicked first, in seconds
    arrived: float = 1.0  # the share of its clicks that had come by the cut-off, to be expected of its age


class JoinCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What became of every record of a window. Adds up over partitions.

    impressions = examples + waiting + erased + empty + without_text + foreign_features + unreadable
    feedback = by_request + by_item + late + unshown + orphans + early + forgotten + duplicate
    """

    impressions: int = 0  # distinct requests
    resent: int = 0  # impressions written again under the same request, beside those
    examples: int = 0
    degraded: int = 0  # examples from a lower rung than the whole model, within those
    waiting: int = 0  # shown less than `wait_s` before the cut-off
    erased: int = 0  # the user asked to be forgotten since
    empty: int = 0  # nothing was shown
    without_text: int = 0  # a candidate lacks text or features: the popular rung, imported slates
    foreign_features: int = 0  # ranked on features that are made in another way
    unreadable: int = 0  # features that are not the stated number of finite numbers
    feedback: int = 0
    by_request: int = 0  # joined by request id
    by_item: int = 0  # joined by user and item, for want of a request id
    repeated_actions: int = 0  # joined, but the same was done to the same item of the slate before; within those
    late: int = 0  # came after `attribution_s`
    unshown: int = 0  # on an item that its request did not show
    orphans: int = 0  # no impression to join
    early: int = 0  # stamped after the cut-off: the next round's
    forgotten: int = 0  # from before its user asked to be forgotten
    duplicate: int = 0  # an event id that was there before
    undecodable: int = 0  # records that are no event

    def __add__(self, other: "JoinCounts") -> "JoinCounts":
        return JoinCounts(**{name: getattr(self, name) + getattr(other, name) for name in self.__struct_fields__})


class Joined(NamedTuple):
    """Examples in the order of their impressions, and what became of everything."""

    examples: list[Example]
    counts: JoinCounts


def join(
    impressions: Sequence[Impression],
    clicks: Sequence[Click],
    ratings: Sequence[Rating],
    erasures: Mapping[UserId, int],
    *,
    cutoff_ms: int,
    settings: TrainingSettings,
) -> Joined:
    """Returns the examples that a log held in memory gives, up to `cutoff_ms`.

    `erasures` says up to when users asked to be forgotten. The order of the feedback makes no difference.
    """
    joining = Joining(feedback_table([*clicks, *ratings], settings), erasures, cutoff_ms=cutoff_ms, settings=settings)
    unlabelled = [example for one in joining.admit(impressions) if (example := joining.example(one)) is not None]
    label = joining.finish()
    return Joined(list(label(unlabelled).values()), joining.counts)


# Takes the examples of one partition and returns, by request id, those that stay, with their labels.
Label = Callable[[Sequence[Example]], Mapping[RequestId, Example]]


class Joining:
    """The join of one partition's log, whose impressions come piece by piece: the same result, however they are cut.

    Feedback is known before, all of it, and says which candidates of the impressions are worth remembering. What grows
    with the log is that, and 100 bytes per impression to know it again.
    """

    def __init__(
        self, feedback: pd.DataFrame, forgotten: Mapping[UserId, int], *, cutoff_ms: int, settings: TrainingSettings
    ) -> None:
        self._feedback = feedback
        self._forgotten = dict(forgotten)
        self._cutoff_ms = cutoff_ms
        self._settings = settings
        self._relevant = Relevant(feedback)
        self._shown = [self._relevant.shown_rows([])]
        self._known_ms: dict[int, int] = {}  # by hashed request id
        self._counts: dict[str, int] = {}

    @property
    def counts(self) -> JoinCounts:
        """What became of what was seen so far."""
        return JoinCounts(**self._counts)

    def forget(self, forgotten: Mapping[UserId, int]) -> None:
        """Notes that users asked to be forgotten up to a time."""
        for user_id, at_ms in forgotten.items():
            self._forgotten[user_id] = max(at_ms, self._forgotten.get(user_id, 0))

    def admit(self, impressions: Sequence[Impression]) -> list[Impression]:
        """Remembers what was shown, and returns those that can become examples."""
        # 1. One impression per request: retries are the same.
        distinct: list[Impression] = []
        for impression, number in zip(
            impressions, hash_ids([one.request_id for one in impressions]).tolist(), strict=True
        ):
            if number not in self._known_ms:
                self._known_ms[number] = known_ms(impression)
                distinct.append(impression)
        # 2. Whatever was shown may get feedback, be it an example or not.
        self._shown.append(self._relevant.shown_rows(distinct))
        # 3. Each is an example, or says why not.
        verdicts = [self._verdict(one) for one in distinct]
        self._count("impressions", len(distinct))
        self._count("resent", len(impressions) - len(distinct))
        for verdict in verdicts:
            self._count(verdict)
        admitted = [one for one, verdict in zip(distinct, verdicts, strict=True) if verdict == "examples"]
        self._count("degraded", sum(one.degraded != "none" for one in admitted))
        return admitted

    def example(self, impression: Impression) -> Example | None:
        """Returns the example of an admitted impression, without labels yet, or None where its features are broken."""
        try:
            return unlabelled_example(impression)
        except InvalidRecord:
            self._count("examples", -1)
            self._count("unreadable")
            self._count("degraded", -(impression.degraded != "none"))
            return None

    def finish(self) -> Label:
        """Returns what puts labels on examples, once all impressions are in.

        It drops those whose user asked to be forgotten, where that became known only after they were admitted.
        """
        attribution = attribute(
            pd.concat(self._shown),
            self._feedback,
            self._forgotten,
            cutoff_ms=self._cutoff_ms,
            attribution_ms=self._settings.attribution_s * 1000,
        )
        self._counts |= attribution.counts

        def label(examples: Sequence[Example]) -> dict[RequestId, Example]:
            numbers = hash_ids([example.request_id for example in examples])
            kept = np.array(
                [
                    self._known_ms[number] > self._forgotten.get(example.user_id, -1)
                    for number, example in zip(numbers.tolist(), examples, strict=True)
                ],
                dtype=np.bool_,
            )
            self._count("examples", -int((~kept).sum()))
            self._count("erased", int((~kept).sum()))
            left = [example for example, is_kept in zip(examples, kept.tolist(), strict=True) if is_kept]
            return {one.request_id: one for one in with_labels(left, numbers[kept], attribution.labels)}

        return label

    def _verdict(self, impression: Impression) -> str:
        if known_ms(impression) <= self._forgotten.get(impression.user_id, -1):
            return "erased"
        if impression.at_ms > self._cutoff_ms - self._settings.wait_s * 1000:
            return "waiting"
        if not impression.shown:
            return "empty"
        if not all(ranked.text and ranked.features for ranked in (*impression.shown, *impression.unshown)):
            return "without_text"
        return "examples" if impression.feature_names_hash == FEATURE_NAMES_HASH else "foreign_features"

    def _count(self, name: str, number: int = 1) -> None:
        self._counts[name] = self._counts.get(name, 0) + number


def unlabelled_example(impression: Impression) -> Example:
    """Returns the example as if nothing had happened. Raises InvalidRecord where its features are not F finite numbers.

    Item texts are interned: the same few thousand come again and again.
    """
    candidates = (*impression.shown, *impression.unshown)
    num_shown = len(impression.shown)
    features = [decode_features(ranked.features) for ranked in candidates]
    if any(len(features_F) != len(FEATURE_NAMES) for features_F in features):
        raise InvalidRecord(f"not {len(FEATURE_NAMES)} numbers", field="$.features")
    features_NF: Floats = np.stack(features)
    if not np.isfinite(features_NF).all():
        raise InvalidRecord("not finite", field="$.features")
    propensities = [np.nan if ranked.propensity is None else ranked.propensity for ranked in impression.shown]
    propensities += [np.nan] * len(impression.unshown)
    return Example(
        request_id=impression.request_id,
        user_id=impression.user_id,
        at_ms=impression.at_ms,
        model_version=impression.model_version,
        user_text=impression.user_text,
        item_ids=tuple(ItemId(sys.intern(ranked.item_id)) for ranked in candidates),
        texts=tuple(sys.intern(ranked.text) for ranked in candidates),
        num_shown=num_shown,
        features_NF=features_NF,
        tastes=make_tastes(impression.answers, [ranked.tags for ranked in candidates]),
        scores_N=np.array([ranked.score for ranked in candidates], dtype=np.float32),
        propensities_N=np.array(propensities, dtype=np.float32),
        gains_N=np.zeros(len(candidates), dtype=np.float32),
        clicked_N=np.zeros(len(candidates), dtype=np.bool_),
        ratings_N=np.full(len(candidates), np.nan, dtype=np.float32),
        num_candidates=impression.num_candidates,
        explored=tuple(position for position, ranked in enumerate(impression.shown) if ranked.explored),
    )


def with_labels(examples: Sequence[Example], numbers: Hashes, labels: pd.DataFrame) -> Iterable[Example]:
    """Yields the examples with the labels of `training.attribution.attribute`; `numbers` are their hashed requests."""
    requests, index = labels["request"].to_numpy(), labels["index"].to_numpy()
    gains, clicked, stars = (labels[name].to_numpy() for name in ("gain", "clicked", "stars"))
    refused, delays = labels["refused"].to_numpy(), labels["delay_s"].to_numpy()
    begins, ends = np.searchsorted(requests, numbers, "left"), np.searchsorted(requests, numbers, "right")
    for example, begin, end in zip(examples, begins.tolist(), ends.tolist(), strict=True):
        if begin == end:
            yield example
            continue
        where = index[begin:end]
        gains_N, clicked_N, ratings_N = example.gains_N.copy(), example.clicked_N.copy(), example.ratings_N.copy()
        gains_N[where], clicked_N[where], ratings_N[where] = gains[begin:end], clicked[begin:end], stars[begin:end]
        yield replace(
            example,
            gains_N=gains_N,
            clicked_N=clicked_N,
            ratings_N=ratings_N,
            refused=tuple(where[refused[begin:end]].tolist()),
            delays_s=tuple(delays[begin:end][clicked[begin:end]].tolist()),
        )
