"""What the gateway answers by itself when no ranker does: popular of late, new above old, filters applied. Pure.

Score: users of the last day, decayed, plus half a user for everyone (so that news is not last), over the root of age.
"""

import numpy as np

from services.bodies import Asked, RecommendedItem
from services.candidates import PoolRequest, allowed_rows
from services.situation import flat_context, merge_context, profile_age_ms
from tailrace.catalogue import Catalogue
from tailrace.counters import HALF_LIVES_S
from tailrace.events import Impression, Ranked, encode
from tailrace.ids import EventId, ModelVersion
from tailrace.profile import Profile, decode_profile
from tailrace.text import render_item

POPULAR = ModelVersion("popular")
_DAY = HALF_LIVES_S.index(86_400.0)


def rank_popular(asked: Asked, catalogue: Catalogue) -> tuple[list[RecommendedItem], bytes]:
    """Returns the slate and the encoded impression, which carries no features: it says what was shown, no more.

    No chance is involved: everything that may be shown is ranked, so each propensity is 1.
    """
    request, now_ms = asked.request, asked.now_ms
    profile = Profile(request.user_id) if asked.profile is None else decode_profile(asked.profile)
    rows_N = allowed_rows(
        catalogue,
        PoolRequest(
            profile=profile,
            now_ms=now_ms,
            num_candidates=len(catalogue),
            candidates=request.candidates,
            exclude=request.exclude,
            filters=request.filters,
            keep_seen=request.include_seen,
        ),
    )
    users_N, praise_N = (catalogue.trend(kind, _DAY, now_ms)[rows_N] for kind in ("users", "rated_up"))
    heat_N = users_N + praise_N
    age_h_N = np.maximum(now_ms - catalogue.created_ms()[rows_N], 0) / 3_600_000
    scores_N = (heat_N + 0.5) / np.sqrt(age_h_N + 1.0)
    best = np.argsort(-scores_N, kind="stable")[: request.n]
    found = zip(catalogue.items_at(rows_N[best]), scores_N[best].tolist(), heat_N[best].tolist(), strict=True)
    shown = [(item, score, heat) for item, score, heat in found if item is not None]
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
            for position, (item, score, _) in enumerate(shown)
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
            reasons=["popular of late" if heat >= 1 else "among the newest"] if request.explain else None,
        )
        for position, (item, score, heat) in enumerate(shown)
    ]
    return items, encode(impression)
