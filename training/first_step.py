"""The first step of a fine-tune: the weights of all pairs of tags at once, along the gradient, as far as it helps.

There is a weight for every taste and every tag, and far fewer slates that tell of them. Adam moves each weight as fast
as any other, so it learns what one slate says of a rare pair as quickly as what hundreds say of a common one; the
gradient over all examples moves each by its evidence. So learning begins with one step of steepest descent, its length
chosen on the stop slice: a round of gradient boosting (Friedman 2001, "Greedy function approximation: a gradient
boosting machine").

Shapes: B slates, N candidates, V buckets of tags.
"""

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from training.course import score_batch
from training.dataset import Corpus, Precision
from training.learner import Learner, both_ways
from training.losses import listwise_loss
from training.stop_slice import StopSlice

_LONGEST = 64.0  # of the largest change of a weight, in logits per unit of taste: tags that tell all end there
_NEAR_ENOUGH = 0.01


def step_along_pairs(
    learner: Learner, corpus: Corpus, stop: StopSlice, precision: Precision, *, unshown_weight: float
) -> float:
    """Changes the pair weights of the learner's head, in place, and returns by how much at most; 0 where nothing helps.

    Logits are linear in the length of the step, and the listwise loss is convex in it, so the stop slice is scored at
    two lengths only. Of a team, each calls this with its own part of the corpus, and all take the same step.
    """
    weights = learner.ranker.head.taste_weights
    start, direction = weights.detach().clone(), _steepest(learner, corpus, precision, unshown_weight)
    if not direction.any() or not torch.isfinite(direction).all():
        return 0.0
    before = stop.score(learner)
    _put(weights, start + direction)
    after = stop.score(learner)

    def loss(length: float) -> float:
        figures = stop.judge(learner, {index: torch.lerp(before[index], after[index], length) for index in before})
        return float("inf") if figures is None else figures.loss

    found = minimize_scalar(loss, bounds=(0.0, _LONGEST), method="bounded", options={"xatol": _NEAR_ENOUGH})
    length = float(found.x) if found.fun < loss(0.0) else 0.0
    _put(weights, start + length * direction if length else start)
    return length


def _steepest(learner: Learner, corpus: Corpus, precision: Precision, unshown_weight: float) -> Tensor:
    """Returns the direction [V,V] in which the listwise loss of all lessons falls most, its largest element 1."""
    head = learner.ranker.head
    total = torch.zeros_like(head.taste_weights)
    learner.eval()
    for chosen in corpus.passes(range(len(corpus))):
        labels = corpus.labels(chosen)
        own_B = [corpus.team.owns(index) for index in chosen]
        taught = int(((labels.gains * labels.shown).sum(1) > 0).sum())
        with torch.no_grad():
            scores = score_batch(learner, corpus, chosen, labels, precision)
        if not taught or not any(own_B):
            continue
        # 1. What each logit should have been raised by.
        logits_BN = (scores.logits + scores.place_bias).requires_grad_()
        loss = listwise_loss(logits_BN, labels.gains, labels.shown, labels.real, unshown_weight=unshown_weight)
        raise_BN = -taught * torch.autograd.grad(loss, logits_BN)[0]
        # 2. And by it each pair: no gradient has to pass through a layer.
        batch = corpus.batch([index for index, own in zip(chosen, own_B, strict=True) if own])
        worth_BN = head.tag_worth(batch.tastes, batch.tags)
        raised = (raise_BN[own_B][:, : worth_BN.shape[1]] * worth_BN).sum()
        total += torch.autograd.grad(raised, head.taste_weights)[0]
    total = both_ways(corpus.team.add_up(total))
    largest = total.abs().max()
    return total / largest if largest > 0 else total


def _put(weights: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        weights.copy_(values)
