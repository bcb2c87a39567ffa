"""Test, then learn, over a recorded stream: every ranking meets each event before anybody has learned from it.

The protocol is full-catalogue prequential evaluation (Vinagre et al. 2014): the first time a user meets an item, that
item is ranked among all items seen so far that the user has not touched. Repeats, and an item's very first event, are
learned and not ranked. A round of training sees only events before the one at which it happens.

Shapes: N candidates.
"""

import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from deploy.evaluation_report import Evaluation, figures_of, figures_of_ranks, periods_of, write_evaluation
from deploy.replayed import Asked, Replayed, encode_all, score
from deploy.retraining import Retrained, RoundFacts, sample_slate
from services.candidates import PoolRequest, allowed_rows, build_pool
from tailrace.catalogue import Rows
from tailrace.cosines import history_items, history_mean
from tailrace.errors import InvalidRecord
from tailrace.events import Click
from tailrace.features import prior_scores
from tailrace.ids import ItemId, UserId
from tailrace.importers.source import Dataset
from tailrace.items import Item
from tailrace.responses import gather_responses, topic_pulls
from tailrace.settings import Settings
from tailrace.tastes import bucket_answers
from tailrace.text import now_interests
from training.baselines import LambdaRank, PopularityRules
from training.examples import Example
from training.ranking_metrics import half_tie_rank, ndcgs

Progress = Callable[[str, int, int], None]  # what is being done, events done, events in all

VERSION_ZERO = "version 0, frozen"
RETRAINED = "Tailrace, retrained as the stream goes"
SERVED = "the same, of the served pool alone"
LAMBDARANK = "LambdaRank on the same features, trained once before"
LAMBDARANK_RETRAINED = "LambdaRank on the same features, retrained as the stream goes"
_PERIODS = 12
_RESAMPLES = 1000


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """Which part of the stream does what. Shares are of its clicks, in time order."""

    learn_from: float = 0.375  # from here on first touches become slates to learn from
    rank_from: float = 0.75  # from here on they are ranked, too
    every: int = 1  # of the first touches due, take each so many-th only
    limit: int | None = None  # ranked events after which to stop
    round_every: int = 2000  # ranked events between rounds of training; 0: no training
    window: int = 12_000  # slates the first round learns from, the newest
    later_window: int = 4000  # slates each later round learns from, which starts where the one before ended
    retrain_lambdarank: bool = False  # at every round, from the first window's length: minutes each time
    num_hard: int = 150  # candidates of a slate that version 0 ranks highest
    num_random: int = 100  # candidates of a slate drawn from the rest
    split_layer: int = 6  # all layers of the packaged base: two towers, so that whole catalogues can be scored
    item_states: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Ranked:
    """One ranked event: the item's rank by every ranking, and among how many."""

    at_ms: int
    user_id: UserId
    num_candidates: int
    ranks: Mapping[str, float]


@dataclass
class Outcome:
    """All that a run found, in time order."""

    ranked: list[Ranked] = field(default_factory=list)
    rounds: list[RoundFacts] = field(default_factory=list)


def evaluate_prequential(
    dataset: Dataset, settings: Settings, plan: Plan, folder: Path, progress: Progress | None = None
) -> Evaluation:
    """Returns HR@10, NDCG@10 and MRR per ranking, and writes them and plots into `folder`.

    Intervals draw whole users. Raises InvalidRecord where no event of the data is due to be ranked.
    """
    with tempfile.TemporaryDirectory(prefix="tailrace-evaluate-") as scratch:
        outcome = run_prequential(dataset, settings, plan, Path(scratch), progress)
    if not outcome.ranked:
        raise InvalidRecord("no first touch of a known item after the warm-up: nothing to rank", field="clicks")
    users = [one.user_id for one in outcome.ranked]
    ranks = {name: np.array([one.ranks[name] for one in outcome.ranked]) for name in outcome.ranked[0].ranks}
    best = RETRAINED if RETRAINED in ranks else VERSION_ZERO
    chance = {"seed": plan.seed, "resamples": _RESAMPLES}
    evaluation = Evaluation(
        title="Deskdrop, prequential: first touches among all items seen so far",
        protocol="prequential",
        facts={
            "ranked events": len(outcome.ranked),
            "mean candidates": round(float(np.mean([one.num_candidates for one in outcome.ranked]))),
            "served pool": settings.ranker.num_candidates,
            "answers in the served pool": round(float(np.isfinite(ranks[SERVED]).mean()), 4),
            "plan": msgspec.to_builtins(plan),
        },
        figures=[figures_of_ranks(name, found, users, **chance) for name, found in ranks.items()],
        differences=[
            figures_of(f"{best} minus {name}", {"NDCG@10": ndcgs(ranks[best]) - ndcgs(found)}, users, **chance)
            for name, found in ranks.items()
            if name != best
        ],
        periods=periods_of([one.at_ms for one in outcome.ranked], ranks, users, count=_PERIODS, **chance),
        rounds=outcome.rounds,
    )
    write_evaluation(evaluation, folder)
    return evaluation


