"""Which items a challenger would put elsewhere: what a person looks at first to see what a round has changed. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.examples import Example


@dataclass(frozen=True)
class ItemMove:
    """An item whose place changed: mean place among the candidates it stood with, from 1, under each model."""

    text: str
    times: int
    champion_place: float
    challenger_place: float


def item_moves(
    examples: Sequence[Example],
    champion: Sequence[NDArray[np.floating]],
    challenger: Sequence[NDArray[np.floating]],
    *,
    most: int = 10,
) -> list[ItemMove]:
    """Returns the items that the challenger moves most, by mean change of place, risen and fallen together."""
    places: dict[str, list[tuple[int, int]]] = {}
    for example, usual, own in zip(examples, champion, challenger, strict=True):
        ranks = [np.argsort(np.argsort(-np.nan_to_num(of, nan=-np.inf), kind="stable")) + 1 for of in (usual, own)]
        for text, before, after in zip(example.texts, *(of.tolist() for of in ranks), strict=True):
            places.setdefault(text, []).append((before, after))
    moves = [
        ItemMove(text, len(pairs), *(sum(column) / len(pairs) for column in zip(*pairs, strict=True)))
        for text, pairs in places.items()
    ]
    # An item seen once may jump by chance: a change counts by the root of how often it was seen.
    weight = {move.text: abs(move.champion_place - move.challenger_place) * move.times**0.5 for move in moves}
    return sorted(moves, key=lambda move: (-weight[move.text], move.text))[:most]
