"""Fine-tuning: from the serving model and fresh examples to a challenger, or back to the parent where none is better.

There are no in-batch negatives, and so no logQ correction: a candidate's late features belong to one user at one
moment, and the items of another slate have none for this user. The log's unshown candidates do that work.
"""

import copy
import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
import torch
from msgspec.structs import replace
from tokenizers import Tokenizer

from tailrace.settings import TrainingSettings
from training.checkpoints import EpochRecord
from training.chosen_weights import choose_weights
from training.course import Course
from training.dataset import Corpus
from training.examination import fit_examination
from training.examples import Example
from training.export import Progress
from training.first_step import Factors, learn_tastes
from training.learner import (
    Learner,
    feature_units,
    never_vary,
    put_learned,
    silence,
    to_raw_units,
    to_standard_units,
)
from training.lessons import Lesson, choose_lessons
from training.logit_scale import add_level, find_level, scale_to_clicks
from training.model import SplitRanker
from training.precision import choose_precision, precision_of
from training.rescoring import BundleScorer
from training.stop_slice import StopSlice, score_corpus
from training.team import ALONE, Team
from training.trackers import Facts

MOST_PLACES = 50  # places of a slate with a bias of their own; further ones share the last
_METHOD = 8  # rises where what is learned from the same examples changes: older checkpoints are then left alone


@dataclass(frozen=True)
class FineTuned:
    """What a fine-tune came to.

    `better` says whether `ranker` is a new one: otherwise it is the very parent, and `reason` says why.
    `first_step` is how much of the parts of the score was kept when tastes had been learned, None where they were not.
    `lessons` impressions were learned from, BERT read them in `precision`, and `impressions_per_s` counts each pass
    over them in all the time it took.
    """

    ranker: SplitRanker
    better: bool
    reason: str
    first_step: Factors | None
    history: list[EpochRecord]
    steps: int
    lessons: int
    stopped_early: bool
    position_bias: list[float]
    precision: str
    took_s: float
    reading_s: float
    impressions_per_s: float
    resumed: bool


class Job(Protocol):
    """A fine-tune that has been given everything but who takes part in it."""

    def __call__(self, *, team: Team) -> FineTuned:
        """Returns what the team has found."""


def learn_alone(job: Job) -> FineTuned:
    """Returns what this process comes to by itself."""
    return job(team=ALONE)


