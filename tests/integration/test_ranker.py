"""A ranker replica without Ray: a real bundle, a real broker, and what hot swap promises."""

import asyncio
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import msgspec
import numpy as np
import pytest

from services.bodies import Asked, ModelStatus, RankedAnswer, RecommendationRequest
from services.encodings import ItemEncodings
from services.loaded_model import LoadedModel, ScoreJob
from services.ranker import Ranker
from services.scorer import EncodedUsers
from stream.broker import LocalKafka
from tailrace.catalogue import Catalogue
from tailrace.errors import ScoringError
from tailrace.events import Impression, encode
from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
from tailrace.ids import ModelVersion, RequestId, UserId
from tailrace.items import Item
from tailrace.kafka_clients import create_topics, open_producer
from tailrace.pointer import assigned_version
from tailrace.registry import Registry, announce, open_registry
from tailrace.settings import Settings, load_settings
from tailrace.topics import tailrace_topics
from tests.fakes import WordVectors
from training.export import build_version_zero

NOW_MS = 1_790_000_000_000


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version 0 on the features that serving makes."""
    folder = tmp_path_factory.mktemp("ranker") / "bundle"
    build_version_zero(
        folder, version=ModelVersion("v0"), feature_names=FEATURE_NAMES, prior=PRIOR_WEIGHTS, precisions=("int8",)
    )
    return folder


@pytest.fixture
def settings(kafka: LocalKafka, tmp_path: Path) -> Settings:
    prefix = f"ranker-{uuid4().hex[:8]}-"
    found = load_settings(
        None,
        {},
        data_dir=str(tmp_path),
        kafka={"bootstrap_servers": kafka.bootstrap_servers, "topic_prefix": prefix, "user_partitions": 1},
    )
    create_topics(found.kafka)
    return found


@pytest.fixture
def start(settings: Settings) -> Iterator[Callable[[], Ranker]]:
    """Starts rankers, and closes them afterwards."""
    started: list[Ranker] = []

    def one() -> Ranker:
        started.append(Ranker(settings))
        return started[-1]

    yield one
    for ranker in started:
        ranker.close()


def produce_items(settings: Settings, *item_ids: str) -> None:
    producer = open_producer(settings.kafka)
    name = tailrace_topics(settings.kafka)["items"].name
    for item_id in item_ids:
        item = Item(item_id=item_id, title=f"Item {item_id}")
        producer.send(name, encode(item), item_id.encode()).get(timeout=10)
    producer.close()


def ask(ranker: Ranker, **fields: object) -> RankedAnswer:
    request = msgspec.convert({"user_id": "u", **fields}, RecommendationRequest)
    asked = Asked(request_id=RequestId(uuid4().hex), request=request, profile=None, now_ms=NOW_MS, budget_s=10.0)
    answer = asyncio.run(ranker.rank(msgspec.msgpack.encode(asked)))
    return msgspec.msgpack.decode(answer, type=RankedAnswer)


def status(ranker: Ranker) -> ModelStatus:
    return msgspec.msgpack.decode(asyncio.run(ranker.status()), type=ModelStatus)


def wait_until(good: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not good():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def promote(settings: Settings, registry: Registry, bundle: Path, version: str) -> None:
    registry.publish(bundle, version=ModelVersion(version))
    announce(settings.kafka, registry.promote(ModelVersion(version)))


def test_replica_that_starts_later_reads_the_pointer(
    settings: Settings, start: Callable[[], Ranker], bundle: Path
) -> None:
    registry = open_registry(settings)
    registry.publish(bundle, version=ModelVersion("v1"))
    registry.promote(ModelVersion("v1"))  # and nothing announced
    produce_items(settings, "a", "b")
    ranker = start()
    assert ranker.wait(30) and status(ranker).serving == "v1"
    assert {item.item_id for item in ask(ranker).items} == {"a", "b"}


def test_request_in_flight_finishes_on_the_old_model(
    settings: Settings, start: Callable[[], Ranker], bundle: Path
) -> None:
    registry = open_registry(settings)
    promote(settings, registry, bundle, "v1")
    produce_items(settings, "a")
    ranker = start()
    assert ranker.wait(30)
    with ranker.slot.lease() as held:
        promote(settings, registry, bundle, "v2")
        wait_until(lambda: status(ranker).serving == "v2")
        assert ask(ranker).model_version == "v2"
        assert held.version == "v1" and held.encode_user("still here", time.monotonic() + 10).keys.size
    assert status(ranker).swaps == 2


def test_canary_answers_its_users_and_every_version_is_counted(
    settings: Settings, start: Callable[[], Ranker], bundle: Path
) -> None:
    registry = open_registry(settings)
    promote(settings, registry, bundle, "v1")
    produce_items(settings, "a")
    ranker = start()
    assert ranker.wait(30)
    registry.publish(bundle, version=ModelVersion("v2"))
    announce(settings.kafka, registry.start_canary(ModelVersion("v2"), 0.5))
    wait_until(lambda: status(ranker).canary == "v2")
    pointer = registry.pointer()
    assert pointer is not None
    users = [f"user-{number}" for number in range(10)]
    expected = [assigned_version(UserId(user), pointer) for user in users]
    answers = [ask(ranker, user_id=user) for user in users]
    assert [answer.model_version for answer in answers] == expected and set(expected) == {"v1", "v2"}
    for user, answer in zip(users, answers, strict=True):
        impression = msgspec.json.decode(answer.impression, type=Impression)
        assert (impression.user_id, impression.model_version) == (user, answer.model_version)
    counted = status(ranker).versions
    assert {version: stats.requests for version, stats in counted.items()} == Counter(expected)
    for stats in counted.values():
        assert (stats.below_top, stats.errors) == (0, 0)
        assert stats.score_p50_ms is not None and stats.score_p99_ms is not None
        assert 0 < stats.score_p50_ms <= stats.score_p99_ms


def test_bundle_for_other_features_is_refused_and_the_old_model_serves_on(
    settings: Settings, start: Callable[[], Ranker], bundle: Path, tmp_path: Path
) -> None:
    registry = open_registry(settings)
    promote(settings, registry, bundle, "v1")
    produce_items(settings, "a")
    ranker = start()
    assert ranker.wait(30)
    strange = tmp_path / "strange"
    strange.mkdir()
    for file in bundle.rglob("*"):
        if file.is_file():
            target = strange / file.relative_to(bundle)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())
    card = msgspec.json.decode((strange / "model.json").read_bytes())
    card["feature_names"] = ["something_else"]
    (strange / "model.json").write_bytes(msgspec.json.encode(card))
    promote(settings, registry, strange, "v2")
    wait_until(lambda: "v2" in status(ranker).refused)
    assert status(ranker).serving == "v1" and ask(ranker).degraded == "none"
    announce(settings.kafka, registry.rollback())


def test_changed_item_is_encoded_anew_and_removed_item_is_gone(
    settings: Settings, start: Callable[[], Ranker], bundle: Path
) -> None:
    promote(settings, open_registry(settings), bundle, "v1")
    produce_items(settings, "a", "b")
    ranker = start()
    assert ranker.wait(30)
    producer = open_producer(settings.kafka)
    name = tailrace_topics(settings.kafka)["items"].name
    changed = Item(item_id="a", title="A tale of whales and storms")
    producer.send(name, encode(changed), b"a").get(timeout=10)
    producer.send(name, None, b"b").get(timeout=10)
    producer.close()
    wait_until(lambda: [item.title for item in ask(ranker).items] == [changed.title])
    # The catalogue changes at once, what is ranked on as soon as it is encoded.
    wait_until(lambda: msgspec.json.decode(ask(ranker).impression)["shown"][0]["text"] == changed.title)


def test_encodings_kept_on_disk_are_used_again_and_a_damaged_file_is_not(tmp_path: Path) -> None:
    catalogue = Catalogue()
    for number in range(40):
        item = Item(item_id=f"i{number}", title=f"Book number {number}")
        catalogue.apply_item(item.item_id, encode(item), NOW_MS)

    class CountingEncoder(WordVectors):
        encoded = 0

        def encode_items(self, texts):  # type: ignore[no-untyped-def]
            CountingEncoder.encoded += len(texts)
            return super().encode_items(texts)

    def fill() -> ItemEncodings:
        encodings = ItemEncodings(WordVectors.SIZE, tmp_path / "items.npz")
        while encodings.catch_up(CountingEncoder(), catalogue):
            pass
        encodings.save()
        return encodings

    first = fill()
    assert CountingEncoder.encoded == 40
    again = fill()
    assert CountingEncoder.encoded == 40
    np.testing.assert_array_equal(first.vectors, again.vectors)
    (tmp_path / "items.npz").write_bytes(b"PK\x03\x04 not really")
    np.testing.assert_array_equal(fill().vectors, first.vectors)
    assert CountingEncoder.encoded == 80


def test_users_cached_and_stacked_score_as_they_do_alone(bundle: Path, tmp_path: Path) -> None:
    settings = load_settings(None, {}, data_dir=str(tmp_path))
    model = LoadedModel.load(bundle, ModelVersion("v0"), settings)
    catalogue = Catalogue()
    for number in range(6):
        item = Item(item_id=f"i{number}", title=f"Book number {number}")
        catalogue.apply_item(item.item_id, encode(item), NOW_MS)
    while model.catch_up(catalogue):
        pass
    deadline = time.monotonic() + 30
    features = np.zeros((6, len(FEATURE_NAMES)), dtype=np.float32)
    _, items = model.encodings.gather(np.arange(6))
    _, first_four = model.encodings.gather(np.arange(4))
    users = [model.encode_user(text, deadline) for text in ("short", "a much longer text about a user who reads")]
    assert model.encode_user("short", deadline) is users[0]
    worths = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    alone = [model.score(user, items, features, worth, deadline)[0] for user, worth in zip(users, worths, strict=True)]
    assert np.abs(alone[0] - alone[1]).max() > 0.2  # they tell

    jobs = [
        ScoreJob(users[0], first_four, features[:4], worths[0, :4]),
        ScoreJob(users[1], items, features, worths[1]),
    ]
    together = model.score_together(jobs)
    np.testing.assert_allclose(together[0][0], alone[0][:4], atol=0.05)
    np.testing.assert_allclose(together[1][0], alone[1], atol=0.05)
    model.retire()


def test_ranker_serves_where_torch_and_transformers_cannot_be_imported(bundle: Path, tmp_path: Path) -> None:
    program = f"""
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "training", "stream"):
            raise ImportError(name + " is not installed here")
