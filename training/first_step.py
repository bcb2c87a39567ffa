"""The first step of a fine-tune: tastes are learned anew, and weighed against the rest of the score.

What tags are worth to a user was said by features until then, one by one (`tailrace.responses`), and most of that is
said better by a model that infers all of it together. So three parts of the click logits are weighed against each
other: tastes, those features, and everything else.

Shapes: B lessons, N candidates.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tailrace.responses import TOPIC_NAMES
from tailrace.tastes import TasteModel
from training.dataset import Corpus
from training.examples import Example
from training.learner import Learner
from training.logit_scale import scale_clicks
from training.losses import best_factors
from training.precision import Precision
from training.stop_slice import pad_logits, score_corpus
from training.taste_model import fit_taste_model

_MOST, _LEAST_REST = 16.0, 1 / 16  # of a factor; the last scales the whole head
_PULL = 1.0  # the factors are expected to be 1, give or take as much: little evidence leaves them there


class Factors(NamedTuple):
    """How much of each part of the click logits is kept."""

    tastes: float
    topics: float
    rest: float


def learn_tastes(
    learner: Learner, examples: Sequence[Example], corpus: Corpus, precision: Precision, seen_K: NDArray[np.float64]
) -> Factors | None:
    """Changes what the learner knows of tastes and the scale of its head, in place, and returns by which factors.

    `examples` are all there are to learn from, `corpus` what was chosen of them, in the head's standard units. Returns
    None, and changes nothing, where all or nothing was clicked. Of a team, each calls this with the same examples, and
    all get the same.
    """
    # 1. Tastes, of all users and of each half of them.
    ranker, lessons = learner.ranker, corpus.examples
    fitted = _as_leader(corpus, fit_taste_model(examples, seen_K, ranker.taste_model))
    if fitted is None:
        return None
    halves = [[one for one in examples if _half(one) == half] for half in (0, 1)]
    of_half = [fit_taste_model(half, seen_K, ranker.taste_model) or TasteModel.ignorant() for half in halves]
    # 2. The parts of the logits. A user's clicks have a say in what is known, so it is told by the other half.
    tastes = [torch.from_numpy(of_half[1 - _half(one)].worth_of(one.tastes)) for one in lessons]
    prior = ranker.head.prior.detach().clone()
    of_topics = torch.tensor([name in TOPIC_NAMES for name in ranker.feature_names], device=prior.device)
    known, ranker.taste_model = ranker.taste_model, TasteModel.ignorant()
    with_topics = list(score_corpus(learner, corpus, precision, range(len(corpus))).values())
    # The prior is linear, so what it makes of topics is known without scoring everything once more.
    topics_F = prior.masked_fill(~of_topics, 0.0).cpu().numpy()
    topics = [torch.from_numpy(corpus.features(index) @ topics_F) for index in range(len(corpus))]
    # 3. How much of each explains best what was shown. What was not is what the logging model thought little of, so it
    #    would speak for the parts that this model was made of.
    labels = corpus.labels(range(len(corpus)))
    before = [of + torch.from_numpy(known.worth_of(one.tastes)) for of, one in zip(with_topics, lessons, strict=True)]
    told_BN, topics_BN, with_topics_BN, before_BN = (
        pad_logits(of, labels.real) for of in (tastes, topics, with_topics, before)
    )
    parts = torch.stack([told_BN, topics_BN, with_topics_BN - topics_BN])
    with torch.no_grad():
        bias = learner.place_bias(labels.shown)
    found = best_factors(
        parts,
        labels.gains,
        labels.shown,
        labels.real,
        bias,
        [(0.0, _MOST), (0.0, _MOST), (_LEAST_REST, _MOST)],
        unshown_weight=0.0,
        pull=_PULL,
    )
    factors = Factors(*corpus.team.as_leader(torch.tensor(found, device=corpus.device)).tolist())
    _put(ranker.head.prior, torch.where(of_topics, prior * (factors.topics / factors.rest), prior))
    ranker.taste_model = replace(fitted, gain=factors.tastes / factors.rest)
    scale_clicks(ranker, factors.rest)
    # 4. Ratings rise with the sum of the parts, and keep their spread: else all would end at one star or at five.
    after = torch.tensordot(torch.tensor(factors, device=parts.device), parts, dims=1)
    spreads = [float(of[labels.real].std()) for of in (before_BN, after)]
    if min(spreads) > 0:
        _put(ranker.head.rating_affine[0], ranker.head.rating_affine[0] * (factors.rest * spreads[0] / spreads[1]))
    return factors


def _as_leader(corpus: Corpus, model: TasteModel | None) -> TasteModel | None:
    """Returns the first one's model to all of a team. Which tags are known all find alike, and whether anything is."""
    if model is None or corpus.team.size == 1:
        return model

    def say(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return corpus.team.as_leader(torch.from_numpy(values).to(corpus.device)).cpu().numpy()

    return replace(
        model,
        mean_T=say(model.mean_T),
        covariance_TT=say(model.covariance_TT),
        rate_T=say(model.rate_T),
        information_T=say(model.information_T),
        together_TT=say(model.together_TT),
    )


def _half(example: Example) -> int:
    """Returns to which half of the users this one's belongs, 0 or 1: always the same."""
    return crc32(example.user_id.encode()) % 2


def _put(weights: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weights.copy_(values)
