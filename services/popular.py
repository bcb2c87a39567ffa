"""What the gateway answers by itself when no ranker does: popular of late, new above old, filters applied. Pure.

Score: users of the last day, decayed, plus half a user for everyone (so that news is not last), over the root of age.
"""

import numpy as np

from services.bodies import Asked, RecommendedItem
from services.candidates import PoolRequest, build_pool
from services.recommender import flat_context, merge_context, profile_age_ms
from tailrace.catalogue import Catalogue, Rows
from tailrace.counters import HALF_LIVES_S, KINDS
from tailrace.events import Impression, Ranked, encode
from tailrace.features import Floats
from tailrace.ids import EventId, ModelVersion
from tailrace.profile import Profile, decode_profile
from tailrace.text import render_item

POPULAR = ModelVersion("popular")
_DAY = HALF_LIVES_S.index(86_400.0)
_HEAT = [KINDS.index("users"), KINDS.index("rated_up")]
_NO_VECTORS = np.zeros((0, 1), dtype=np.float32)


def popular_scores(catalogue: Catalogue, rows_N: Rows, now_ms: int) -> Floats:
    """Returns float32 [N]: decayed users and praise of the last day, over the root of the age in hours."""
    held = catalogue.gather(rows_N, now_ms)
    heat_N = held.sums_NKH[:, _HEAT, _DAY].sum(axis=1) + 0.5
    age_h_N = np.maximum(now_ms - held.created_ms_N, 0) / 3_600_000
    scores_N: Floats = (heat_N / np.sqrt(age_h_N + 1.0)).astype(np.float32)
    return scores_N


def rank_popular(asked: Asked, catalogue: Catalogue, num_candidates: int) -> tuple[list[RecommendedItem], bytes]:
    """Returns the slate and the encoded impression, which carries no features: it says what was shown, no more."""
    request, now_ms = asked.request, asked.now_ms
    profile = Profile(request.user_id) if asked.profile is None else decode_profile(asked.profile)
    pool = build_pool(
        catalogue,
        _NO_VECTORS,
        PoolRequest(
            profile=profile,
            now_ms=now_ms,
            num_candidates=num_candidates,
            candidates=request.candidates,
            exclude=request.exclude,
            filters=request.filters,
            keep_seen=request.include_seen,
        ),
        np.random.default_rng(list(asked.request_id.encode())),
    )
    scores_N = popular_scores(catalogue, pool.rows_N, now_ms)
    best = np.argsort(-scores_N, kind="stable")[: request.n]
    found = zip(catalogue.items_at(pool.rows_N[best]), scores_N[best].tolist(), strict=True)
    shown = [(item, score) for item, score in found if item is not None]
    impression = Impression(
        event_id=EventId(asked.request_id),
        request_id=asked.request_id,
        user_id=request.user_id,
        occurred_at=now_ms,
        model_version=POPULAR,
        feature_names_hash="",
        user_text="",
        shown=[
            Ranked(
                item_id=item.item_id,
                text=render_item(item),
                features="",
                score=score,
                source="popular",
                position=position,
                propensity=1.0,
            )
            for position, (item, score) in enumerate(shown)
        ],
        num_candidates=len(scores_N),
        query=request.query,
        context=flat_context(merge_context(request.context, profile, asked.request_id, now_ms)),
        degraded="popular",
        profile_age_ms=profile_age_ms(profile, now_ms),
    )
    items = [
        RecommendedItem(
            item_id=item.item_id,
            title=item.title,
            position=position,
            score=round(score, 6),
            source="popular",
            explored=False,
            reasons=["popular of late"] if request.explain else None,
        )
        for position, (item, score) in enumerate(shown)
    ]
    return items, encode(impression)
