"""How much less a lower place of a slate is looked at, learned from explored places. Pure.

Logged clicks favour whoever made the slate: what stood high was seen more. Explored items were put where they stand by
lot, whatever their worth, so their clicks by position show the seeing alone (Joachims, Swaminathan and Schnabel 2017,
whose power law this takes). Dividing gains by it lets a challenger with another order be judged fairly.

Only those count that the slate would not have held anyway. The pool is the next best after what is placed: the second
best of all can be drawn for the first place and never for the last, and the first would seem more seen than it is.

Shapes: K positions, N candidates.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from training.examples import Example

Reals = NDArray[np.float64]

_STEEPNESS = np.linspace(0.0, 2.0, 81)
_PRIOR_SD = 0.5  # without evidence no place is less seen than another; errs towards the champion
_LEAST_SEEN = 0.1  # below this a single click would outweigh ten


def fit_examination(examples: Sequence[Example], num_positions: int) -> Reals:
    """Returns float64 [K]: the chance that a position is looked at, relative to the first.

    It is (position + 1) ** -steepness, no less than a tenth, with the likeliest steepness from 0 to 2 given the clicks
    on explored items, under a half-normal prior.
    """
    shown = np.zeros(num_positions)
    clicks = np.zeros(num_positions)
    for example in examples:
        count = min(example.num_shown, num_positions)
        by_lot = np.isin(np.arange(count), example.explored)
        scores = example.scores_N[:count]
        explored = by_lot & (scores <= scores[~by_lot].min(initial=np.inf))
        shown[:count] += explored
        clicks[:count] += explored & example.clicked_N[:count]
    # Poisson clicks with the rate of the first place profiled out: what remains is multinomial over the places.
    places = np.log(np.arange(num_positions) + 1)
    logs_GK = -_STEEPNESS[:, None] * places + np.log(np.maximum(shown, 1e-12))
    shares_GK = logs_GK - np.logaddexp.reduce(logs_GK, axis=1, keepdims=True)
    likelihood_G = shares_GK @ clicks - (_STEEPNESS / _PRIOR_SD) ** 2 / 2
    steepness = float(_STEEPNESS[int(np.argmax(likelihood_G))])
    result: Reals = np.maximum((np.arange(num_positions) + 1.0) ** -steepness, _LEAST_SEEN)
    return result


def places_seen(example: Example, seen_K: Reals) -> Reals:
    """Returns float64 [num_shown]: the chance that each place was looked at in time for a click to be in the log.

    The last of `seen_K` stands for the places after it. What is yet to arrive is as if it was yet to be looked at; who
    said "no" has looked.
    """
    result: Reals = example.arrived * seen_K[np.minimum(np.arange(example.num_shown), len(seen_K) - 1)]
    result[list(example.refused)] = 1.0
    return result
