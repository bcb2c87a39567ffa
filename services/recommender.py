"""From a user to a slate: `recommend` is the page to read first. It runs in a ranker replica and touches nothing.

The gateway hands over the profile as stored; the catalogue and the model are the replica's own. Where the text half of
the model is late or fails, the answer comes from the prior over counters and cosines instead, and says so.

Shapes: N candidates, n slots, R recent items, F features, D vector size.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from services.bodies import Asked, Degraded, RankedAnswer, RecommendedItem
from services.candidates import Candidates, PoolRequest, build_pool
from services.encodings import EncodedItems, ItemEncodings
from services.explain import explain, gather_evidence
from services.situation import flat_context, merge_context, profile_age_ms
from services.slate import Slot, build_slate
from tailrace.catalogue import Catalogue, Rows
from tailrace.cosines import Floats, history_items, history_mean, make_cosines
from tailrace.errors import Overloaded, ScoringError, TooLate
from tailrace.events import Impression, Ranked, encode
from tailrace.features import (
    FEATURE_NAMES_HASH,
    compute_features,
    encode_features,
    prior_scores,
    utilities,
)
from tailrace.ids import EventId, ItemId, ModelVersion
from tailrace.items import Item
from tailrace.profile import Profile, decode_profile
from tailrace.responses import gather_responses, topic_pulls
from tailrace.settings import RankerSettings, SlateSettings
from tailrace.tastes import Answers, bucket_answers, bucket_tags, sum_worth, tags_of
from tailrace.text import now_interests, render_user

# The share of a request's time that the text model may use; the rest is enough to answer without it.
_TEXT_SHARE = 0.8

# What the text half may fail of while the answer goes on without it.
OPTIONAL_FAILURES = (TooLate, Overloaded, ScoringError)


class TextModel(Protocol):
    """What `recommend` asks of a loaded model. Each call raises TooLate, Overloaded or ScoringError."""

    version: ModelVersion
    encodings: ItemEncodings
    prior: Mapping[str, float]  # the weights of the linear part of the score, by feature

    def tag_worth(self, answers: Answers) -> Floats:
        """Returns float32 [V]: what a tag of each bucket adds to a click logit of the user with these answers."""

    def encode_user(self, text: str, deadline: float) -> Any:
        """Returns the user's text as the model sees it; its `vectors_BD` is float32 [1, D]."""

    def embed(self, text: str, deadline: float) -> Floats:
        """Returns float32 [D]: the unit vector of a text."""

    def score(
        self, user: Any, items: EncodedItems, features_NF: Floats, tag_worth_N: Floats, deadline: float
    ) -> tuple[Floats, Floats]:
        """Returns click logits [N] and ratings [N], 1 to 5."""


