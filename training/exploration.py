"""What exploration costs: the click rate that the same rankers would have had without it. Pure."""

from collections.abc import Sequence

import numpy as np

from training.examples import Example, Floats
from training.off_policy import OffPolicy, Reals, estimate, logged_slates, target_probabilities


def without_exploration(examples: Sequence[Example]) -> OffPolicy:
    """Returns what these requests would have earned, had each place gone to the first choice for it.

    That policy shows what was shown wherever no lot was drawn, so any log knows it well; of another ranker's choice a
    log that explores little knows next to nothing. Slates without sound propensities, as others may log them, are left
    out. Raises TooLittleOverlap where too few slates were shown without a lot, which is also so of few slates.
    """
    told = [one for one in examples if _sound(one.propensities_N[: one.num_shown])]
    return estimate(logged_slates(told), target_probabilities(told, _first_choice))


def _sound(propensities_K: Floats) -> bool:
    return bool(((propensities_K > 0) & (propensities_K <= 1)).all())


def _first_choice(example: Example) -> Reals:
    return np.isin(np.arange(example.num_shown), example.explored, invert=True).astype(np.float64)
