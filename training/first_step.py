"""The first step of a fine-tune: the weights of all pairs of tags at once, along the gradient, as far as it helps.

There is a weight for every taste and every tag, and far fewer slates that tell of them. Adam moves each weight as fast
as any other, so it learns what one slate says of a rare pair as quickly as what hundreds say of a common one; the
gradient over all examples moves each by its evidence. So learning begins with one step of steepest descent, its length
chosen on the stop slice: a round of gradient boosting (Friedman 2001, "Greedy function approximation: a gradient
boosting machine"). In the world of `tailrace lab` it is worth more than all the epochs after it.
"""

import torch
from torch import Tensor

from training.course import score_batch
from training.dataset import Corpus, Precision
from training.learner import Learner, both_ways
from training.losses import listwise_loss
from training.stop_slice import StopSlice

_SHORTEST, _LONGEST = 2.0**-6, 2.0**6  # of the largest change of a weight: logits per unit of taste


def step_along_pairs(
    learner: Learner, corpus: Corpus, stop: StopSlice, precision: Precision, *, unshown_weight: float
) -> float:
    """Changes the pair weights of the learner's head, in place, and returns by how much at most; 0 where nothing helps.

    The listwise loss is convex along the step, so its length is doubled for as long as the stop slice does better.
    Of a team, each calls it with its own part of the corpus, and all take the same step.
    """
    weights = learner.ranker.head.taste_weights
    start, direction = weights.detach().clone(), _steepest(learner, corpus, precision, unshown_weight)
    figures = stop.measure(learner)
    if figures is None or not direction.any():
        return 0.0
    least, best, length = figures.loss, 0.0, _SHORTEST
    while length <= _LONGEST:
        _put(weights, start + length * direction)
        figures = stop.measure(learner)
        if figures is None or not figures.loss < least:
            break
        least, best, length = figures.loss, length, 2 * length
    _put(weights, start + best * direction)
    return best


def _steepest(learner: Learner, corpus: Corpus, precision: Precision, unshown_weight: float) -> Tensor:
    """Returns the direction [V,V] in which the listwise loss of all lessons falls most, its largest element 1."""
    weights = learner.ranker.head.taste_weights
    total = torch.zeros_like(weights)
    learner.eval()
    for chosen in corpus.passes(range(len(corpus))):
        labels = corpus.labels(chosen)
        taught = int(((labels.gains * labels.shown).sum(1) > 0).sum())
        if not taught:
            continue
        scores = score_batch(learner, corpus, chosen, labels, precision)
        loss = listwise_loss(
            scores.logits + scores.place_bias.detach(),
            labels.gains,
            labels.shown,
            labels.real,
            unshown_weight=unshown_weight,
        )
        if loss.requires_grad:  # of a team, not everybody has an example in every pass
            total -= taught * torch.autograd.grad(loss, weights)[0]
    total = both_ways(corpus.team.add_up(total))
    largest = total.abs().max()
    return total / largest if largest > 0 else total


def _put(weights: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weights.copy_(values)
