"""A challenger's whole way, from the log to all users: a real round, a real replica, the watchdog's own judgement.

Everything is real but Kafka, HTTP and the readers. The ranker is a tiny random BERT over the words of this module.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import BertProcessing

from deploy.training_parts import open_scorer
from services.bodies import Asked, RankedAnswer
from services.hot_swap import ModelSlot
from services.loaded_model import LoadedModel
from services.recommender import recommend
from tailrace.catalogue import Catalogue
from tailrace.errors import BundleError, ScoringError
from tailrace.events import Click, Impression, ModelAnnouncement, Ranked, encode
from tailrace.features import FEATURE_NAMES
from tailrace.ids import EventId, ItemId, ModelVersion, RequestId, UserId
from tailrace.items import Item
from tailrace.registry import open_registry
from tailrace.rounds import RoundRecord, open_round_log
from tailrace.settings import load_settings
from tests.made_up_slates import make_example
from tests.recovery.poisons import FARMED, POPULAR, Poison
from tests.recovery.scene import wait_until
from training.bert import Bert, BertShape
from training.examples import Example, JoinCounts
from training.export import export_bundle
from training.fine_tune import FineTuned, Job, learn_alone
from training.judgement import Judgement
from training.live_evidence import ReplicaStatus
from training.log_window import AlreadyRead, LogWindow, Window
from training.model import SplitRanker
from training.parity import made_up_texts
from training.round import Progress, RoundParts, run_round
from training.watchdog import Watch, if_sound

CATALOGUE, SHOWN = 60, 8
LOGGED, LIVE = 12, 40  # candidates of a slate in the log, and of a request
KNOWN, NEW = FEATURE_NAMES.index("cos_user"), FEATURE_NAMES.index("cos_history")
SETTINGS: dict[str, Any] = {
    "training": {
        "min_examples": 100,
        "holdout_share": 0.4,
        "epochs": 3,
        "trainable_layers": 0,
        "head_learning_rate": 0.02,
        "threads": 1,
        "precision": "fp32",
    },
    # A tiny ranker's times are noise.
    "gate": {"canary_share": 0.5, "canary_impressions": 150, "max_latency_ratio": 10.0},
    "registry": {"keep": 2},
}


@dataclass(frozen=True)
class Visit:
    """What a reader could be shown, and the chance of a click on each."""

    user_id: UserId
    rows_N: np.ndarray
    features_NF: np.ndarray
    chances_N: np.ndarray


class Readers:
    """Readers for whom three things count: two of the features, of which the champion knows one, and the item."""

    def __init__(self, seed: int, *, with_news: bool = True) -> None:
        self.rng = np.random.default_rng(seed)
        self._with_news = with_news
        self._quality_I = np.random.default_rng(0).normal(scale=0.5, size=CATALOGUE)

    def visit(self, candidates: int) -> Visit:
        """Returns the next visit."""
        rows_N = self.rng.choice(CATALOGUE, size=candidates, replace=False)
        features_NF = np.zeros((candidates, len(FEATURE_NAMES)), np.float32)
        features_NF[:, KNOWN] = self.rng.normal(size=candidates)
        features_NF[:, NEW] = self.rng.normal(size=candidates) * self._with_news
        features_NF[:, POPULAR] = self._quality_I[rows_N] + 1.0
        features_NF[:, FARMED] = self.rng.normal(size=candidates)
        worth_N = 1.2 * features_NF[:, KNOWN] + 1.2 * features_NF[:, NEW] + self._quality_I[rows_N]
        user_id = UserId(f"reader-{self.rng.integers(200)}")
        return Visit(user_id, rows_N, features_NF, 1 / (1 + np.exp(1.5 - worth_N)))

    def log(self, count: int) -> list[Example]:
        """Returns slates drawn by lot, so that nothing but the clicks tells what is good, and the clicks."""
        examples = []
        for number in range(count):
            visit = self.visit(LOGGED)
            order = self.rng.permutation(LOGGED)
            clicked = self.rng.random(SHOWN) < visit.chances_N[order[:SHOWN]]
            example = make_example(
                clicked.tolist(),
                unshown=LOGGED - SHOWN,
                items=[f"book-{row}" for row in visit.rows_N[order]],
                number=number,
            )
            examples.append(replace(example, user_id=visit.user_id, features_NF=visit.features_NF[order]))
        return examples


@dataclass(frozen=True)
class FixedLog:
    """A log that holds these examples, as `training.round.FeedbackLog`."""

    examples: Sequence[Example]

    def plan(self, *, now_ms: int, already: AlreadyRead | None) -> LogWindow:
        """Returns a window over everything."""
        return LogWindow(since_ms=0, cutoff_ms=now_ms, already=already, offsets={})

    def read(self, window: LogWindow, progress: Progress) -> Window:
        """Returns the examples."""
        count = len(self.examples)
        return Window(list(self.examples), [], JoinCounts(impressions=count, examples=count))


def _tokenizer_of(job: Job) -> Tokenizer:
    """Returns the tokenizer that a round gave to its fine-tune, and will export."""
    assert isinstance(job, partial)
    [tokenizer] = [one for one in job.args if isinstance(one, Tokenizer)]
    return tokenizer


class Trial:
    """A registry, a champion that has learned what `KNOWN` is worth, one replica that serves it, and the watchdog."""

    def __init__(self, folder: Path) -> None:
        self.settings = load_settings(None, {}, data_dir=str(folder), log_level="error", **SETTINGS)
        self.registry = open_registry(self.settings)
        self._learned: FineTuned | None = None  # one fine-tune, damaged in many ways
        self._publish_first(folder / "v0")
        record = self._round(Readers(1000, with_news=False).log(800), learn=learn_alone)
        self.registry.promote(record.version)
        self.champion = record.version
        self._catalogue = Catalogue()
        for row in range(CATALOGUE):
            item = Item(item_id=ItemId(f"book-{row}"), title=f"text of book {row}")
            self._catalogue.apply_item(item.item_id, encode(item), 1_790_000_000_000)
        self._slot = ModelSlot(
            self.settings, self.registry, self._catalogue, items_read=lambda: True, warm_up=self._warm_up
        ).start()
        assert self._slot.wait(60)

    def challenge(self, poison: Poison | None, seed: int) -> str:
        """Returns who stopped a challenger, and in which words; empty where all users would be given to it.

        Nobody is: it is taken back in the end.
        """
        rng = np.random.default_rng([seed, 7])
        examples: Sequence[Example] = Readers(seed).log(400)
        if poison is not None and poison.of_log is not None:
            examples = poison.of_log(examples, rng)

        def learn(job: Job) -> FineTuned:
            if poison is None or poison.of_log is not None:
                return learn_alone(job)
            self._learned = self._learned or learn_alone(job)
            spoiled = copy.deepcopy(self._learned.ranker)
            if poison.of_model is not None:
                poison.of_model(spoiled, _tokenizer_of(job), rng)
            return replace(self._learned, ranker=spoiled)

        def on_step(step: str) -> None:
            if poison is not None and poison.of_files is not None and step == poison.at:
                poison.of_files(self._files(step), rng)

        def announce(announcement: ModelAnnouncement) -> None:
            if poison is not None and poison.of_files is not None and not poison.at:
                assert announcement.canary is not None
                poison.of_files(self._published(announcement.canary), rng)
            self._tell(announcement)

        # 1. A round: learning, export, parity, kinship, contest, gate, publishing, and the word to replicas.
        try:
            record = self._round(examples, learn=learn, on_step=on_step, announce=announce)
        except BundleError as error:
            return f"round: {error}"
        if record.outcome == "rejected":
            return f"round: {record.reason}"
        # 2. A replica loads what was announced: sums, sessions, vectors, warm-up.
        wait_until(
            lambda: self._slot.status().canary == record.version or record.version in self._slot.status().refused,
            f"{record.version} is loaded or refused",
        )
        # 3. Half of the readers get it, and the watchdog looks on.
        judgement = self._watch(Readers(seed + 1))
        judgement = if_sound(self.registry, record.version, judgement, self.settings.path("cache"))
        self._tell(self.registry.rollback())
        wait_until(lambda: self._slot.status().canary is None, f"{record.version} serves nobody")
        return "" if judgement.action == "promote" else f"watchdog: {judgement.reason}"

    def serving(self) -> set[ModelVersion]:
        """Returns the versions that any of the readers would get now."""
        found = set()
        for number in range(200):
            with self._slot.lease(UserId(f"reader-{number}")) as model:
                found.add(model.version)
        return found

    def close(self) -> None:
        """Ends the replica."""
        self._slot.stop()

    def _round(
        self,
        examples: Sequence[Example],
        *,
        learn: Callable[[Job], FineTuned],
        on_step: Callable[[str], None] = lambda step: None,
        announce: Callable[[ModelAnnouncement], None] = lambda announcement: None,
    ) -> RoundRecord:
        return run_round(
            RoundParts(
                settings=self.settings,
                registry=self.registry,
                rounds=open_round_log(self.settings),
                log=FixedLog(examples),
                open_scorer=open_scorer(self.settings),
                announce=announce,
                learn=learn,
                on_step=on_step,
            )
        )

    def _files(self, step: str) -> Path:
        """Returns where the challenger's files are when a step begins: the round's folder, or the registry."""
        [bundle] = self.settings.path("rounds").glob("*/bundle")
        return bundle if step != "promote" else self._published(ModelVersion(bundle.parent.name))

    def _published(self, version: ModelVersion) -> Path:
        return Path(self.registry.url) / "bundles" / version

    def _tell(self, announcement: ModelAnnouncement) -> None:
        self._slot.apply_announcement("pointer", encode(announcement), 0)

    def _watch(self, readers: Readers) -> Judgement:
        watched, pointer = Watch(self.settings.gate), self.registry.pointer()
        assert pointer is not None
        watched.follow(pointer)
        while True:
            told = msgspec.json.encode(self._slot.status())  # what goes over HTTP
            watched.evidence.add_statuses([msgspec.json.decode(told, type=ReplicaStatus)])
            found = watched.judge(pointer.updated_at)
            assert found is not None
            if found[1].action != "wait":
                return found[1]
            for _ in range(20):
                self._serve(readers, watched)

    def _serve(self, readers: Readers, watched: Watch) -> None:
        """A reader gets a slate of their version's making, and clicks."""
        visit, deadline = readers.visit(LIVE), time.monotonic() + 60
        item_ids = [ItemId(f"book-{row}") for row in visit.rows_N]
        with self._slot.lease(visit.user_id) as model:
            _, items = model.encodings.gather(self._catalogue.rows(item_ids))
            try:
                user = model.encode_user(f"likes number {len(visit.user_id)}", deadline)
                clicks_N, ratings_N = model.score(user, items, visit.features_NF, np.zeros(LIVE, np.float32), deadline)
                scores_N = clicks_N + self.settings.slate.rating_weight * ratings_N
            except ScoringError:
                model.tally.note_no_answer()
                scores_N = np.zeros(LIVE, np.float32)
        order = np.argsort(-scores_N)[:SHOWN].tolist()
        request_id = RequestId(uuid4().hex)
        watched.evidence.add_impression(
            Impression(
                event_id=EventId(request_id),
                request_id=request_id,
                user_id=visit.user_id,
                occurred_at=0,
                model_version=model.version,
                feature_names_hash="",
                user_text="",
                shown=[
                    Ranked(item_id=item_ids[index], text="", features="", score=0.0, source="user") for index in order
                ],
            )
        )
        for index in order:
            if readers.rng.random() < visit.chances_N[index]:
                watched.evidence.add_click(
                    Click(
                        event_id=EventId(uuid4().hex),
                        user_id=visit.user_id,
                        occurred_at=0,
                        item_id=item_ids[index],
                        request_id=request_id,
                    )
                )

    def _warm_up(self, asked: Asked, model: LoadedModel) -> RankedAnswer:
        asked = msgspec.structs.replace(asked, budget_s=60.0)
        return recommend(asked, self._catalogue, model, self.settings.ranker, self.settings.slate)

    def _publish_first(self, folder: Path) -> None:
        """Publishes and promotes a ranker that knows nothing."""
        torch.manual_seed(0)
        tokenizer = _tokenizer()
        shape = BertShape(
            vocab_size=tokenizer.get_vocab_size(),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=64,
        )
        ranker = SplitRanker(
            Bert(shape), split_layer=1, item_states=2, feature_names=FEATURE_NAMES, prior={}, head_width=8
        )
        version = ModelVersion("v0")
        sizes = {"max_user_tokens": 16, "max_item_tokens": 8}
        export_bundle(ranker, tokenizer, folder, version=version, precisions=("int8",), **sizes)
        self.registry.publish(folder, version=version)
        self.registry.promote(version)


def _tokenizer() -> Tokenizer:
    """Returns a tokenizer of whole words, those of parity's texts and of this module's."""
    users, items = made_up_texts()
    texts = " ".join([*users, *items, "text of book likes number", *map(str, range(CATALOGUE))])
    words = sorted({word for word, _ in BertPreTokenizer().pre_tokenize_str(texts.lower())})
    vocab = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = Lowercase()  # type: ignore[assignment]  # its stub takes a Normalizer alone
    tokenizer.pre_tokenizer = BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = BertProcessing(("[SEP]", vocab["[SEP]"]), ("[CLS]", vocab["[CLS]"]))  # type: ignore[assignment]
    return tokenizer
