"""Makes a version ready to serve, aside: nothing here touches what serves.

1. Fetch the bundle and verify its checksums.
2. Open its sessions, and check that it takes the input we make.
3. Encode the catalogue with it, from the disk where it can.
4. Warm it up on recent requests.
"""

from collections.abc import Callable, Sequence
from math import isfinite
from pathlib import Path

import numpy as np

from services.bodies import Asked, RankedAnswer, RecommendationRequest
from services.loaded_model import LoadedModel
from tailrace.catalogue import Catalogue
from tailrace.errors import BundleError
from tailrace.ids import ModelVersion, RequestId, UserId

WarmUp = Callable[[Asked, LoadedModel], RankedAnswer]

_FIRST_REQUEST = Asked(
    request_id=RequestId("warm-up"),
    request=RecommendationRequest(user_id=UserId("warm-up"), query="warm-up", dry_run=True),
    profile=None,
    now_ms=0,
    budget_s=0.0,
)


def load_aside(
    version: ModelVersion,
    *,
    fetch: Callable[[], Path],
    load: Callable[[Path], LoadedModel],
    catalogue: Catalogue,
    requests: Sequence[Asked],
    warm_up: WarmUp,
    unwanted: Callable[[], bool],
) -> LoadedModel | None:
    """Returns the model, ready to serve; None where it became unwanted on the way.

    Raises BundleError, or whatever else is wrong with the bundle.
    """
    # 1. and 2. Fetch, verify, open, check.
    model = load(fetch())
    try:
        # 3. Encode the catalogue.
        while model.catch_up(catalogue):
            if unwanted():
                model.retire()
                return None
        if not np.isfinite(model.encodings.vectors).all():
            raise BundleError(f"{version} makes item vectors that are not finite")
        # 4. Warm up.
        for asked in requests or [_FIRST_REQUEST]:
            _require_sound(model, warm_up(asked, model))
    except Exception:
        model.retire()
        raise
    return model


def _require_sound(model: LoadedModel, answer: RankedAnswer) -> None:
    if answer.degraded not in ("none", "no_profile") or not all(isfinite(item.score) for item in answer.items):
        why = f": {model.last_failure}" if model.last_failure else ""
        raise BundleError(f"{model.version} could not answer a request it was warmed up on{why}")