def fine_tune(
    ranker: SplitRanker,
    tokenizer: Tokenizer,
    train: Sequence[Example],
    stop: Sequence[Example],
    replay: Sequence[Example],
    settings: TrainingSettings,
    *,
    max_user_tokens: int,
    max_item_tokens: int,
    folder: Path,
    position_bias: bool = True,
    facts: Facts | None = None,
    team: Team = ALONE,
    served: BundleScorer | None = None,
    progress: Progress | None = None,
    checkpoint_every_s: float = 20.0,
) -> FineTuned:
    """Returns a ranker that learned from `train` and `replay`, or the parent where it is no better on `stop`.

    `ranker` itself is left alone. Checkpoints go to `folder`; a call with the same arguments after a kill goes on from
    there, to the same weights. Curves go to the trackers of the settings, beside `facts` of the run. Of a `team` each
    calls this with the same arguments, sees the same folder and gets the same weights. `served` is the ranker as it
    serves, which reads texts for a head that learns alone on a CPU; a card reads faster without it. Raises
    TrainingDiverged where the loss is no number any more, ValueError where there is nothing to learn from.
    """
    started = time.perf_counter()
    announce = progress if progress and team.leads else (lambda step, done, total: None)
    device = torch.device(settings.device)
    with _torch_for(settings):
        # Once for all: a team works in one precision, and a checkpoint is of one.
        precision_name = choose_precision(settings, team)
        settings, precision = replace(settings, precision=precision_name), precision_of(precision_name, settings.device)
        # 1. What is learned from, and in which units.
        lessons = choose_lessons(train, replay, silent_share=settings.silent_share, seed=settings.seed)
        if not lessons:
            raise ValueError("no example to learn from")
        features_RF = np.concatenate([lesson.example.features_NF for lesson in lessons])
        units = feature_units(ranker.head, features_RF)
        flat_F = never_vary(features_RF)
        del features_RF  # a hundred megabytes, and more

        # 2. The parent, in those units: what learns is a copy of it, whose upper layers do.
        first_layer = max(len(ranker.bert.stack) - settings.trainable_layers, ranker.split_layer)
        served = served if first_layer == len(ranker.bert.stack) and device.type == "cpu" else None
        parent = copy.deepcopy(ranker).to(device)
        silence(parent.head, flat_F)
        to_standard_units(parent.head, *units)
        as_parent = Learner(parent, first_layer, num_positions=1)

        # 3. What the layers that stay as they are say of every text.
        read = partial(
            Corpus,
            parent,
            tokenizer,
            first_layer=first_layer,
            max_user_tokens=max_user_tokens,
            max_item_tokens=max_item_tokens,
            units=units,
            precision=precision,
            device=device,
            threads=settings.threads,
            team=team,
            served=served,
            done=partial(announce, "read"),
        )
        corpus = read(lessons)
        telling = [example for example in stop if example.gains_N[: example.num_shown].any()]
        stop_corpus = read([Lesson(example) for example in telling])

        # 4. The parent's scores on the scale of what happened. An untrained score has none, and any step towards it
        #    would look like learning, and be paid for in order.
        places = min(max(lesson.example.num_shown for lesson in lessons), MOST_PLACES) if position_bias else 1
        seen_K = fit_examination([lesson.example for lesson in lessons], max(places, 1))
        scale_to_clicks(as_parent, corpus, precision, settings.unshown_weight, seen_K)
        # What it says: of the stop slice, to be beaten there, and of older slates, to stay near it.
        stop_slice = StopSlice(stop_corpus, as_parent, precision, settings.unshown_weight)
        replayed = [index for index, lesson in enumerate(lessons) if lesson.replayed]
        on_replay = score_corpus(as_parent, corpus, precision, replayed if settings.kl_weight else [])
        reading_s = time.perf_counter() - started

        # 5. A first step, after which the level is found that no listwise loss knows.
        new_learner = partial(Learner, first_layer=first_layer, num_positions=places)
        learner = new_learner(copy.deepcopy(parent), lora_rank=settings.lora_rank, dropout=settings.dropout).to(device)
        learner.expect_places(seen_K)
        factors = learn_tastes(learner, [*train, *replay], corpus, precision, seen_K)
        add_level(learner.ranker.head, find_level(learner, corpus, precision, seen_K))
        stepped = learner.learned()

        # 6. From there, or from where an earlier call was killed, epoch by epoch.
        course = Course(
            learner,
            corpus,
            stop_slice,
            on_replay,
            settings,
            precision=precision,
            folder=folder,
            fingerprint=_fingerprint(
                ranker,
                [*train, *replay, *stop],
                settings,
                max_user_tokens,
                max_item_tokens,
                places,
                served=served,
            ),
            facts=facts or {},
        )
        if course.learner.layers:  # the head alone is too little work to share
            torch.set_num_threads(settings.threads)
        course.run(partial(announce, "learn"), checkpoint_every_s)

        # 7. The average of the best epochs or the best alone, all the way from the first step or part of it: whichever
        #    does best, if it beats the parent.
        trial = new_learner(copy.deepcopy(parent)).to(device)
        trial.ranker.taste_model = learner.ranker.taste_model
        put_learned(trial.ranker, stepped)
        chosen, reason = choose_weights(course, trial, stop_slice)
        if chosen is None:
            result = ranker
        else:
            put_learned(parent, chosen)
            parent.taste_model = learner.ranker.taste_model
            to_raw_units(parent.head, *units)
            result = parent.cpu().requires_grad_(True).eval()
    took_s = time.perf_counter() - started
    standing = course.standing
    announce("done", standing.step, standing.step)
    return FineTuned(
        ranker=result,
        better=chosen is not None,
        reason=reason,
        first_step=factors,
        history=standing.history,
        steps=standing.step,
        lessons=len(lessons),
        stopped_early=len(standing.history) < settings.epochs,
        position_bias=[0.0, *(learner.position_bias if chosen is None else chosen["position_bias"]).tolist()],
        precision="the precision that serves" if served else precision_name,
        took_s=took_s,
        reading_s=reading_s,
        impressions_per_s=len(standing.history) * len(lessons) / took_s,
        resumed=course.resumed,
    )


@contextmanager
def _torch_for(settings: TrainingSettings) -> Iterator[None]:
    """One thread within an operation; threads and the state of torch's random generators are put back at the end."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _fingerprint(
    ranker: SplitRanker,
    examples: Sequence[Example],
    settings: TrainingSettings,
    *sizes: int,
    served: BundleScorer | None,
) -> str:
    """Returns what tells one fine-tune from another: settings, parent, examples and labels, and who reads them."""
    digest = hashlib.sha256(msgspec.json.encode([_METHOD, settings, sizes]))
    if served is not None:  # at which precision, and where
        digest.update(served.encode_users([examples[0].user_text]).vectors_BD.tobytes())
    for weight in ranker.state_dict().values():
        digest.update(weight.detach().cpu().contiguous().numpy().tobytes())
    digest.update(repr([np.asarray(part).tolist() for part in astuple(ranker.taste_model)]).encode())
    for example in examples:
        digest.update(example.request_id.encode())
        for labels_N in (example.gains_N, example.clicked_N, example.ratings_N):
            digest.update(labels_N.tobytes())
    return digest.hexdigest()
