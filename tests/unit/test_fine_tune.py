"""Fine-tuning on made-up impressions whose truth is known, with a tiny random BERT."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor

from tailrace.errors import TrainingDiverged
from tailrace.ids import ItemId, ModelVersion, RequestId, UserId
from tailrace.settings import TrainingSettings
from tailrace.tastes import TasteModel, Tastes, bucket, make_tastes, no_tastes
from tests.unit.conftest import FEATURE_NAMES, PRIOR
from training.batches import Batch
from training.bert import PACKAGED, Bert, BertShape, load_base
from training.course import compute_losses, score_batch
from training.dataset import Corpus
from training.examples import Example
from training.fine_tune import FineTuned, fine_tune
from training.first_step import Factors, learn_tastes
from training.learner import Learner, feature_units, to_raw_units, to_standard_units
from training.lessons import Lesson, choose_lessons, plan_batches
from training.logit_scale import level_shift, scale_clicks
from training.lora import adapt_layers, merge_layers
from training.losses import ndcg
from training.model import SplitRanker

SHAPE = BertShape(
    vocab_size=30_522,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
SPLIT = 1
COSINE, RANK = FEATURE_NAMES.index("cosine"), FEATURE_NAMES.index("rank_in_pool")
WORDS = ("garden", "chess", "winter", "trade", "robot", "moon", "jazz", "bread")
PLAIN = TrainingSettings(
    epochs=3, batch=8, head_learning_rate=1e-2, learning_rate=1e-3, precision="fp32", threads=1, trainable_layers=0
)


def small_ranker(
    prior: dict[str, float] | None = None,
    seed: int = 0,
    *,
    item_states: int = 2,
    names: Sequence[str] = FEATURE_NAMES,
) -> SplitRanker:
    """An untrained ranker over a random BERT."""
    torch.manual_seed(seed)
    return SplitRanker(
        Bert(SHAPE),
        split_layer=SPLIT,
        item_states=item_states,
        feature_names=names,
        prior=PRIOR if prior is None else prior,
        head_width=8,
    ).eval()


@cache
def tokenizer() -> Tokenizer:
    found = load_base(PACKAGED)[1]
    found.no_padding()
    found.no_truncation()
    return found


Clicks = Callable[[np.ndarray, Sequence[str], np.random.Generator], np.ndarray]


def make_examples(
    count: int,
    clicks: Clicks,
    *,
    seed: int = 0,
    num_shown: int = 6,
    num_unshown: int = 2,
    rated: bool = False,
    policy: float = 0.0,
) -> list[Example]:
    """Impressions with random texts and features; `clicks` says of features, texts and chance what is clicked.

    With `policy` the feature `rank_in_pool` falls with the position, as what a logging policy ordered by does.
    """
    rng = np.random.default_rng(seed)
    examples = []
    for number in range(count):
        size = num_shown + num_unshown
        texts = tuple(" ".join(rng.choice(WORDS, rng.integers(2, 6))) for _ in range(size))
        features = rng.normal(size=(size, len(FEATURE_NAMES))).astype(np.float32) * 3 + 7
        features[:, RANK] -= policy * np.arange(size)
        clicked = clicks(features, texts, rng)
        clicked[num_shown:] = False
        stars = np.clip(3 + (features[:, COSINE] - 7) / 3, 1, 5).astype(np.float32)
        examples.append(
            Example(
                request_id=RequestId(f"{seed}-{number}"),
                user_id=UserId(f"u{number}"),
                at_ms=number,
                model_version=ModelVersion("v0"),
                user_text=" ".join(rng.choice(WORDS, rng.integers(1, 12))),
                item_ids=tuple(ItemId(f"i{item}") for item in range(size)),
                texts=texts,
                num_shown=num_shown,
                features_NF=features,
                tastes=random_tastes(size, seed=[seed, number]),
                scores_N=np.zeros(size, np.float32),
                propensities_N=np.full(size, np.nan, np.float32),
                gains_N=clicked.astype(np.float32),
                clicked_N=clicked,
                ratings_N=np.where(clicked & rated, stars, np.nan).astype(np.float32),
            )
        )
    return examples


def random_tastes(size: int, seed: Sequence[int]) -> Tastes:
    """Answers of a user and tags of items that have nothing to do with each other."""
    rng = np.random.default_rng(seed)
    tags_N = [[f"tag {number}" for number in rng.integers(9, size=rng.integers(4))] for _ in range(size)]
    clicked = rng.uniform(size=9).tolist()
    return make_tastes({f"tag {number}": (share, 3.0) for number, share in enumerate(clicked)}, tags_N)


def by_cosine(features: np.ndarray, texts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Clicked is what has the highest cosine of the first six."""
    return np.asarray(np.arange(len(texts)) == features[:6, COSINE].argmax())


