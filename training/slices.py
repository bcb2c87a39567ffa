"""Kinds of examples that a model may serve unequally well. Pure.

Shapes: E examples, F features, N candidates.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tailrace.features import FEATURE_NAMES
from training.examples import Example
from training.popularity import Popularity

Flags = NDArray[np.bool_]


def slice_masks(examples: Sequence[Example], popularity: Popularity) -> dict[str, Flags]:
    """Returns bool [E] for each slice that has an example: by user, by device, and where a new item was clicked."""
    user_FE = np.stack([example.features_NF[0] for example in examples], axis=1)
    known_E, events_E, mobile_E = (
        user_FE[FEATURE_NAMES.index(name)] for name in ("user_known", "user_events", "mobile")
    )
    events_E = np.round(np.expm1(events_E))
    new_clicked = [
        any(
            clicked and popularity.is_new(item_id)
            for item_id, clicked in zip(example.item_ids, example.clicked_N.tolist(), strict=True)
        )
        for example in examples
    ]
    masks: dict[str, Flags] = {
        "new users": known_E == 0,
        "history under 10 events": (known_E > 0) & (events_E < 10),
        "history of 10 to 99 events": (known_E > 0) & (events_E >= 10) & (events_E < 100),
        "history of 100 events or more": (known_E > 0) & (events_E >= 100),
        "a new item was clicked": np.array(new_clicked, dtype=np.bool_),
        "mobile": mobile_E > 0,
        "other or unknown device": mobile_E == 0,
    }
    return {name: mask_E for name, mask_E in masks.items() if mask_E.any()}