def run_prequential(
    dataset: Dataset, settings: Settings, plan: Plan, folder: Path, progress: Progress | None = None
) -> Outcome:
    """Returns the ranks of every event that was due. Bundles and training files go below `folder`, which is empty."""
    events = [row.record for row in dataset.events]
    num_clicks = sum(isinstance(event, Click) for event in events)
    items = {row.key: row.record for row in dataset.items if isinstance(row.record, Item)}
    run, outcome = _Run(items, num_clicks, settings, plan, folder), Outcome()
    for event in events:
        if isinstance(event, Item):
            continue
        # 1. Who they are and where: known before they choose.
        if not isinstance(event, Click):
            run.state.learn(event)
            continue
        if run.is_due(event):
            # 2. A round of training, from what came before.
            if run.is_round_due(len(outcome.ranked)):
                outcome.rounds.append(run.train(event.at_ms))
            # 3. Test.
            asked, answer = run.ask(event)
            if run.is_ranking:
                outcome.ranked.append(run.rank(event, asked, answer))
            if plan.round_every:
                run.slates.append(sample_slate(event, asked, answer, run.rng(), plan.num_hard, plan.num_random))
        # 4. Then learn.
        run.learn(event)
        if progress is not None and run.num_clicks % 20 == 0:
            progress("ranking" if run.is_ranking else "warming up", run.num_clicks, num_clicks)
        if plan.limit is not None and len(outcome.ranked) >= plan.limit:
            break
    return outcome