def by_word(features: np.ndarray, texts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """Clicked is what speaks of the moon."""
    return np.array(["moon" in text for text in texts])


def never(features: np.ndarray, texts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    return np.zeros(len(texts), dtype=np.bool_)


def learn(
    folder: Path,
    train: Sequence[Example],
    stop: Sequence[Example],
    settings: TrainingSettings = PLAIN,
    *,
    ranker: SplitRanker | None = None,
    replay: Sequence[Example] = (),
    position_bias: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
    checkpoint_every_s: float = 3600.0,
) -> FineTuned:
    return fine_tune(
        ranker or small_ranker({}),
        tokenizer(),
        train,
        stop,
        replay,
        settings,
        max_user_tokens=16,
        max_item_tokens=8,
        folder=folder,
        position_bias=position_bias,
        progress=progress,
        checkpoint_every_s=checkpoint_every_s,
    )


def change(settings: TrainingSettings = PLAIN, **changes: object) -> TrainingSettings:
    return TrainingSettings(**{name: getattr(settings, name) for name in settings.__struct_fields__} | changes)


def read(ranker: SplitRanker, examples: Sequence[Example], first_layer: int, **options: int) -> Corpus:
    """The examples as the ranker's frozen layers see them, features in their own units."""
    return Corpus(
        ranker,
        tokenizer(),
        [Lesson(example) for example in examples],
        first_layer=first_layer,
        max_user_tokens=16,
        max_item_tokens=8,
        units=(np.zeros(len(FEATURE_NAMES)), np.ones(len(FEATURE_NAMES))),
        precision=nullcontext,
        device=torch.device("cpu"),
        **options,
    )


def score(ranker: SplitRanker, examples: Sequence[Example]) -> list[Tensor]:
    """Click logits [N] of each example through the ranker's own forward, as training code never calls it."""

    def tokens(texts: Sequence[str], most: int) -> tuple[Tensor, Tensor]:
        found = [encoding.ids for encoding in tokenizer().encode_batch(list(texts))]
        found = [ids if len(ids) <= most else [*ids[: most - 1], ids[-1]] for ids in found]
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in found], batch_first=True)
        return padded, (torch.arange(padded.shape[1]) < torch.tensor([[len(ids)] for ids in found])).long()

    with torch.no_grad():
        return [
            ranker(
                *tokens([one.user_text], 16),
                *(part[None] for part in tokens(one.texts, 8)),
                torch.from_numpy(one.features_NF)[None],
                torch.from_numpy(ranker.taste_model.worth_of(one.tastes))[None],
            )[0][0]
            for one in examples
        ]


def mean_ndcg(ranker: SplitRanker, examples: Sequence[Example]) -> float:
    logits, gains = torch.stack(score(ranker, examples)), torch.tensor(np.stack([one.gains_N for one in examples]))
    shown = torch.arange(gains.shape[1]) < examples[0].num_shown
    return float(ndcg(logits, gains, shown.expand(gains.shape)).nanmean())


@pytest.mark.parametrize(("clicks", "layers"), [(by_cosine, 0), (by_word, 0), (by_word, 1), (by_word, 2)])
def test_what_is_clicked_is_learned(tmp_path: Path, clicks: Clicks, layers: int) -> None:
    train, stop, unseen = (make_examples(count, clicks, seed=seed) for count, seed in ((400, 1), (60, 2), (60, 3)))
    found = learn(tmp_path, train, stop, change(trainable_layers=layers, epochs=6))
    assert found.better
    assert mean_ndcg(found.ranker, unseen) > 0.95 > 0.75 > mean_ndcg(small_ranker({}), unseen)
    assert found.history[-1].losses["listwise"] < found.history[0].losses["listwise"]


LIKES = {"castles": "ghosts", "ships": "storms", "trains": "letters"}


