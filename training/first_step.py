"""The first step of a fine-tune: tastes are learned anew, and weighed against the rest of the score.

What tags are worth to a user was said by features until then, one by one (`tailrace.responses`), and most of that is
said better by a model that infers all of it together. So three parts of the click logits are weighed against each
other on the stop slice: tastes, those features, and everything else.

Shapes: B slates, N candidates.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.responses import TOPIC_NAMES
from tailrace.tastes import TasteModel
from training.examples import Example
from training.learner import Learner, scale_clicks
from training.stop_slice import StopSlice
from training.taste_model import fit_taste_model

_BOUNDS = ((0.0, 16.0), (0.0, 16.0), (1 / 16, 16.0))  # the last part scales the whole head


class Weights(NamedTuple):
    """How much of each part of the click logits is kept, as a factor."""

    tastes: float
    topics: float
    rest: float


def learn_tastes(
    learner: Learner, examples: Sequence[Example], stop: StopSlice, seen_K: NDArray[np.float64]
) -> Weights | None:
    """Changes what the learner knows of tastes and the scale of its head, in place, and returns by which factors.

    Returns None, and changes nothing, where the stop slice is explained no better. Of a team, each calls this with the
    same examples, and all get the same.
    """
    ranker = learner.ranker
    fitted = fit_taste_model(examples, seen_K, ranker.taste_model) if stop.tells else None
    if fitted is None:
        return None
    # 1. The parts of the logits, by leaving each of them out.
    before, prior = ranker.taste_model, ranker.head.prior.detach().clone()
    of_topics = torch.tensor([name in TOPIC_NAMES for name in ranker.feature_names], device=prior.device)

    def score(taste_model: TasteModel, prior: Tensor) -> Tensor:
        ranker.taste_model = taste_model
        _put(ranker.head.prior, prior)
        return stop.score(learner)

    rest = score(TasteModel.ignorant(), prior.masked_fill(of_topics, 0.0))
    with_topics = score(TasteModel.ignorant(), prior)
    whole = score(fitted, prior)
    parts = torch.stack([whole - with_topics, with_topics - rest, rest])
    # 2. How much of each explains best what was shown. What was not is what the logging model thought little of, so it
    #    would speak for the parts that this model was made of.
    weights = Weights(*stop.weigh(learner, parts, _BOUNDS, unshown_weight=0.0))
    ranker.taste_model = replace(fitted, gain=weights.tastes / weights.rest)
    _put(ranker.head.prior, torch.where(of_topics, prior * (weights.topics / weights.rest), prior))
    scale_clicks(ranker, weights.rest)
    # 3. Kept where it is better than the parent.
    after = stop.measure(learner)
    if after is not None and after.loss < after.parent_loss:
        return weights
    scale_clicks(ranker, 1 / weights.rest)
    ranker.taste_model = before
    _put(ranker.head.prior, prior)
    return None


def _put(weights: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weights.copy_(values)
