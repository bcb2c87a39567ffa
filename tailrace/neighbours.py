"""Who touched what the user touched, and what else they touched: co-visits and shared visitors. Pure.

Shapes: N candidates, V visitors kept of an item, B buckets of users.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from tailrace.catalogue import Catalogue, Floats, ItemRows, Rows
from tailrace.cosines import history_items
from tailrace.counters import HALF_LIVES_S, KINDS, VISITOR_BUCKETS, visitor_bucket
from tailrace.ids import ItemId
from tailrace.profile import Profile

COVISIT_NAMES = ("covisit", "covisit_share", "covisit_last", "covisit_history", "covisit_history_share")
OVERLAP_NAMES = ("overlap", "overlap_share", "overlap_best", "overlap_6h", "overlap_30m")


def covisit_columns(
    catalogue: Catalogue, rows_N: Rows, held: ItemRows, profile: Profile, now_ms: int
) -> Mapping[str, Floats]:
    """Returns columns [N]: how often an item is touched close to the user's last five, to the last, to the last 20."""
    of_last, of_five, of_history = (
        _sum_covisits(catalogue, item_ids, now_ms)
        for item_ids in (profile.clicks.last_items[-1:], profile.clicks.last_items, history_items(profile))
    )
    covisits_N3 = np.zeros((len(rows_N), 3))
    if of_five or of_history:
        for index, item in enumerate(catalogue.items_at(rows_N.tolist())):
            if item is not None:
                key = item.item_id
                covisits_N3[index] = of_five.get(key, 0.0), of_last.get(key, 0.0), of_history.get(key, 0.0)
    users_7d_N = held.sums_NKH[:, KINDS.index("users"), HALF_LIVES_S.index(604_800.0)]
    logs_N3 = np.log1p(covisits_N3)
    return {
        "covisit": logs_N3[:, 0],
        "covisit_share": np.minimum(covisits_N3[:, 0] / (users_7d_N + 5.0), 1.0),
        "covisit_last": logs_N3[:, 1],
        "covisit_history": logs_N3[:, 2],
        "covisit_history_share": np.minimum(covisits_N3[:, 2] / (users_7d_N + 5.0), 4.0),
    }


def _sum_covisits(catalogue: Catalogue, item_ids: Sequence[ItemId], now_ms: int) -> dict[ItemId, float]:
    weights: dict[ItemId, float] = {}
    for item_id in item_ids:
        for other, weight in catalogue.covisits(item_id, now_ms).items():
            weights[other] = weights.get(other, 0.0) + weight
    return weights


def overlap_columns(catalogue: Catalogue, held: ItemRows, profile: Profile, now_ms: int) -> Mapping[str, Floats]:
    """Returns columns [N]: how many of the item's last visitors are last visitors of what the user touched, too.

    A visitor counts once for each item shared with the user: user-based collaborative filtering (Resnick et al. 1994)
    on the newest visitors alone, which is what a bounded state can know.
    """
    touched = catalogue.rows(history_items(profile))
    if not len(touched):
        return dict.fromkeys(OVERLAP_NAMES, np.zeros(len(held.visitors_NV), dtype=np.float32))
    met = catalogue.visitors(touched).ravel()
    # The entry after the last bucket stands for nobody: NOBODY is -1.
    shared_B = np.bincount(met[met >= 0], minlength=VISITOR_BUCKETS + 1).astype(np.float32)
    shared_B[visitor_bucket(profile.user_id)] = 0.0
    shared_NV = shared_B[held.visitors_NV]
    age_s_NV = np.maximum(now_ms - held.visits_ms_NV, 0) / 1000
    total_N = shared_NV.sum(1)
    return {
        "overlap": np.log1p(total_N),
        "overlap_share": total_N / ((held.visitors_NV >= 0).sum(1) + 3),
        "overlap_best": np.log1p(shared_NV.max(1)),
        "overlap_6h": np.log1p((shared_NV * np.exp2(-age_s_NV / 21_600)).sum(1)),
        "overlap_30m": np.log1p((shared_NV * np.exp2(-age_s_NV / 1800)).sum(1)),
    }
