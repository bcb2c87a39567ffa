"""The scale and the level of a ranker's click logits: they order nothing anew, and training begins with both right.

Shapes: B slates, N candidates, R items shown, K places.
"""

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from training.dataset import Corpus
from training.examination import places_seen
from training.head import Head
from training.learner import Learner
from training.losses import best_factors
from training.model import SplitRanker
from training.precision import Precision
from training.stop_slice import pad_logits, score_corpus

CALIBRATION_LESSONS = 1000  # enough to find the scale and the level of the logits


def scale_to_clicks(
    parent: Learner, corpus: Corpus, precision: Precision, unshown_weight: float, seen_K: NDArray[np.float64]
) -> None:
    """Scales the parent's click logits, in place, as its order of the lessons deserves, the K places being so seen."""
    among = _calibrating(corpus)
    logits = score_corpus(parent, corpus, precision, among)
    labels = corpus.labels(among)
    bias = [torch.from_numpy(np.log(places_seen(corpus.lessons[index].example, seen_K))) for index in among]
    [factor] = best_factors(
        pad_logits([logits[index] for index in among], labels.real).unsqueeze(0),
        labels.gains,
        labels.shown,
        labels.real,
        pad_logits(bias, labels.real),
        [(1 / 16, 16.0)],
        unshown_weight=unshown_weight,
    )
    scale_clicks(parent.ranker, factor)


def find_level(learner: Learner, corpus: Corpus, precision: Precision, seen_K: NDArray[np.float64]) -> float:
    """Returns what the learner's click logits lack for clicks to be as likely as they were frequent."""
    among = _calibrating(corpus)
    logits = score_corpus(learner, corpus, precision, among)
    lessons = [corpus.lessons[index] for index in among]
    counts = [lesson.example.num_shown for lesson in lessons]
    shown = [logits[index][:count].double().numpy() for index, count in zip(among, counts, strict=True)]
    return level_shift(
        np.concatenate(shown) + np.log(np.concatenate([places_seen(lesson.example, seen_K) for lesson in lessons])),
        np.concatenate([lesson.example.clicked_N[:count] for lesson, count in zip(lessons, counts, strict=True)]),
        np.repeat([lesson.weight for lesson in lessons], counts),
    )


def scale_clicks(ranker: SplitRanker, factor: float) -> None:
    """Multiplies every click logit by `factor`, in place; ratings stay as they are."""
    head = ranker.head
    with torch.no_grad():
        for weight in (head.prior, head.outer.weight[0], head.outer.bias[0], head.match_gain[0]):
            weight.mul_(factor)
        head.rating_affine[0] /= factor
    ranker.taste_model = replace(ranker.taste_model, gain=factor * ranker.taste_model.gain)


def level_shift(logits_R: NDArray[np.floating], clicked_R: NDArray[np.bool_], weights_R: NDArray[np.floating]) -> float:
    """Returns what to add to every logit so that clicks are as likely as they were frequent. Orders nothing anew.

    An untrained score has no level; learning one step by step would take most of a round.
    """
    if not len(logits_R):
        return 0.0
    wanted = (float(clicked_R @ weights_R) + 0.5) / (float(weights_R.sum()) + 1.0)
    low, high = -60.0, 60.0
    for _ in range(60):
        middle = (low + high) / 2
        chances_R = 1 / (1 + np.exp(-np.clip(logits_R + middle, -60.0, 60.0)))
        low, high = (middle, high) if float(chances_R @ weights_R) / float(weights_R.sum()) < wanted else (low, middle)
    return (low + high) / 2


def add_level(head: Head, shift: float) -> None:
    """Adds `shift` to every click logit, in place."""
    with torch.no_grad():
        head.outer.bias[0] += shift


def _calibrating(corpus: Corpus) -> list[int]:
    return list(range(0, len(corpus), max(len(corpus) // CALIBRATION_LESSONS, 1)))
