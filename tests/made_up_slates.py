"""Examples made up for tests of training: slates with labels, no text model behind them."""

from collections.abc import Sequence

import numpy as np

from tailrace.features import FEATURE_NAMES
from tailrace.ids import ItemId, ModelVersion, RequestId, UserId
from tailrace.tastes import no_tastes
from training.examples import Example


def make_example(
    clicked: Sequence[bool | int],
    *,
    gains: Sequence[float] | None = None,
    unshown: int = 0,
    items: Sequence[str] | None = None,
    propensities: Sequence[float] | None = None,
    number: int = 0,
    **features: float,
) -> Example:
    """Returns an example that shows `len(clicked)` items; a gain is 1 where clicked, unless given."""
    shown = len(clicked)
    count = shown + unshown
    item_ids = tuple(ItemId(item) for item in items or [f"i{index}" for index in range(count)])
    features_NF = np.zeros((count, len(FEATURE_NAMES)), np.float32)
    for name, value in features.items():
        features_NF[:, FEATURE_NAMES.index(name)] = value
    padding = [0.0] * unshown
    return Example(
        request_id=RequestId(f"r{number}"),
        user_id=UserId(f"u{number}"),
        at_ms=1_790_000_000_000 + number,
        model_version=ModelVersion("v1"),
        user_text=f"likes number {number}",
        item_ids=item_ids,
        texts=tuple(f"text of {item_id}" for item_id in item_ids),
        num_shown=shown,
        features_NF=features_NF,
        tastes=no_tastes(count),
        scores_N=np.zeros(count, np.float32),
        propensities_N=np.array([*(propensities or [1.0] * shown), *[np.nan] * unshown], np.float32),
        explored=tuple(np.flatnonzero(np.array(propensities or [1.0] * shown) < 0.5).tolist()),
        gains_N=np.array([*(clicked if gains is None else gains), *padding], np.float32),
        clicked_N=np.array([*clicked, *padding], np.bool_),
        ratings_N=np.full(count, np.nan, np.float32),
    )


def make_examples(
    count: int, *, shown: int = 8, unshown: int = 4, catalogue: int = 60, seed: int = 0
) -> tuple[list[Example], list[np.ndarray]]:
    """Returns random slates, with the hidden worth [N] of every candidate, which decides the clicks."""
    rng = np.random.default_rng(seed)
    examples, worths = [], []
    for number in range(count):
        worth = rng.normal(size=shown + unshown)
        clicked = rng.random(shown) < 1 / (1 + np.exp(1.5 - 1.5 * worth[:shown]))
        items = [f"i{index}" for index in rng.choice(catalogue, size=shown + unshown, replace=False)]
        known = float(rng.random() < 0.8)
        examples.append(
            make_example(
                clicked.tolist(),
                gains=(clicked * rng.choice([1.0, 2.0, 4.0], size=shown)).tolist(),
                unshown=unshown,
                items=items,
                number=number,
                user_known=known,
                user_events=float(np.log1p(known * rng.integers(1, 300))),
                mobile=float(rng.random() < 0.5),
            )
        )
        worths.append(worth)
    return examples, worths
