"""The slice on which a fine-tune is stopped: what learners say of examples they do not learn from.

Shapes: B examples, N candidates.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.dataset import Corpus
from training.learner import Learner
from training.losses import listwise_loss, ndcg
from training.precision import Precision


@dataclass(frozen=True)
class StopFigures:
    """The stop slice under one model: mean listwise loss, the parent's with the same position bias, mean NDCG@10."""

    loss: float
    parent_loss: float
    ndcg_10: float


class StopSlice:
    """The impressions that end training, with what the parent says of them."""

    def __init__(self, corpus: Corpus, parent: Learner, precision: Precision, unshown_weight: float) -> None:
        self._corpus, self._precision, self._unshown_weight = corpus, precision, unshown_weight
        # Without a slate that has a gain nothing can be told of anybody.
        self.tells = any(example.gains_N[: example.num_shown].any() for example in corpus.examples)
        if self.tells:
            self._labels = corpus.labels(range(len(corpus)))
            self._parent = self.score(parent)

    def measure(self, learner: Learner) -> StopFigures | None:
        """Returns how the learner does, or None where no slate tells.

        Clicks were logged under the parent's order, so a position bias left out would speak for the parent; both
        models are given the learner's.
        """
        if not self.tells:
            return None
        labels = self._labels
        with torch.no_grad():
            logits, bias = self.score(learner), learner.place_bias(labels.shown)
        own, usual = (
            listwise_loss(one + bias, labels.gains, labels.shown, labels.real, unshown_weight=self._unshown_weight)
            for one in (logits, self._parent)
        )
        return StopFigures(float(own), float(usual), float(ndcg(logits, labels.gains, labels.shown).nanmean()))

    def score(self, learner: Learner) -> Tensor:
        """Returns the learner's click logits [B,N], 0 where there is no candidate."""
        found = score_corpus(learner, self._corpus, self._precision, range(len(self._corpus)))
        return pad_logits(list(found.values()), self._labels.real)


def score_corpus(learner: Learner, corpus: Corpus, precision: Precision, among: Sequence[int]) -> dict[int, Tensor]:
    """Returns the click logits [N] of examples by their number, on the CPU. A team shares the work out."""
    learner.eval()
    numbers, widths = list(among), corpus.widths
    rows = {index: row for row, index in enumerate(numbers)}
    said = torch.zeros(len(numbers), max((widths[index] for index in numbers), default=0), device=corpus.device)
    for chosen in corpus.passes([index for index in numbers if corpus.team.owns(index)]):
        with torch.no_grad():
            logits = learner(corpus.batch(chosen, learner.ranker.taste_model), precision)[0]
        said[[rows[index] for index in chosen], : logits.shape[1]] = logits
    found = corpus.team.add_up(said).cpu()
    return {index: row[: widths[index]] for index, row in zip(numbers, found, strict=True)}


def pad_logits(logits: Sequence[Tensor | None], real_BN: Tensor) -> Tensor:
    """Returns logits as [B,N], zeros where there are none."""
    padded = torch.zeros(real_BN.shape)
    for row, one in enumerate(logits):
        if one is not None:
            padded[row, : len(one)] = one
    return padded.to(real_BN.device)