def make_lovers(count: int, seed: int, likes: Mapping[str, str] = LIKES) -> list[Example]:
    """Impressions on users of whom each loves two things that go together, and clicks most that is tagged so.

    Of the first of the two they have been shown something before, and clicked it where they love it.
    """
    rng = np.random.default_rng(seed)
    made, tags = [], [*likes, *likes.values(), "news"]
    for number, one in enumerate(make_examples(count, never, seed=seed)):
        loved = list(likes)[number // 8 % len(likes)]  # eight slates for each of them
        tags_N = [[str(tag)] for tag in rng.choice(tags, size=len(one.texts))]
        wanted_N = np.array([tag in (loved, likes[loved]) for (tag,) in tags_N])
        clicked_N = wanted_N & (rng.random(len(tags_N)) < 0.8) & (np.arange(len(tags_N)) < one.num_shown)
        made.append(
            replace(
                one,
                user_id=UserId(f"lover {seed} {number // 8}"),
                tastes=make_tastes({tag: (3.0 * (tag == loved), 3.0) for tag in likes}, tags_N),
                clicked_N=clicked_N,
                gains_N=clicked_N.astype(np.float32),
            )
        )
    return made


def same_tastes(one: SplitRanker, other: SplitRanker) -> bool:
    """Whether two rankers know the same of tastes, to the bit."""
    return all(map(np.array_equal, astuple(one.taste_model), astuple(other.taste_model)))


def covariance(model: TasteModel, one: str, other: str) -> float:
    """How what two tags are worth to users goes together."""
    row, column = (model.known_T.tolist().index(bucket(tag)) for tag in (one, other))
    return float(model.covariance_TT[row, column])


def test_which_tags_are_liked_together_is_learned_and_serves_who_was_shown_one_of_them(tmp_path: Path) -> None:
    unseen = make_lovers(160, 3)
    found = learn(tmp_path, make_lovers(400, 1), make_lovers(160, 2), change(epochs=2))
    assert found.better and found.first_step is not None and found.first_step.tastes > 0
    assert mean_ndcg(found.ranker, unseen) > 0.9 > 0.7 > mean_ndcg(small_ranker({}), unseen)
    for loved, wanted in LIKES.items():
        others = [covariance(found.ranker.taste_model, loved, other) for other in LIKES.values() if other != wanted]
        assert covariance(found.ranker.taste_model, loved, wanted) > 0 > max(others)


def first_step(train: Sequence[Example], ranker: SplitRanker) -> Factors | None:
    """What the first step of a learner says; it changes the ranker."""
    learner = Learner(ranker, len(ranker.bert.stack), num_positions=1)
    corpus = read(ranker, train, len(ranker.bert.stack))
    return learn_tastes(learner, train, corpus, nullcontext, np.ones(1))


def test_first_step_changes_nothing_where_nothing_was_clicked() -> None:
    ranker = small_ranker({"cosine": 1.0})
    before = {name: weight.clone() for name, weight in ranker.state_dict().items()}
    assert first_step(make_examples(40, never), ranker) is None
    assert not len(ranker.taste_model.known_T)
    assert all(torch.equal(weight, before[name]) for name, weight in ranker.state_dict().items())


def test_tastes_learned_of_clicks_by_chance_are_kept_out_of_the_score() -> None:
    def by_chance(features: np.ndarray, texts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
        return np.asarray(rng.random(len(texts)) < 0.3)

    # Of few users with many tags much is found by chance, and would explain their own clicks well.
    train = [
        replace(one, user_id=UserId(f"u{number % 20}")) for number, one in enumerate(make_examples(240, by_chance))
    ]
    factors = first_step(train, small_ranker({"cosine": 1.0}))
    assert factors is not None and factors.tastes < 0.3


def test_features_of_topics_give_way_to_tastes_that_say_it_better() -> None:
    """A feature that tells nothing any more once tastes are known is weighed down, and the rest is not."""
    rng = np.random.default_rng(0)
    ranker = small_ranker({"tag_response": 1.0, "cosine": 0.3}, names=("cosine", "tag_response", *FEATURE_NAMES[2:]))

    def noised(examples: list[Example]) -> list[Example]:
        made = []
        for one in examples:
            features = one.features_NF.copy()
            features[:, 1] = one.gains_N + rng.normal(scale=2.0, size=len(features))
            features[:, COSINE] = one.gains_N * 3 + rng.normal(scale=1.0, size=len(features))
            made.append(replace(one, features_NF=features))
        return made

    weights = first_step(noised(make_lovers(400, 1)), ranker)
    assert weights is not None
    assert weights.topics < 0.5 * weights.rest
    prior = dict(zip(ranker.feature_names, ranker.head.prior.tolist(), strict=True))
    assert prior["tag_response"] == pytest.approx(weights.topics, rel=1e-3)
    assert prior["cosine"] == pytest.approx(0.3 * weights.rest, rel=1e-3)
    assert ranker.taste_model.gain == pytest.approx(weights.tastes, rel=1e-3)


def test_first_step_alone_is_kept_where_the_epochs_after_it_do_harm(tmp_path: Path) -> None:
    found = learn(tmp_path, make_lovers(400, 1), make_lovers(160, 2), change(head_learning_rate=200.0, epochs=1))
    assert found.better
    assert "the first step alone" in found.reason
    assert found.first_step is not None


def test_places_are_expected_to_be_seen_as_explored_ones_were(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seen_K = (np.arange(6) + 1.0) ** -0.7

    def explored(one: Example) -> Example:
        clicked_N = np.append(rng.random(6) < 0.1 * seen_K, [False, False])
        return replace(one, clicked_N=clicked_N, gains_N=clicked_N.astype(np.float32), explored=tuple(range(6)))

    train, stop = ([explored(one) for one in make_examples(count, never, seed=count)] for count in (1500, 200))
    still = change(head_learning_rate=0.0, learning_rate=0.0)
    found = learn(tmp_path, train, stop, still, position_bias=True)
    np.testing.assert_allclose(found.position_bias, np.log(seen_K), atol=0.25)


def test_ratings_are_learned_beside_clicks(tmp_path: Path) -> None:
    train, stop = (make_examples(count, by_cosine, seed=seed, rated=True) for count, seed in ((300, 1), (60, 2)))
    found = learn(tmp_path, train, stop, change(epochs=6, rating_weight=1.0))
    assert found.history[-1].losses["rating"] < 0.3 * found.history[0].losses["rating"]


def test_planted_position_bias_does_not_fool_the_head(tmp_path: Path) -> None:
    def examined(features: np.ndarray, texts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
        attraction = 1 / (1 + np.exp(-(features[:, COSINE] - 7) / 2))
        return np.asarray(rng.random(len(texts)) < attraction * 0.6 ** np.arange(len(texts)))

    # All candidates are shown: what a policy left out is never clicked, and that does speak for the policy's order.
    train, stop = (
        make_examples(count, examined, seed=seed, num_unshown=0, policy=2.0) for count, seed in ((1500, 1), (300, 2))
    )

    def pull(found: FineTuned) -> float:
        """How much the logit rises with the feature that says nothing but the place, against the one that counts."""
        head = found.ranker.head
        probe = torch.full((1, 3, len(FEATURE_NAMES)), 7.0)
        probe[0, 1, RANK] -= 4
        probe[0, 2, COSINE] -= 4
        with torch.no_grad():
            logits = head(torch.zeros(1, 3, 32), torch.zeros(1, 32), probe, torch.zeros(1, 3))[0][0]
        return float((logits[0] - logits[1]) / (logits[0] - logits[2]))

    settings = change(epochs=6, head_learning_rate=5e-3, batch=16)
    naive = pull(learn(tmp_path / "naive", train, stop, settings, position_bias=False))
    aware = learn(tmp_path / "aware", train, stop, settings, position_bias=True)
    assert naive > 0.4
    assert abs(pull(aware)) < 0.3 * naive
    assert aware.position_bias[0] == 0 > aware.position_bias[2] > aware.position_bias[4]


def test_parent_is_returned_where_nothing_beats_it(tmp_path: Path) -> None:
    def worst(features: np.ndarray, texts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
        return np.asarray(np.arange(len(texts)) == features[:6, COSINE].argmin())

    parent = small_ranker({"cosine": 1.0})
    # Without tags: tastes learned of random ones may do a little better by chance.
    train, stop = (
        [replace(one, tastes=no_tastes(len(one.texts))) for one in make_examples(count, clicks, seed=seed)]
        for count, clicks, seed in ((200, worst, 1), (60, by_cosine, 2))
    )
    found = learn(tmp_path, train, stop, ranker=parent)
    assert not found.better
    assert "nothing beats the parent" in found.reason
    assert found.ranker is parent
    assert all(
        torch.equal(weight, small_ranker({"cosine": 1.0}).state_dict()[name])
        for name, weight in parent.state_dict().items()
    )


def test_stop_slice_without_a_gain_proves_nothing(tmp_path: Path) -> None:
    parent = small_ranker()
    for stop in (make_examples(10, never, seed=2), []):
        found = learn(tmp_path, make_examples(50, by_cosine), stop, ranker=parent)
        assert (found.better, found.ranker) == (False, parent)
        assert "no slate of the stop slice has a gain" in found.reason


def test_training_ends_early_once_the_stop_slice_gets_no_better(tmp_path: Path) -> None:
    def worst(features: np.ndarray, texts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
        return np.asarray(np.arange(len(texts)) == features[:6, COSINE].argmin())

    found = learn(tmp_path, make_examples(100, worst), make_examples(40, by_cosine, seed=2), change(epochs=9))
    assert found.stopped_early
    assert len(found.history) == 3


@pytest.mark.parametrize(("layers", "frozen"), [(0, 3), (1, 2), (2, 1), (9, SPLIT)])
def test_frozen_weights_are_unchanged_bit_for_bit(tmp_path: Path, layers: int, frozen: int) -> None:
    parent = small_ranker({})
    found = learn(
        tmp_path,
        make_examples(60, by_cosine),
        make_examples(20, by_cosine, seed=2),
        change(trainable_layers=layers, epochs=1, dropout=0.0),
        ranker=parent,
    )
    assert found.better
    before, after = parent.state_dict(), found.ranker.state_dict()
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    learning = {name for name in before if name.startswith("ranking.") and int(name[8]) >= frozen - SPLIT}
    assert {name for name in changed if not name.startswith("head.")} == learning
    assert {"head.inner.weight", "head.outer.weight"} <= changed and "head.prior" not in changed


def test_linear_part_is_changed_by_the_factors_of_the_first_step_alone(tmp_path: Path) -> None:
    names = ("cosine", "tag_response", *FEATURE_NAMES[2:])
    parent = small_ranker({"cosine": 0.3, "tag_response": 1.0, names[2]: 0.2}, names=names)
    found = learn(tmp_path, make_lovers(400, 1), make_lovers(160, 2), change(epochs=2), ranker=parent)
    assert found.better and found.first_step is not None and len(found.history) == 2
    share_F = (found.ranker.head.prior / parent.head.prior).tolist()
    assert share_F[2] == pytest.approx(share_F[0], rel=1e-4)
    assert share_F[1] == pytest.approx(share_F[0] * found.first_step.topics / found.first_step.rest, rel=1e-3, abs=1e-4)
    assert not found.ranker.head.prior[3:].any()


def test_same_seed_same_losses_and_another_seed_others(tmp_path: Path) -> None:
    train, stop = make_examples(80, by_word), make_examples(20, by_word, seed=2)
    settings = change(trainable_layers=1, epochs=2)
    once, again, other = (
        learn(tmp_path / name, train, stop, change(settings, seed=seed))
        for name, seed in (("once", 0), ("again", 0), ("other", 1))
    )
    assert [r.losses for r in once.history] == [r.losses for r in again.history] != [r.losses for r in other.history]
    assert all(torch.equal(w, again.ranker.state_dict()[name]) for name, w in once.ranker.state_dict().items())
    assert same_tastes(once.ranker, again.ranker)


def learn_and_die(folder: Path, settings: TrainingSettings, at_step: int) -> None:
    """Runs in a process of its own, which is killed in the middle of an epoch."""
    torch.set_num_threads(1)

    def die(step: str, done: int, total: int) -> None:
        if step == "learn" and done == at_step:
            os.kill(os.getpid(), signal.SIGKILL)

    learn(
        folder,
        make_examples(80, by_word),
        make_examples(20, by_word, seed=2),
        settings,
        progress=die,
        checkpoint_every_s=0.0,
    )


@pytest.mark.parametrize("rank", [0, 2])
def test_fine_tune_goes_on_after_a_kill_to_the_same_weights(tmp_path: Path, rank: int) -> None:
    settings = change(trainable_layers=1, epochs=3, lora_rank=rank, dropout=0.2)
    victim = multiprocessing.get_context("spawn").Process(
        target=learn_and_die, args=(tmp_path / "killed", settings, 14)
    )
    victim.start()
    victim.join(120)
    assert victim.exitcode == -signal.SIGKILL
    train, stop = make_examples(80, by_word), make_examples(20, by_word, seed=2)
    steps: list[int] = []

    def note(step: str, done: int, total: int) -> None:
        if step == "learn":
            steps.append(done)

    went_on = learn(tmp_path / "killed", train, stop, settings, progress=note)
    straight = learn(tmp_path / "straight", train, stop, settings)
    assert (went_on.resumed, straight.resumed) == (True, False)
    assert steps[0] == 14  # the step after which it was killed was not on disk yet: it is done once more
    assert [r.losses for r in went_on.history] == [r.losses for r in straight.history]
    assert same_tastes(went_on.ranker, straight.ranker)
    found, expected = went_on.ranker.state_dict(), straight.ranker.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


def test_checkpoint_of_other_examples_or_damaged_is_left_alone(tmp_path: Path) -> None:
    train, stop = make_examples(40, by_word), make_examples(20, by_word, seed=2)
    settings = change(epochs=1)
    learn(tmp_path, train, stop, settings)
    assert learn(tmp_path, train, stop, settings).resumed
    assert not learn(tmp_path, train[1:], stop, settings).resumed
    (tmp_path / "checkpoint.safetensors").write_bytes(b"not a checkpoint")
    assert not learn(tmp_path, train, stop, settings).resumed


def test_adapters_merge_into_weights_that_say_the_same() -> None:
    torch.manual_seed(0)
    layer = small_ranker().bert.stack[0]
    states = torch.randn(4, 5, 32)
    plain_names = set(layer.state_dict())
    plain = layer.project(states)
    adapt_layers([layer], 3)
    torch.testing.assert_close(layer.project(states), plain)  # adapters start at nothing
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            if name.endswith("up"):
                weight.normal_()

    def out() -> Tensor:
        return layer(states, *layer.project(states), torch.zeros(1))

    with torch.no_grad():
        adapted, key = out(), layer.project(states)[1]
        merge_layers([layer])
        torch.testing.assert_close(out(), adapted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(layer.project(states)[0], plain[0])
    torch.testing.assert_close(key, plain[1])  # keys have no adapter
    assert set(layer.state_dict()) == plain_names


def test_low_rank_fine_tune_ends_in_a_plain_ranker_whose_keys_are_the_parents(tmp_path: Path) -> None:
    parent = small_ranker({})
    train, stop = make_examples(200, by_word), make_examples(40, by_word, seed=2)
    settings = change(trainable_layers=2, lora_rank=4, epochs=4, learning_rate=1e-2)
    found = learn(tmp_path, train, stop, settings, ranker=parent)
    assert found.better
    before, after = parent.state_dict(), found.ranker.state_dict()
    assert before.keys() == after.keys()
    differ = {name for name in before if not torch.equal(before[name], after[name])}
    changed = {name for name in differ if not name.startswith("head.")}
    adapted = ("query_key_value.weight", "widen.weight", "narrow.weight")
    assert changed == {f"ranking.{index - SPLIT}.{name}" for index in (1, 2) for name in adapted}
    weight = f"ranking.{2 - SPLIT}.query_key_value.weight"
    assert torch.equal(before[weight][32:64], after[weight][32:64])


def test_packed_impressions_give_the_gradients_of_single_candidates() -> None:
    examples = make_examples(3, by_cosine, rated=True) + make_examples(2, by_word, num_shown=3, num_unshown=0, seed=4)
    ranker = small_ranker()
    with torch.no_grad():
        ranker.head.outer.weight.normal_()
    corpus = read(ranker, examples, SPLIT)
    learner = Learner(ranker, SPLIT, num_positions=4)

    def gradients(learner: Learner) -> dict[str, Tensor]:
        found = {n: weight.grad.clone() for n, weight in learner.named_parameters() if weight.grad is not None}
        learner.zero_grad()
        return found

    batch = corpus.batch(range(5), ranker.taste_model)
    learner.eval()
    logits = learner(batch)[0]
    (logits * batch.real).sin().sum().backward()
    packed = gradients(learner)
    alone = []
    for row in range(5):
        one = corpus.batch([row], ranker.taste_model)
        for item in range(one.real.shape[1]):
            single = Batch(
                one.users, one.user_vectors, one.user_mask,
                one.states[:, [item]], one.state_mask[:, [item]], one.features[:, [item]],
                one.tag_worth[:, [item]], one.real[:, [item]],
            )  # fmt: skip
            logit = learner(single)[0]
            logit.sin().sum().backward()
            alone.append(logit.item())
    unpacked = gradients(learner)
    torch.testing.assert_close(logits[batch.real], torch.tensor(alone), atol=1e-5, rtol=1e-5)
    assert packed.keys() == unpacked.keys()
    for name, gradient in packed.items():
        torch.testing.assert_close(gradient, unpacked[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("first_layer", [1, 2, 3])
@pytest.mark.parametrize("item_states", [0, 2])
@pytest.mark.parametrize("learned", [None, 0, 1])
def test_batches_score_as_the_ranker_itself_does(first_layer: int, item_states: int, learned: int | None) -> None:
    examples = make_examples(4, by_cosine) + make_examples(3, by_word, num_shown=3, num_unshown=0, seed=4)
    ranker = small_ranker(item_states=item_states)
    with torch.no_grad():
        ranker.head.outer.weight.normal_()
        ranker.head.match_gain.fill_(1.0)
        if learned is not None:  # from this layer on, what ranks is no longer what embeds
            for weight in ranker.upper[learned].parameters():
                weight.add_(0.1 * torch.randn(weight.shape))
    expected = score(ranker, examples)
    for kept_bytes in (2**30, 0):  # kept between epochs, and computed again each time
        corpus = read(ranker, examples, first_layer, kept_bytes=kept_bytes)
        batch = corpus.batch(range(7), ranker.taste_model)
        with torch.no_grad():
            logits = Learner(ranker, first_layer, num_positions=1)(batch)[0]
        for row, one in enumerate(expected):  # states rest as float16
            torch.testing.assert_close(logits[row, : len(one)], one, atol=1e-2, rtol=1e-3)


def test_texts_read_in_several_threads_give_the_same_batches_bit_for_bit() -> None:
    ranker, examples = small_ranker(), make_examples(100, by_word)
    one, three = (
        read(ranker, examples, 2, threads=threads).batch(range(100), ranker.taste_model) for threads in (1, 3)
    )
    assert all(torch.equal(getattr(one, name), getattr(three, name)) for name in ("users", "user_vectors", "states"))


def test_scaled_clicks_keep_their_order_and_ratings_stay() -> None:
    ranker = small_ranker()
    for name in ("outer.weight", "match_gain"):
        torch.nn.init.normal_(ranker.head.get_parameter(name))
    ranker.taste_model = replace(TasteModel.ignorant(), gain=0.5)
    torch.manual_seed(1)
    inputs, worth = (
        (torch.randn(2, 5, 32), torch.randn(2, 32), torch.randn(2, 5, len(FEATURE_NAMES))),
        torch.randn(2, 5),
    )
    with torch.no_grad():
        clicks, ratings = ranker.head(*inputs, worth)
        scale_clicks(ranker, 3.0)
        scaled, same = ranker.head(*inputs, 3.0 * worth)
    assert ranker.taste_model.gain == 1.5
    torch.testing.assert_close(scaled, 3.0 * clicks, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(same, ratings, atol=1e-4, rtol=1e-4)


def test_head_says_the_same_in_standard_units_and_back() -> None:
    ranker = small_ranker()
    head = ranker.head
    with torch.no_grad():
        head.outer.weight.normal_()
        head.rating_affine.copy_(torch.tensor([0.4, -0.3]))
    features = np.stack([one.features_NF for one in make_examples(20, by_cosine)])
    units = feature_units(head, features.reshape(-1, len(FEATURE_NAMES)))
    head.feature_mean.copy_(torch.from_numpy(units[0]))
    head.feature_std.copy_(torch.from_numpy(units[1]))
    pooled, users = torch.randn(20, 8, 32), torch.nn.functional.normalize(torch.randn(20, 32), dim=-1)
    worth = torch.randn(20, 8)
    with torch.no_grad():
        raw = head(pooled, users, torch.from_numpy(features), worth)
        to_standard_units(head, *units)
        standard = head(pooled, users, torch.from_numpy(((features - units[0]) / units[1]).astype(np.float32)), worth)
        to_raw_units(head, *units)
        back = head(pooled, users, torch.from_numpy(features), worth)
    for one, other in zip(raw * 2, standard + back, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_units_are_taken_from_the_first_round_and_kept_after_it(tmp_path: Path) -> None:
    stop = make_examples(30, by_cosine, seed=2)
    first = learn(tmp_path / "1", make_examples(100, by_cosine), stop).ranker
    assert first.head.feature_mean.numpy() == pytest.approx(np.full(len(FEATURE_NAMES), 7), abs=0.5)
    assert first.head.feature_std.numpy() == pytest.approx(np.full(len(FEATURE_NAMES), 3), abs=0.5)
    wider = [
        Example(**{name: getattr(one, name) for name in one.__slots__} | {"features_NF": one.features_NF * 9})
        for one in make_examples(100, by_cosine, seed=5)
    ]
    second = learn(tmp_path / "2", wider, stop, ranker=first).ranker
    assert torch.equal(second.head.feature_mean, first.head.feature_mean)
    assert torch.equal(second.head.feature_std, first.head.feature_std)


def test_units_are_not_measured_by_a_few_stray_values() -> None:
    features = np.random.default_rng(0).normal(7, 3, size=(1000, len(FEATURE_NAMES))).astype(np.float32)
    features[:, RANK] = 0.0
    features[:5, RANK] = 1.0
    std = feature_units(small_ranker().head, features)[1]
    assert std[RANK] == 1.0 and std[COSINE] == pytest.approx(3, abs=0.3)
    features[:300, RANK] = 1.0
    assert feature_units(small_ranker().head, features)[1][RANK] == pytest.approx(0.458, abs=0.001)


def test_what_has_never_varied_says_nothing_until_it_does(tmp_path: Path) -> None:
    def with_rank(examples: Sequence[Example], value: float | None) -> list[Example]:
        changed = []
        for number, one in enumerate(examples):
            features = one.features_NF.copy()
            features[:, RANK] = number % 2 if value is None else value
            changed.append(Example(**{name: getattr(one, name) for name in one.__slots__} | {"features_NF": features}))
        return changed

    train, stop = make_examples(100, by_cosine), make_examples(30, by_cosine, seed=2)
    first = learn(tmp_path / "1", with_rank(train, 0.0), with_rank(stop, 0.0)).ranker
    column = first.head.inner.weight[:, RANK - len(FEATURE_NAMES)]
    assert not column.any() and first.head.outer.weight.any()
    prior = first.head.prior[RANK].item()
    for usual, unheard in zip(score(first, with_rank(stop, 0.0)), score(first, with_rank(stop, 1.0)), strict=True):
        torch.testing.assert_close(unheard, usual + prior, atol=1e-4, rtol=1e-4)

    second = learn(tmp_path / "2", with_rank(train, None), with_rank(stop, None), ranker=first).ranker
    assert second.head.inner.weight[:, RANK - len(FEATURE_NAMES)].any(), "once it varies, it is learned from"
    assert second.head.feature_std[RANK] == pytest.approx(0.5, abs=0.01), "in units of its own"
    assert second.head.feature_std[COSINE] == first.head.feature_std[COSINE]


def test_replay_keeps_the_new_model_near_its_parent(tmp_path: Path) -> None:
    def least(features: np.ndarray, texts: Sequence[str], rng: np.random.Generator) -> np.ndarray:
        return np.asarray(np.arange(len(texts)) == features[:6, COSINE].argmin())

    parent = small_ranker({"cosine": 1.0})
    train, stop = make_examples(200, least), make_examples(40, least, seed=2)
    older = make_examples(100, never, seed=3)
    settings = change(silent_share=1.0, epochs=2)
    drifts = []
    for weight in (0.0, 10.0):
        found = learn(
            tmp_path / str(weight), train, stop, change(settings, kl_weight=weight), ranker=parent, replay=older
        )
        pairs = zip(score(parent, older), score(found.ranker, older), strict=True)
        # Of the order alone: the parent's scale is not kept, where what happened speaks against it.
        drifts.append(np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in pairs]))
    assert drifts[1] < 0.5 * drifts[0]


def test_every_slate_that_teaches_is_kept_and_the_silent_weigh_for_those_left_out() -> None:
    clicked, silent = make_examples(50, by_cosine), make_examples(1000, never, seed=2)
    lessons = choose_lessons(clicked + silent, silent[:400], silent_share=0.25, seed=0)
    assert [lesson.example for lesson in lessons if lesson.teaches] == clicked
    assert sum(one.weight for one in lessons if not one.replayed and not one.teaches) == pytest.approx(1000, rel=0.15)
    assert {one.weight for one in lessons} == {1.0, 4.0}
    assert 60 < sum(one.replayed for one in lessons) < 140
    assert lessons == choose_lessons(clicked + silent, silent[:400], silent_share=0.25, seed=0)


def test_level_makes_clicks_as_likely_as_they_were_frequent() -> None:
    rng = np.random.default_rng(0)
    logits, clicked = rng.normal(size=5000) * 2 + 9, rng.random(5000) < 0.07
    shift = level_shift(logits, clicked, np.ones(5000))
    assert float((1 / (1 + np.exp(-(logits + shift)))).mean()) == pytest.approx(clicked.mean(), abs=1e-3)


def test_batches_hold_every_example_once_and_texts_of_like_length() -> None:
    lengths = np.random.default_rng(0).integers(4, 96, 1000).tolist()
    plans = [plan_batches(lengths, 16, seed=0, epoch=epoch) for epoch in (0, 1)]
    for plan in plans:
        assert sorted(index for batch in plan for index in batch) == list(range(1000))
    assert plans[0] != plans[1]
    padded = sum(max(lengths[index] for index in batch) * len(batch) for batch in plans[0])
    assert padded < 1.1 * sum(lengths)


def test_loss_that_is_no_number_stops_the_fine_tune_naming_the_step(tmp_path: Path) -> None:
    train = make_examples(40, by_cosine)
    train[7].features_NF[0, 0] = np.nan
    with pytest.raises(TrainingDiverged, match="step 0"):
        learn(tmp_path, train, make_examples(10, by_cosine, seed=2))


def test_nothing_to_learn_from_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no example"):
        learn(tmp_path, [], make_examples(10, by_cosine))


def test_curves_and_progress_are_there_to_be_looked_at(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    learn(
        tmp_path,
        make_examples(40, by_cosine),
        make_examples(10, by_cosine, seed=2),
        change(epochs=2),
        progress=lambda *step: seen.append(step),
    )
    assert list(dict.fromkeys(name for name, _, _ in seen)) == ["read", "learn", "done"]
    assert ("learn", 10, 10) in seen
    assert list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))


def test_losses_add_up_to_what_is_minimised() -> None:
    settings = change(pointwise_weight=0.5, rating_weight=0.25, kl_weight=2.0)
    ranker = small_ranker()
    corpus = read(ranker, make_examples(6, by_cosine, rated=True), 3)
    labels = corpus.labels(range(6))
    scores = score_batch(Learner(ranker, 3, num_positions=3), corpus, range(6), labels, nullcontext)
    losses = compute_losses(scores, labels, torch.zeros(6, 8), settings)
    parts = losses["listwise"] + 0.5 * losses["pointwise"] + 0.25 * losses["rating"] + 2.0 * losses["parent"]
    torch.testing.assert_close(losses["total"], parts)