def recommend(
    asked: Asked,
    catalogue: Catalogue,
    model: TextModel,
    ranker: RankerSettings,
    slate_settings: SlateSettings,
    clock: Callable[[], float] = time.monotonic,
) -> RankedAnswer:
    """Returns the slate for one request, with its impression, and how long each stage took.

    `clock` counts monotonic seconds; event time is `asked.now_ms`, and chance is seeded by the request id.
    """
    request, now_ms = asked.request, asked.now_ms
    rng = np.random.default_rng(list(asked.request_id.encode()))
    stages = Stages(clock)
    deadline = stages.started + asked.budget_s * _TEXT_SHARE

    # 1. Who asks, and where they are.
    profile = Profile(request.user_id) if asked.profile is None else decode_profile(asked.profile)
    context = merge_context(request.context, profile, asked.request_id, now_ms)
    responses = gather_responses(profile, catalogue.topics, now_ms)
    stages.end("profile")

    # 2. The user in words, and encoded: once, however many candidates follow.
    user_text = render_user(profile, context, request.query, catalogue.item, now_ms)
    user, query_D = _encode(model, user_text, request.query, deadline)
    user_D = None if user is None else user.vectors_BD[0]
    stages.end("encode")

    # 3. A few hundred candidates: near the user, the query and what the user touched last, of the topics that draw the
    #    user by what the model has learned, or what is of the moment.
    tag_worth_V = model.tag_worth(bucket_answers(responses.answers))
    interests = now_interests(profile, now_ms)
    recent, recent_RD = _recent_vectors(model.encodings, catalogue, profile)
    pool = build_pool(
        catalogue,
        model.encodings.vectors,
        PoolRequest(
            profile=profile,
            now_ms=now_ms,
            num_candidates=ranker.num_candidates,
            user_D=user_D,
            query_D=query_D,
            history_D=history_mean(recent_RD),
            candidates=request.candidates,
            exclude=request.exclude,
            filters=request.filters,
            keep_seen=request.include_seen,
            pulls=topic_pulls(interests, responses, model.prior),
            tag_worth_V=tag_worth_V,
        ),
        rng,
    )
    drawn = _draw_up(pool, catalogue, model.encodings)
    stages.end("candidates")

    # 4. Fresh numbers beside the text.
    cosines = make_cosines(drawn.encoded.vectors_ND, user_D, query_D, recent_RD)
    features_NF = compute_features(
        catalogue, drawn.rows_N, profile, context, query_D is not None, cosines, now_ms, responses
    )
    tag_worth_N = sum_worth(tag_worth_V, bucket_tags([tags_of(item) for item in drawn.items_N]))
    stages.end("features")

    # 5. Scores: from the model, or from the prior where the model is not there in time.
    scores_N, degraded = _score(model, user, drawn.encoded, features_NF, tag_worth_N, slate_settings, deadline)
    if asked.profile_missing and degraded == "none":
        degraded = "no_profile"
    stages.end("score")

    # 6. The slate: relevance, diversity, a little exploration.
    slots = build_slate(
        scores_N,
        drawn.encoded.vectors_ND,
        [item.tags for item in drawn.items_N],
        n=request.n,
        diversity=slate_settings.diversity,
        max_per_tag=slate_settings.max_per_tag,
        exploration=slate_settings.exploration,
        explore_pool=slate_settings.explore_pool,
        rng=rng,
    )
    stages.end("slate")

    # 7. Why each item is in it, if asked.
    placed = np.array([slot.index for slot in slots], dtype=np.int64)
    reasons: list[list[str] | None] = [None] * len(slots)
    if request.explain:
        evidence = gather_evidence(
            catalogue,
            drawn.rows_N[placed],
            features_NF[placed],
            [drawn.sources_N[slot.index] for slot in slots],
            [slot.explored for slot in slots],
            profile,
            drawn.encoded.vectors_ND[placed],
            recent,
            recent_RD,
            now_ms,
        )
        reasons = [None if one is None else explain(one, query=request.query, interests=interests) for one in evidence]
    stages.end("reasons")

    # 8. The impression: exactly what was ranked on, for the slate and for a sample of those that lost.
    impression = b""
    if not request.dry_run:
        lost = rng.permutation(np.setdiff1d(np.arange(len(scores_N)), placed))[: slate_settings.unshown_logged]
        impression = encode(
            Impression(
                event_id=EventId(asked.request_id),
                request_id=asked.request_id,
                user_id=request.user_id,
                occurred_at=now_ms,
                model_version=model.version,
                feature_names_hash=FEATURE_NAMES_HASH,
                user_text=user_text,
                shown=[_as_ranked(drawn, features_NF, scores_N, slot.index, slot) for slot in slots],
                unshown=[_as_ranked(drawn, features_NF, scores_N, int(index), None) for index in lost],
                num_candidates=len(scores_N),
                query=request.query,
                context=flat_context(context),
                degraded=degraded,
                profile_age_ms=profile_age_ms(profile, now_ms),
                answers=dict(responses.answers),
            )
        )
    stages.end("impression")
    return RankedAnswer(
        model_version=model.version,
        degraded=degraded,
        items=[_as_item(drawn, slot, why) for slot, why in zip(slots, reasons, strict=True)],
        impression=impression,
        timings=stages.took_ms,
    )


