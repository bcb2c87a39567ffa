"""Champion against challenger: both as they would serve, on the same newest impressions, new to both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from tailrace.settings import Settings
from training.calibration import Platt, fit_platt
from training.evaluate import Evaluation, evaluate
from training.examination import fit_examination
from training.examples import Example
from training.item_moves import ItemMove, item_moves
from training.popularity import count_popularity
from training.rescoring import BundleScorer, Floats, encode_texts, latency_ratio, score_examples

_CALIBRATED = 300  # examples, the newest of those given: enough for the two numbers of a calibration
_TIMED = 40  # examples on which the two are timed against each other

Progress = Callable[[str, int, int], None]  # what is under way, done, in all


@dataclass(frozen=True)
class Contest:
    """How both did, how many times as long the challenger takes over a request, and the items it moves most."""

    champion: Evaluation
    challenger: Evaluation
    latency_ratio: float
    moves: Sequence[ItemMove] = ()


def compare(
    champion: BundleScorer,
    challenger: BundleScorer,
    holdout: Sequence[Example],
    *,
    calibrate_on: Sequence[Example],
    learned: Sequence[Example],
    settings: Settings,
    progress: Progress,
) -> Contest:
    """Returns both models' figures on `holdout`.

    Click probabilities are calibrated on `calibrate_on`, which is older; what is popular and what is new goes by
    `learned`. Diversity is measured by the champion's vectors for both.
    """
    popularity = count_popularity(learned)
    examination_K = fit_examination([*learned, *holdout], max(example.num_shown for example in holdout))
    calibrate_on, threads = calibrate_on[-_CALIBRATED:], settings.training.threads
    told = [*calibrate_on, *holdout]
    tables = [encode_texts(scorer, told, progress, threads=threads) for scorer in (champion, challenger)]
    found, scores_by_model = [], []
    for name, scorer, table in zip(("champion", "challenger"), (champion, challenger), tables, strict=True):

        def tell(step: str, done: int, total: int, name: str = name) -> None:
            progress(f"{step}: {name}", done, total)

        weight = settings.slate.rating_weight
        rescore = partial(score_examples, scorer, rating_weight=weight, items=table, progress=tell, threads=threads)
        before, scores = rescore(calibrate_on), rescore(holdout)
        scores_by_model.append(scores)
        found.append(
            evaluate(
                holdout,
                scores,
                popularity=popularity,
                items=tables[0],
                platt=_calibrate(calibrate_on, before),
                examination_K=examination_K,
                seed=settings.training.seed,
                bootstrap=settings.gate.bootstrap,
            )
        )
    ratio = latency_ratio(
        (champion, tables[0]),
        (challenger, tables[1]),
        holdout[:_TIMED],
        num_candidates=settings.ranker.num_candidates,
    )
    return Contest(found[0], found[1], ratio, item_moves(holdout, *scores_by_model))


def _calibrate(examples: Sequence[Example], scores: Sequence[Floats]) -> Platt:
    shown = [scored[: one.num_shown] for one, scored in zip(examples, scores, strict=True)]
    clicked = [one.clicked_N[: one.num_shown] for one in examples]
    return fit_platt(np.concatenate(shown), np.concatenate(clicked))
