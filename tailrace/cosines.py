"""How near the candidates' vectors are to the user, the query and what the user touched of late. Pure.

Shapes: N candidates, D vector size, R recent items of the user.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.ids import ItemId
from tailrace.profile import Profile
from tailrace.text import item_words

Floats = NDArray[np.float32]

HISTORY_ITEMS = 20


@dataclass(frozen=True)
class Cosines:
    """How near each candidate's vector is to the user's text, the query, the mean of and the nearest recent item."""

    user_N: Floats
    query_N: Floats
    history_N: Floats
    recent_N: Floats


def history_items(profile: Profile) -> list[ItemId]:
    """Returns the newest items that the user received well or at least opened, newest first, HISTORY_ITEMS at most."""
    return [item_id for item_id, word in item_words(profile).items() if word != "disliked"][:HISTORY_ITEMS]


def history_mean(recent_RD: NDArray[np.floating]) -> Floats | None:
    """Returns float32 [D]: the mean of the unit vectors of the recent items, or None where there are none."""
    if not len(recent_RD):
        return None
    mean: Floats = _unit(recent_RD).mean(axis=0)
    return mean


def make_cosines(
    items_ND: NDArray[np.floating],
    user_D: NDArray[np.floating] | None,
    query_D: NDArray[np.floating] | None,
    recent_RD: NDArray[np.floating] | None,
) -> Cosines:
    """Returns the cosines that `compute_features` takes, zeros for what is absent.

    Rows of `recent_RD` are the vectors of `history_items`; leave out what has none.
    """
    items_ND = _unit(items_ND)
    silent = np.zeros(len(items_ND), dtype=np.float32)
    if recent_RD is None or not len(recent_RD):
        history_N = recent_N = silent
    else:
        near_NR = items_ND @ _unit(recent_RD).T
        mean_D = _unit(recent_RD).mean(axis=0, keepdims=True)
        history_N, recent_N = (items_ND @ _unit(mean_D).T)[:, 0], near_NR.max(axis=1)
    return Cosines(
        user_N=silent if user_D is None else items_ND @ _unit(user_D[None])[0],
        query_N=silent if query_D is None else items_ND @ _unit(query_D[None])[0],
        history_N=history_N,
        recent_N=recent_N,
    )


def _unit(vectors: NDArray[np.floating]) -> Floats:
    wide = vectors.astype(np.float32)
    result: Floats = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-9)
    return result