class Stages:
    """How long each stage took, in milliseconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.started = clock()
        self.took_ms: dict[str, float] = {}
        self._clock = clock
        self._last = self.started

    def end(self, stage: str) -> None:
        """Notes the end of a stage."""
        now = self._clock()
        self.took_ms[stage] = round((now - self._last) * 1000, 3)
        self._last = now


@dataclass(frozen=True)
class DrawnUp:
    """The candidates of one request, fixed: later changes of the catalogue do not reach them."""

    rows_N: Rows
    items_N: list[Item]
    sources_N: list[str]
    encoded: EncodedItems


def _encode(model: TextModel, text: str, query: str | None, deadline: float) -> tuple[Any, Floats | None]:
    try:
        return model.encode_user(text, deadline), model.embed(query, deadline) if query else None
    except OPTIONAL_FAILURES:
        return None, None


def _score(
    model: TextModel,
    user: Any,
    items: EncodedItems,
    features_NF: Floats,
    tag_worth_N: Floats,
    slate_settings: SlateSettings,
    deadline: float,
) -> tuple[Floats, Degraded]:
    if len(features_NF) == 0:
        return np.zeros(0, dtype=np.float32), "none" if user is not None else "no_text"
    if user is not None:
        try:
            clicks_N, ratings_N = model.score(user, items, features_NF, tag_worth_N, deadline)
            return utilities(clicks_N, ratings_N, slate_settings.rating_weight), "none"
        except OPTIONAL_FAILURES:
            pass  # the caller is told by the rung, and the rungs are counted
    return prior_scores(features_NF), "no_text"


def _recent_vectors(encodings: ItemEncodings, catalogue: Catalogue, profile: Profile) -> tuple[list[ItemId], Floats]:
    known = [(item_id, row) for item_id in history_items(profile) if (row := catalogue.row(item_id)) is not None]
    ready = encodings.ready(np.array([row for _, row in known], dtype=np.int64)).tolist()
    kept = [entry for entry, is_ready in zip(known, ready, strict=True) if is_ready]
    return [item_id for item_id, _ in kept], encodings.vectors[[row for _, row in kept]]


def _draw_up(pool: Candidates, catalogue: Catalogue, encodings: ItemEncodings) -> DrawnUp:
    items = zip(pool.rows_N.tolist(), catalogue.items_at(pool.rows_N), pool.sources_N, strict=True)
    live = [(row, item, source) for row, item, source in items if item is not None]
    rows = np.array([row for row, _, _ in live], dtype=np.int64)
    ready, encoded = encodings.gather(rows)
    kept = [one for one, is_ready in zip(live, ready.tolist(), strict=True) if is_ready]
    return DrawnUp(rows[ready], [item for _, item, _ in kept], [source for _, _, source in kept], encoded)


def _as_item(drawn: DrawnUp, slot: Slot, reasons: list[str] | None) -> RecommendedItem:
    item = drawn.items_N[slot.index]
    return RecommendedItem(
        item_id=item.item_id,
        title=item.title,
        position=slot.position,
        score=round(slot.score, 6),
        source=drawn.sources_N[slot.index],
        explored=slot.explored,
        reasons=reasons,
    )


def _as_ranked(drawn: DrawnUp, features_NF: Floats, scores_N: Floats, index: int, slot: Slot | None) -> Ranked:
    return Ranked(
        item_id=drawn.items_N[index].item_id,
        text=drawn.encoded.texts_N[index],
        features=encode_features(features_NF[index]),
        score=float(scores_N[index]),
        source=drawn.sources_N[index],
        position=None if slot is None else slot.position,
        propensity=None if slot is None else slot.propensity,
        explored=slot is not None and slot.explored,
        tags=tags_of(drawn.items_N[index]),
    )
