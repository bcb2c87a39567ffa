"""Champion against challenger: which examples tell what, and that both are judged by the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest

from services.scorer import EncodedItems
from tailrace.features import FEATURE_NAMES
from tailrace.settings import GateSettings, load_settings
from tailrace.tastes import TasteModel
from tests.made_up_slates import make_examples
from training.contest import Contest, compare
from training.examples import Example
from training.gate import decide

KNOWN, NOISE = (FEATURE_NAMES.index(name) for name in ("cos_user", "newness"))
SETTINGS = load_settings(None, slate={"rating_weight": 0.0}, gate={"bootstrap": 300})
OLDER = 300
SOUND = 1.0  # takes as long as the champion
GATE = GateSettings(bootstrap=300)


@dataclass(frozen=True)
class Weighing:
    """A bundle that scores by two features: what a candidate is worth, and what says nothing of it."""

    known: float
    noise: float
    taste_model = TasteModel.ignorant()
    encoders = ("users", "items")

    def encode_users(self, texts: Sequence[str]) -> Sequence[str]:
        return texts

    def encode_items(self, texts: Sequence[str]) -> EncodedItems:
        count = len(texts)
        vectors_ND = np.eye(2, dtype=np.float32)[np.arange(count) % 2]
        return EncodedItems(np.zeros((count, 1, 4), np.float16), np.ones((count, 1), np.bool_), vectors_ND)

    def score(self, users, states, mask, features_BNF, tag_worth_BN):  # type: ignore[no-untyped-def]
        logits_BN = self.known * features_BNF[..., KNOWN] + self.noise * features_BNF[..., NOISE]
        return logits_BN.astype(np.float32), np.full_like(logits_BN, 3.0)


@pytest.fixture(scope="module")
def log() -> list[Example]:
    rng = np.random.default_rng(0)
    examples, worths = make_examples(OLDER + 500, seed=1)
    for example, worth_N in zip(examples, worths, strict=True):
        example.features_NF[:, KNOWN] = worth_N
        example.features_NF[:, NOISE] = rng.normal(size=len(worth_N))
    return examples


def held(champion: Weighing, challenger: Weighing, log: Sequence[Example]) -> Contest:
    return compare(
        champion,
        challenger,
        log[OLDER:],
        calibrate_on=log[:OLDER],
        learned=log[:OLDER],
        settings=SETTINGS,
        progress=lambda step, done, total: None,
    )


def test_who_knows_more_is_promoted_and_who_knows_less_is_not(log: list[Example]) -> None:
    half, whole = Weighing(1.0, 1.0), Weighing(1.0, 0.0)
    up, down = held(half, whole, log), held(whole, half, log)
    assert np.nanmean(up.challenger.judged_E - up.champion.judged_E) > 0.05
    assert up.challenger.figures["log_loss"].mean < up.champion.figures["log_loss"].mean
    assert decide(up.champion, up.challenger, SOUND, GATE).promoted
    assert not decide(down.champion, down.challenger, SOUND, GATE).promoted
    # What of the verdict rests on a referee is as sure as the referee, who is surer of models that differ less.
    assert 0 < up.referee_error < 0.02
    assert held(half, replace(half, noise=0.9), log).referee_error < up.referee_error / 2
    assert not decide(up.champion, up.challenger, SOUND, GATE, referee_error=0.1).promoted
    # Slates that can tell are the same ones for both, and so are what is popular and what is new.
    assert (np.isfinite(up.champion.judged_E) == np.isfinite(up.challenger.judged_E)).all()
    assert up.champion.figures["novelty"].mean != up.challenger.figures["novelty"].mean


def test_a_model_is_its_own_equal(log: list[Example]) -> None:
    same = held(Weighing(1.0, 0.5), Weighing(1.0, 0.5), log)
    np.testing.assert_array_equal(same.champion.judged_E, same.challenger.judged_E)
    assert same.champion.figures == same.challenger.figures and same.referee_error == 0.0


def test_scale_and_level_of_scores_are_calibrated_away_on_older_examples(log: list[Example]) -> None:
    usual, steep = (held(Weighing(1.5, 0.0), Weighing(known, 0.0), log) for known in (1.5, 15.0))
    expected = usual.challenger.figures["log_loss"].mean
    assert steep.challenger.figures["log_loss"].mean == pytest.approx(expected, rel=1e-3)
    assert usual.challenger.figures["calibration_error"].mean < 0.06
    # Of what it is judged on calibration knows nothing: with all older clicks gone it expects none.
    silent = [replace(one, clicked_N=np.zeros_like(one.clicked_N)) for one in log[:OLDER]]
    told = held(Weighing(1.5, 0.0), Weighing(1.5, 0.0), [*silent, *log[OLDER:]])
    assert told.challenger.figures["log_loss"].mean > 1.5 * expected


def test_what_was_not_shown_counts_in_the_verdict(log: list[Example]) -> None:
    # Both say the same of what was shown, which cannot tell them apart; the challenger raises the others at random.
    def blurred(example: Example) -> Example:
        features_NF = example.features_NF.copy()
        features_NF[: example.num_shown, NOISE] = 0.0
        features_NF[example.num_shown :, NOISE] *= 3.0
        return replace(example, features_NF=features_NF)

    found = held(Weighing(1.0, 0.0), Weighing(1.0, 1.0), [blurred(one) for one in log])
    assert found.champion.figures["ndcg_10"] == found.challenger.figures["ndcg_10"]
    assert np.nanmean(found.challenger.judged_E - found.champion.judged_E) < -0.02
    assert not decide(found.champion, found.challenger, SOUND, GATE).promoted
