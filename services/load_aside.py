"""Makes a version ready to serve, aside: nothing here touches what serves.

1. Open what no loaded version has, each file fetched and its checksum verified first; check that it takes the input
   we make.
2. Encode the catalogue with it, from the disk where it can; nothing, where what serves encodes items alike.
3. Warm it up on recent requests.
"""

from collections.abc import Callable, Sequence
from math import isfinite

import numpy as np

from services.bodies import Asked, RankedAnswer, RecommendationRequest
from services.loaded_model import LoadedModel
from tailrace.catalogue import Catalogue
from tailrace.errors import BundleError
from tailrace.ids import RequestId, UserId

WarmUp = Callable[[Asked, LoadedModel], RankedAnswer]

_FIRST_REQUEST = Asked(
    request_id=RequestId("warm-up"),
    request=RecommendationRequest(user_id=UserId("warm-up"), query="warm-up", dry_run=True),
    profile=None,
    now_ms=0,
    budget_s=0.0,
)


def load_aside(
    load: Callable[[], LoadedModel],
    *,
    serving: Sequence[LoadedModel],
    catalogue: Catalogue,
    requests: Sequence[Asked],
    warm_up: WarmUp,
    unwanted: Callable[[], bool],
) -> LoadedModel | None:
    """Returns the model that `load` opens, ready to serve; None where it became unwanted on the way.

    Raises BundleError, or whatever else is wrong with the bundle.
    """
    # 1. Open and check.
    model = load()
    # 2. Encode the catalogue.
    if all(one.encodings is not model.encodings for one in serving):
        while model.catch_up(catalogue):
            if unwanted():
                return None
        if not np.isfinite(model.encodings.vectors).all():
            raise BundleError(f"{model.version} makes item vectors that are not finite")
    # 3. Warm up.
    for asked in requests or [_FIRST_REQUEST]:
        if unwanted():
            return None
        _require_sound(model, warm_up(asked, model))
    return model


def _require_sound(model: LoadedModel, answer: RankedAnswer) -> None:
    if answer.degraded not in ("none", "no_profile") or not all(isfinite(item.score) for item in answer.items):
        why = f": {model.last_failure}" if model.last_failure else ""
        raise BundleError(f"{model.version} could not answer a request it was warmed up on{why}")
