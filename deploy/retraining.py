"""A model that is trained, exported, quantized and loaded again as the stream goes, by the functions of a round.

A slate to learn from is one choice: the item that was taken, those that version 0 ranks highest among what could have
been taken instead, and a random sample of the rest, each of which stands for many.

Shapes: N candidates of a request, S of a slate.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import msgspec
import numpy as np

from deploy.replayed import Asked
from deploy.training_parts import open_scorer
from services.loaded_model import LoadedModel
from tailrace.events import Click
from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS, prior_scores
from tailrace.ids import ItemId, ModelVersion, RequestId
from tailrace.settings import Settings
from training.examples import Example
from training.export import build_version_zero, export_bundle, load_ranker
from training.fine_tune import fine_tune


class RoundFacts(msgspec.Struct, frozen=True):
    """What one round learned from, whether it made a better model, and how long it took, seconds."""

    version: ModelVersion
    at_ms: int
    slates: int
    better: bool
    reason: str
    epochs: int
    fine_tune_s: float
    export_s: float


def sample_slate(
    click: Click, asked: Asked, answer: int, rng: np.random.Generator, num_hard: int, num_random: int
) -> Example:
    """Returns the choice as an example: the answer and the hard candidates as shown, shuffled, then the random ones."""
    prior_N = prior_scores(asked.features_NF)
    by_prior = np.argsort(-prior_N, kind="stable")
    others = by_prior[by_prior != answer]
    drawn = rng.permutation(others[num_hard:])[:num_random]
    # Shuffled, because whoever breaks ties by place would find the answer by its own.
    kept_S = np.concatenate([rng.permutation([answer, *others[:num_hard]]), drawn])
    taken_S = kept_S == answer
    texts = asked.items.texts_N
    return Example(
        request_id=RequestId(click.event_id),
        user_id=click.user_id,
        at_ms=click.at_ms,
        model_version=ModelVersion("replayed"),
        user_text=asked.user_text,
        item_ids=tuple(ItemId(str(row)) for row in asked.rows_N[kept_S].tolist()),
        texts=tuple(texts[index] for index in kept_S.tolist()),
        num_shown=1 + min(num_hard, len(others)),
        features_NF=asked.features_NF[kept_S],
        tastes=asked.tastes.among(kept_S),
        scores_N=prior_N[kept_S],
        propensities_N=np.full(len(kept_S), np.nan, dtype=np.float32),
        gains_N=taken_S.astype(np.float32),
        clicked_N=taken_S,
        ratings_N=np.full(len(kept_S), np.nan, dtype=np.float32),
    )


class Retrained:
    """The version that serves now, and the round that replaces it."""

    def __init__(self, settings: Settings, folder: Path, bundle: Path, model: LoadedModel) -> None:
        self.model = model
        self._settings = settings
        self._folder = folder
        self._bundle = bundle
        self._rounds = 0

    @classmethod
    def start(cls, settings: Settings, folder: Path) -> Self:
        """Returns version 0, built below `folder`, which must hold no bundles yet."""
        # Versions are numbered anew in every run, so nothing that was cached under their names may be used.
        settings = msgspec.structs.replace(
            settings, ranker=msgspec.structs.replace(settings.ranker, item_text_cache=False)
        )
        registry, version = settings.registry, ModelVersion("v0")
        bundle = folder / "bundles" / version
        build_version_zero(
            bundle,
            version=version,
            feature_names=FEATURE_NAMES,
            prior=PRIOR_WEIGHTS,
            base_model=registry.base_model,
            split_layer=registry.split_layer,
            item_states=registry.item_states,
            max_user_tokens=registry.max_user_tokens,
            max_item_tokens=registry.max_item_tokens,
            precisions=(settings.ranker.served_precision,),
        )
        return cls(settings, folder, bundle, LoadedModel.load(bundle, version, settings))

    def learn(self, slates: Sequence[Example], now_ms: int, *, unshown_weight: float | None = None) -> RoundFacts:
        """Replaces the model by one that has learned from the slates, in time order, all from before `now_ms`.

        `unshown_weight` takes the place of the setting, where unshown candidates were drawn in some known share.
        Call `encode_all` afterwards: where BERT layers learn, items are to be encoded anew.
        """
        assert slates[-1].at_ms <= now_ms, "a round would learn from the future"
        training, begun = self._settings.training, time.monotonic()
        if unshown_weight is not None:
            training = msgspec.structs.replace(training, unshown_weight=unshown_weight)
        self._rounds += 1
        version = ModelVersion(f"v{self._rounds}")
        bundle = self._folder / "bundles" / version

        # 1. The newest tenth says when to stop.
        ranker, tokenizer, card = load_ranker(self._bundle)
        cut = len(slates) - max(round(len(slates) * training.stop_share), 1)
        tuned = fine_tune(
            ranker,
            tokenizer,
            slates[:cut],
            slates[cut:],
            (),
            training,
            max_user_tokens=card.max_user_tokens,
            max_item_tokens=card.max_item_tokens,
            folder=self._folder / "fine_tuning" / version,
            position_bias=False,
            served=open_scorer(self._settings)(self._bundle),
        )
        tuned_at = time.monotonic()
        facts = RoundFacts(
            version=version,
            at_ms=now_ms,
            slates=len(slates),
            better=tuned.better,
            reason=tuned.reason,
            epochs=len(tuned.history),
            fine_tune_s=tuned_at - begun,
            export_s=0.0,
        )
        if not tuned.better:
            return facts

        # 2. What is ranked with is what would be served: the quantized graphs of the exported bundle.
        export_bundle(
            tuned.ranker,
            tokenizer,
            bundle,
            version=version,
            base_model=card.base_model,
            max_user_tokens=card.max_user_tokens,
            max_item_tokens=card.max_item_tokens,
            precisions=(self._settings.ranker.served_precision,),
        )
        before, self.model = self.model, LoadedModel.load(bundle, version, self._settings)
        if training.trainable_layers == 0:  # the encoders are what they were, and so is all they have encoded
            self.model.encodings = before.encodings
        before.retire()
        self._bundle = bundle
        return msgspec.structs.replace(facts, export_s=time.monotonic() - tuned_at)
