"""Champion against challenger: both as they would serve, on the same newest impressions, new to both."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.settings import Settings
from training.calibration import fit_platt
from training.evaluate import TOP, Evaluation, evaluate
from training.examination import fit_examination, places_seen
from training.examples import Example
from training.item_moves import ItemMove, item_moves
from training.judged_gains import fit_referee, judged_gains, referee_error
from training.popularity import count_popularity
from training.rescoring import BundleScorer, Floats, encode_texts, latency_ratio, score_beside

_CALIBRATED = 300  # examples, the newest of those given: enough for the two numbers of a calibration
_TIMED = 40  # examples on which the two are timed against each other

Progress = Callable[[str, int, int], None]  # what is under way, done, in all


@dataclass(frozen=True)
class Contest:
    """How both did, how many times as long the challenger takes over a request, and the items it moves most.

    `referee_error` is the standard error of their mean difference as judged that is the referee's.
    """

    champion: Evaluation
    challenger: Evaluation
    latency_ratio: float
    moves: Sequence[ItemMove] = ()
    referee_error: float = 0.0


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
    told, models = [*calibrate_on, *holdout], (champion, challenger)
    tables = [encode_texts(champion, told, progress, threads=threads)]
    if champion.encoders[1] == challenger.encoders[1]:
        tables.append(tables[0])
    else:
        tables.append(encode_texts(challenger, told, progress, threads=threads))
    told_by_model = score_beside(
        list(zip(models, tables, strict=True)),
        told,
        rating_weight=settings.slate.rating_weight,
        progress=progress,
        threads=threads,
    )
    before_by_model = [scores[: len(calibrate_on)] for scores in told_by_model]
    arrived_I = np.repeat([one.arrived for one in calibrate_on], [one.num_shown for one in calibrate_on])
    platts = [fit_platt(_shown(calibrate_on, before), _clicked(calibrate_on), arrived_I) for before in before_by_model]
    # Three numbers of a whole slice hardly favour anybody on it, and few examples would tell them badly.
    champion_said_I, challenger_said_I = (_shown(told, scores) for scores in told_by_model)
    seen_I = np.concatenate([places_seen(one, examination_K) for one in told])
    referee = fit_referee(champion_said_I, challenger_said_I, _clicked(told), seen_I)
    champion_scores, challenger_scores = (scores[len(calibrate_on) :] for scores in told_by_model)
    gains = judged_gains(holdout, champion_scores, challenger_scores, referee, examination_K)
    found = [
        evaluate(
            holdout,
            scores,
            popularity=popularity,
            items=tables[0],
            platt=platt,
            gains=gains,
            seed=settings.training.seed,
            bootstrap=settings.gate.bootstrap,
        )
        for platt, scores in zip(platts, (champion_scores, challenger_scores), strict=True)
    ]
    ratio = latency_ratio(
        (champion, tables[0]),
        (challenger, tables[1]),
        holdout[:_TIMED],
        num_candidates=settings.ranker.num_candidates,
    )
    unsure = referee_error(
        told,
        told_by_model[0],
        told_by_model[1],
        examination_K,
        since=len(calibrate_on),
        top=TOP,
        seed=settings.training.seed,
    )
    moves = item_moves(holdout, champion_scores, challenger_scores)
    return Contest(found[0], found[1], ratio, moves, unsure)


def _shown(examples: Sequence[Example], scores: Sequence[Floats]) -> Floats:
    """Returns the scores of what these examples showed, all together."""
    return np.concatenate([scored[: one.num_shown] for one, scored in zip(examples, scores, strict=True)])


def _clicked(examples: Sequence[Example]) -> NDArray[np.bool_]:
    return np.concatenate([one.clicked_N[: one.num_shown] for one in examples])