sys.meta_path.insert(0, Blocked())
import services.app, services.ranker
from pathlib import Path
from services.bodies import Asked, RecommendationRequest
from services.loaded_model import LoadedModel, ScoreJob
from services.recommender import recommend
from tailrace.catalogue import Catalogue
from tailrace.events import Impression, encode
from tailrace.items import Item
from tailrace.settings import Settings
settings = Settings(data_dir={str(tmp_path)!r})
catalogue = Catalogue()
catalogue.apply_item("a", encode(Item(item_id="a", title="Whales")), {NOW_MS})
model = LoadedModel.load(Path({str(bundle)!r}), "v0", settings)
while model.catch_up(catalogue): pass
asked = Asked(request_id="r", request=RecommendationRequest(user_id="u"), profile=None, now_ms={NOW_MS}, budget_s=30.0)
answer = recommend(asked, catalogue, model, settings.ranker, settings.slate)
assert answer.degraded == "none" and answer.items[0].item_id == "a", answer
print("served")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "served" in done.stdout, done.stderr


def test_only_the_request_that_the_model_failed_counts_as_an_error(
    settings: Settings, start: Callable[[], Ranker], bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(settings, open_registry(settings), bundle, "v1")
    produce_items(settings, "a")
    ranker = start()
    assert ranker.wait(30)
    wait_until(lambda: [item.item_id for item in ask(ranker).items] == ["a"])
    encode_user, meeting, fails = LoadedModel.encode_user, threading.Barrier(2), iter([True, False])

    def encode_or_fail(model: LoadedModel, text: str, deadline: float) -> EncodedUsers:
        meeting.wait(10)  # both requests are under way
        if next(fails):
            raise ScoringError("broken")
        return encode_user(model, text, deadline)

    def counted() -> tuple[int, int]:
        counts = ranker.slot.status().versions[ModelVersion("v1")]
        return counts.requests, counts.errors

    requests, errors = counted()
    monkeypatch.setattr(LoadedModel, "encode_user", encode_or_fail)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: ask(ranker), range(2)))
    assert sorted(answer.degraded for answer in answers) == ["no_text", "none"]
    assert counted() == (requests + 2, errors + 1)