class _Run:
    """Where a replay stands."""

    def __init__(self, items: Mapping[str, Item], total: int, settings: Settings, plan: Plan, folder: Path) -> None:
        self.state = Replayed()
        self.num_clicks = 0
        self.slates: deque[Example] = deque(maxlen=plan.window)
        self._items = items
        self._learn_at, self._rank_at = round(total * plan.learn_from), round(total * plan.rank_from)
        self._settings = _head_alone(settings, plan)
        self._plan = plan
        self._due = 0
        self._touched: dict[UserId, set[ItemId]] = {}
        self._rules = PopularityRules()
        self._tailrace = Retrained.start(self._settings, folder)
        self._lambdaranks: dict[str, LambdaRank] = {}
        self._trained_at = -1

    @property
    def is_ranking(self) -> bool:
        """Whether the warm-up is over."""
        return self.num_clicks >= self._rank_at

    def rng(self) -> np.random.Generator:
        """Returns the chance of this event alone: nothing later changes it."""
        return np.random.default_rng([self._plan.seed, self.num_clicks])

    def is_due(self, click: Click) -> bool:
        """Returns whether the event is a first touch of an item seen before, and in the part that counts."""
        if self.num_clicks < self._learn_at or (not self.is_ranking and not self._plan.round_every):
            return False
        if click.item_id in self._touched.get(click.user_id, ()) or self.state.catalogue.row(click.item_id) is None:
            return False
        self._due += 1
        return self._due % self._plan.every == 0

    def is_round_due(self, num_ranked: int) -> bool:
        """Returns whether to train before the next event is ranked."""
        every = self._plan.round_every
        return bool(every) and self.is_ranking and num_ranked % every == 0 and num_ranked != self._trained_at

    def train(self, now_ms: int) -> RoundFacts:
        """Learns from the slates so far, all of them of events before this one."""
        plan, slates, threads = self._plan, list(self.slates), self._settings.training.threads
        is_first = self._trained_at < 0
        self._trained_at = 0 if is_first else self._trained_at + plan.round_every
        if is_first or plan.retrain_lambdarank:
            learned = LambdaRank(seed=plan.seed, threads=threads).fit(slates)
            self._lambdaranks |= {LAMBDARANK: learned} if is_first else {}
            self._lambdaranks |= {LAMBDARANK_RETRAINED: learned} if plan.retrain_lambdarank else {}
        # A random candidate stands for all that were not drawn: the correction for sampling it (logQ).
        weight = max(len(self.state.catalogue) - plan.num_hard, 0) / max(plan.num_random, 1)
        recent = slates if is_first else slates[-plan.later_window :]
        facts = self._tailrace.learn(recent, now_ms, unshown_weight=weight)
        encode_all(self._tailrace.model, self.state.catalogue)
        return facts

    def ask(self, click: Click) -> tuple[Asked, int]:
        """Returns what the model is asked, over everything the user might have taken, and the place of the answer."""
        rows_N = allowed_rows(self.state.catalogue, self._request(click))
        asked = self.state.ask(self._tailrace.model, click.user_id, rows_N, click.at_ms)
        return asked, int(np.searchsorted(rows_N, self.state.catalogue.rows([click.item_id])[0]))

    def rank(self, click: Click, asked: Asked, answer: int) -> Ranked:
        """Returns the item's rank by every ranking there is so far."""
        rows_N, features_NF = asked.rows_N, asked.features_NF
        scores: dict[str, NDArray[np.floating]] = {**self._rules.scores(rows_N, click.at_ms, self.rng())}
        scores[VERSION_ZERO] = prior_scores(features_NF)
        scores |= {name: model.scores(features_NF) for name, model in self._lambdaranks.items()}
        if self._plan.round_every:
            scores[RETRAINED] = score(self._tailrace.model, asked, self._settings.slate.rating_weight)
        ranks = {name: half_tie_rank(scores_N, answer) for name, scores_N in scores.items()}
        # What a request would have had ranked: the pool that candidate generation draws, not the whole catalogue.
        within_N = np.isin(rows_N, self._pool(click, asked))
        best_N = scores[RETRAINED if self._plan.round_every else VERSION_ZERO]
        place = int(within_N[:answer].sum())
        ranks[SERVED] = half_tie_rank(best_N[within_N], place) if within_N[answer] else np.inf
        return Ranked(click.at_ms, click.user_id, len(rows_N), ranks)

    def learn(self, click: Click) -> None:
        """Everybody but the models learns from the event at once."""
        catalogue, touched = self.state.catalogue, self._touched.setdefault(click.user_id, set())
        if catalogue.row(click.item_id) is None:
            item = self._items.get(click.item_id) or Item(item_id=click.item_id, title=click.item_id)
            self.state.announce([item], click.at_ms)
            encode_all(self._tailrace.model, catalogue)
        row = int(catalogue.rows([click.item_id])[0])
        self._rules.learn(row, click.at_ms, first_touch=click.item_id not in touched)
        touched.add(click.item_id)
        self.state.learn(click)
        self.num_clicks += 1

    def _request(self, click: Click, asked: Asked | None = None) -> PoolRequest:
        vectors = self._tailrace.model.encodings.vectors
        profile = self.state.profile(click.user_id)
        model, responses = self._tailrace.model, gather_responses(profile, self.state.catalogue.topics, click.at_ms)
        recent_RD = vectors[self.state.catalogue.rows(history_items(profile))]
        return PoolRequest(
            profile=profile,
            now_ms=click.at_ms,
            num_candidates=self._settings.ranker.num_candidates,
            user_D=None if asked is None else asked.user.vectors_BD[0],
            history_D=history_mean(recent_RD),
            pulls=topic_pulls(now_interests(profile, click.at_ms), responses, model.prior),
            tag_worth_V=model.tag_worth(bucket_answers(responses.answers)),
            exclude=self._touched.get(click.user_id, ()),  # a profile forgets after 512 items; the protocol does not
        )

    def _pool(self, click: Click, asked: Asked) -> Rows:
        vectors = self._tailrace.model.encodings.vectors
        return build_pool(self.state.catalogue, vectors, self._request(click, asked), self.rng()).rows_N


def _head_alone(settings: Settings, plan: Plan) -> Settings:
    """Returns settings under which encoders stay as they are, so that nothing has to be encoded again."""
    replace = msgspec.structs.replace
    return replace(
        settings,
        registry=replace(settings.registry, split_layer=plan.split_layer, item_states=plan.item_states),
        # A slate here is one choice among all: it says nothing of how likely a click is, and nobody rated.
        training=replace(
            settings.training, trainable_layers=0, pointwise_weight=0.0, rating_weight=0.0, seed=plan.seed
        ),
        slate=replace(settings.slate, rating_weight=0.0),
    )
