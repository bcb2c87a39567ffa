"""MIND's slates: learn from all days but the last, rank the slates of the last, before and after.

Texts may be missing from a folder. A slate is used where, among its items whose text is there, one was clicked and one
was not, and the user has clicked something whose text is there; the other items of the slate are left out.

Every ranking is measured twice: as a live system would be, knowing the clicks of the last day up to the slate itself,
and knowing no click of that day.

Shapes: N items of a slate.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.evaluation_report import Evaluation, Figures, figures_of, write_evaluation
from deploy.replayed import Asked, Replayed, encode_all, score
from deploy.retraining import Retrained
from services.loaded_model import LoadedModel
from tailrace.cosines import history_items
from tailrace.errors import InvalidRecord
from tailrace.events import Click, Impression, UserEvent
from tailrace.features import FEATURE_NAMES, prior_scores
from tailrace.ids import ItemId, RequestId
from tailrace.importers.source import Dataset
from tailrace.items import Item
from tailrace.settings import Settings
from tailrace.text import render_item
from training.baselines import LambdaRank, TfIdf
from training.examples import Example
from training.ranking_metrics import SlateFigures, slate_figures

Progress = Callable[[str, int, int], None]
Scores = NDArray[np.floating]

BEFORE, AFTER = "version 0, untrained", "Tailrace, fine-tuned"
_METRICS = ("AUC", "MRR", "nDCG@5", "nDCG@10")
_COSINE = FEATURE_NAMES.index("cos_history")
_DAY_MS = 86_400_000
_RESAMPLES = 1000


@dataclass(frozen=True)
class Met:
    """One usable slate as it was met: what the model is asked, what was clicked, and what the user clicked before."""

    impression: Impression
    asked: Asked
    clicked_N: NDArray[np.bool_]
    history: list[str]  # texts, newest first


@dataclass(frozen=True)
class Days:
    """The usable slates: of the days before the last, and of the last, knowing its earlier clicks or none of them."""

    before: list[Met]
    knowing: list[Met]
    unknowing: list[Met]


def evaluate_slates(
    dataset: Dataset, settings: Settings, folder: Path, *, seed: int = 0, progress: Progress | None = None
) -> Evaluation:
    """Returns AUC, MRR, nDCG@5 and nDCG@10 per ranking, and writes them and a plot into `folder`.

    Intervals draw whole users. Raises InvalidRecord where there are too few slates before the last day or on it.
    """
    with tempfile.TemporaryDirectory(prefix="tailrace-evaluate-") as scratch:
        evaluation = _evaluate(dataset, settings, Path(scratch), seed, progress or (lambda step, done, total: None))
    write_evaluation(evaluation, folder)
    return evaluation


def _evaluate(dataset: Dataset, settings: Settings, scratch: Path, seed: int, report: Progress) -> Evaluation:
    events = [row.record for row in dataset.events if not isinstance(row.record, Item)]
    used = {item_id for event in events for item_id in _items_of(event)}
    items = [row.record for row in dataset.items if isinstance(row.record, Item) and row.key in used]
    shown_ms = [event.at_ms for event in events if isinstance(event, Impression)]
    last_day_ms = max(shown_ms, default=0) // _DAY_MS * _DAY_MS

    # 1. Every slate as version 0 meets it.
    report("building version 0", 0, 5)
    tailrace = Retrained.start(settings, scratch)
    report("replaying", 1, 5)
    first = _meet_all(items, events, last_day_ms, tailrace.model)
    if len(first.before) < 10 or not first.knowing:
        found = f"{len(first.before)} usable slates before the last day and {len(first.knowing)} on it"
        raise InvalidRecord(f"{found} are too few", field="behaviors.tsv")

    # 2. Learn from the days before the last.
    report("fine-tuning", 2, 5)
    examples = [_as_example(met) for met in first.before]
    facts = tailrace.learn(examples, last_day_ms)
    lambdarank = LambdaRank(seed=seed, threads=settings.training.threads).fit(examples)
    tf_idf = TfIdf([text for met in first.before for text in (*met.history, *met.asked.items.texts_N)])

    # 3. The last day again, as the model that has learned meets it: its vectors are other ones.
    report("replaying", 3, 5)
    second = _meet_all(items, events, last_day_ms, tailrace.model)

    # 4. Rank.
    report("ranking", 4, 5)
    rating_weight = settings.slate.rating_weight
    figures = []
    for known, before, after in (
        ("", first.knowing, second.knowing),
        (", no click of that day known", first.unknowing, second.unknowing),
    ):
        users = [met.impression.user_id for met in before]
        rankings: dict[str, list[Scores]] = {
            "TF-IDF cosine": [tf_idf.scores(met.history, met.asked.items.texts_N) for met in before],
            "cosine to the mean of the last clicks, untrained": [met.asked.features_NF[:, _COSINE] for met in before],
            BEFORE: [prior_scores(met.asked.features_NF) for met in before],
            "LambdaRank": [lambdarank.scores(met.asked.features_NF) for met in before],
            AFTER: [score(tailrace.model, met.asked, rating_weight) for met in after],
        }
        figures += [_figures(f"{name}{known}", scores, before, users, seed=seed) for name, scores in rankings.items()]
    return Evaluation(
        title="MIND, slates of the last day",
        protocol="slates",
        facts={
            "slates in the folder": len(shown_ms),
            "slates learned from": len(first.before),
            "slates ranked": len(first.knowing),
            "mean items of a ranked slate": round(float(np.mean([len(met.clicked_N) for met in first.knowing])), 1),
        },
        figures=figures,
        rounds=[facts],
    )


def _meet_all(items: Sequence[Item], events: Sequence[UserEvent], last_day_ms: int, model: LoadedModel) -> Days:
    state = Replayed()
    state.announce(items, 0)
    encode_all(model, state.catalogue)
    clicked = _clicks_by_request(events)
    begin = next((place for place, event in enumerate(events) if event.at_ms >= last_day_ms), len(events))
    last = [event for event in events[begin:] if isinstance(event, Impression)]
    before = _meet_in_turn(state, model, events[:begin], clicked)
    unknowing = [met for event in last if (met := _meet(state, model, event, clicked)) is not None]
    return Days(before, _meet_in_turn(state, model, events[begin:], clicked), unknowing)


def _meet_in_turn(
    state: Replayed, model: LoadedModel, events: Iterable[UserEvent], clicked: Mapping[RequestId, set[ItemId]]
) -> list[Met]:
    met = []
    for event in events:
        if isinstance(event, Impression) and (one := _meet(state, model, event, clicked)) is not None:
            met.append(one)
        state.learn(event)
    return met


def _meet(
    state: Replayed, model: LoadedModel, impression: Impression, clicked: Mapping[RequestId, set[ItemId]]
) -> Met | None:
    """Returns the slate as it is met, or None where it cannot be used."""
    catalogue, profile = state.catalogue, state.profile(impression.user_id)
    taken = clicked.get(impression.request_id, set())
    known = [one.item_id for one in impression.shown if catalogue.row(one.item_id) is not None]
    clicked_N = np.array([item_id in taken for item_id in known], dtype=np.bool_)
    recent = [item for item_id in history_items(profile) if (item := catalogue.item(item_id)) is not None]
    if not recent or not clicked_N.any() or clicked_N.all():
        return None
    asked = state.ask(model, impression.user_id, catalogue.rows(known), impression.at_ms)
    return Met(impression, asked, clicked_N, [render_item(item) for item in recent])


def _as_example(met: Met) -> Example:
    count = len(met.clicked_N)
    nothing_N = np.full(count, np.nan, dtype=np.float32)
    return Example(
        request_id=met.impression.request_id,
        user_id=met.impression.user_id,
        at_ms=met.impression.at_ms,
        model_version=met.impression.model_version,
        user_text=met.asked.user_text,
        item_ids=tuple(ItemId(str(row)) for row in met.asked.rows_N.tolist()),
        texts=tuple(met.asked.items.texts_N),
        num_shown=count,
        features_NF=met.asked.features_NF,
        tastes=met.asked.tastes,
        scores_N=prior_scores(met.asked.features_NF),
        propensities_N=nothing_N,
        gains_N=met.clicked_N.astype(np.float32),
        clicked_N=met.clicked_N,
        ratings_N=nothing_N,
    )


def _figures(name: str, scores: Sequence[Scores], slates: Sequence[Met], users: Sequence[str], *, seed: int) -> Figures:
    found = [slate_figures(scores_N, met.clicked_N) for scores_N, met in zip(scores, slates, strict=True)]
    values = dict(zip(_METRICS, np.array(found).T, strict=True))
    assert len(_METRICS) == len(SlateFigures._fields)
    return figures_of(name, values, users, seed=seed, resamples=_RESAMPLES)


def _clicks_by_request(events: Iterable[UserEvent]) -> dict[RequestId, set[ItemId]]:
    clicked: dict[RequestId, set[ItemId]] = {}
    for event in events:
        if isinstance(event, Click) and event.request_id is not None:
            clicked.setdefault(event.request_id, set()).add(event.item_id)
    return clicked


def _items_of(event: UserEvent) -> list[ItemId]:
    if isinstance(event, Impression):
        return [one.item_id for one in event.shown]
    return [event.item_id] if isinstance(event, Click) else []
