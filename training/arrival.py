"""How much of what a slate will be clicked has been clicked when a round looks at it. Pure.

The newest slates were shown minutes ago, and some of their clicks are yet to come: to take what is missing for a "no"
would teach that new items, and whatever the newest model chose, are worse than they are. How many are missing follows
from how old a slate is and how long clicks take (Chapelle 2014, "Modeling delayed feedback in display advertising").
How long they take is read off the clicks that are there, of which the slow ones are seen on old slates alone
(Lagakos, Barraj and De Gruttola 1988, "Nonparametric analysis of truncated survival data, with application to AIDS").

A click that is yet to come is then what one is on a place that was not looked at: see `examination.places_seen`.

Shapes: C clicks, D distinct delays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from training.examples import Example

Reals = NDArray[np.float64]

_LEAST_CLICKS = 50  # of fewer no distribution is made
_LEAST_ARRIVED = 0.1  # below this a single click would outweigh ten


@dataclass(frozen=True)
class Arrival:
    """The share of clicks that take no longer than this or that; of those that come within the window at all."""

    delays_D: Reals  # seconds, ascending
    shares_D: Reals  # float64: of clicks that take less than each

    def share(self, age_s: float) -> float:
        """Returns which share of its clicks a slate of this age has, from a tenth to 1."""
        slower = int(np.searchsorted(self.delays_D, age_s, side="right"))
        return 1.0 if slower == len(self.delays_D) else max(float(self.shares_D[slower]), _LEAST_ARRIVED)


AT_ONCE = Arrival(np.zeros(0), np.zeros(0))


def fit_arrival(examples: Sequence[Example], cutoff_ms: int) -> Arrival:
    """Returns how clicks arrive, from those that came before the cut-off; at once, where there are too few to tell."""
    delays_C = np.array([delay for example in examples for delay in example.delays_s])
    if len(delays_C) < _LEAST_CLICKS:
        return AT_ONCE
    ages_C = np.repeat([_age_s(one, cutoff_ms) for one in examples], [len(one.delays_s) for one in examples])
    delays_D, clicks_D = np.unique(delays_C, return_counts=True)
    # As quick clicks, on slates old enough for this delay to be seen: of those, so many took exactly as long.
    comparable_D = np.cumsum(clicks_D) - np.searchsorted(np.sort(ages_C), delays_D, side="left")
    quicker_D = 1.0 - clicks_D / np.maximum(comparable_D, clicks_D)
    return Arrival(delays_D, np.cumprod(quicker_D[::-1])[::-1])


def with_arrival(examples: Sequence[Example], arrival: Arrival, cutoff_ms: int) -> list[Example]:
    """Returns the examples, each with the share of its clicks that has arrived by the cut-off."""
    shares = [arrival.share(_age_s(one, cutoff_ms)) for one in examples]
    return [one if share == 1.0 else replace(one, arrived=share) for one, share in zip(examples, shares, strict=True)]


def _age_s(example: Example, cutoff_ms: int) -> float:
    return (cutoff_ms - example.at_ms) / 1000
