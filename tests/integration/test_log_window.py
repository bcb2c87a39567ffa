"""A window of a real Kafka's log, planned once and read as often as one likes."""

import time
import uuid
from typing import Any

import msgspec
import numpy as np
import pytest

from stream.broker import LocalKafka
from tailrace.errors import BrokerUnavailable
from tailrace.events import Click, Impression, encode
from tailrace.ids import EventId, ItemId, RequestId, UserId
from tailrace.kafka_clients import create_topics, open_producer, partition_of
from tailrace.settings import KafkaSettings, TrainingSettings
from tailrace.topics import tailrace_topics
from tests.unit.test_examples import impression, rating, same
from training.log_window import AlreadyRead, LogWindow, Window, plan_window, read_examples

PARTITIONS = 3
NOW_MS = time.time_ns() // 1_000_000  # Kafka takes no record from long before or after
USERS = [f"user{number}" for number in range(12)]
SETTINGS = TrainingSettings(window_s=86_400, wait_s=30, attribution_s=600)


class Log:
    """Topics of this test alone."""

    def __init__(self, bootstrap_servers: str) -> None:
        self.kafka = KafkaSettings(
            bootstrap_servers=bootstrap_servers,
            topic_prefix=f"window-{uuid.uuid4().hex[:8]}-",
            user_partitions=PARTITIONS,
        )
        create_topics(self.kafka)
        self._topics = tailrace_topics(self.kafka)
        self._producer = open_producer(self.kafka)
        self._sent: list[Any] = []

    def put(self, stream: str, user: str, value: bytes | None, at_ms: int) -> None:
        sent = self._producer.send(self._topics[stream].name, value, user.encode(), timestamp_ms=at_ms)
        self._sent.append(sent)

    def show(self, user: str, ago_s: float, *, logged_ago_s: float | None = None) -> RequestId:
        """Logs an impression of three items and returns its request."""
        request = RequestId(uuid.uuid4().hex)
        shown = impression(request, shown="012", unshown="3", user=user, occurred_at=_at(ago_s))
        self.put("impressions", user, encode(shown), _at(ago_s if logged_ago_s is None else logged_ago_s))
        return request

    def click(self, user: str, item: str, ago_s: float, request: RequestId | None = None) -> None:
        made = Click(
            event_id=EventId(uuid.uuid4().hex),
            user_id=UserId(user),
            item_id=ItemId(item),
            occurred_at=_at(ago_s),
            request_id=request,
        )
        self.put("clicks", user, encode(made), _at(ago_s))

    def rate(self, user: str, stars: float, ago_s: float, request: RequestId) -> None:
        made = rating(stars, request=request, user=user, event=uuid.uuid4().hex)
        made = msgspec.structs.replace(made, occurred_at=_at(ago_s))
        self.put("ratings", user, encode(made), _at(ago_s))

    def erase(self, user: str, ago_s: float) -> None:
        for stream in ("clicks", "ratings", "contexts", "impressions"):
            self.put(stream, user, None, _at(ago_s))

    def flush(self) -> None:
        while self._sent:
            self._sent.pop().get(timeout=30)

    def plan(self, fresh_since_s: float | None = None) -> LogWindow:
        self.flush()
        already = None
        if fresh_since_s is not None:
            already = AlreadyRead(learned_until_ms=_at(fresh_since_s), cutoff_ms=_at(fresh_since_s))
        return plan_window(self.kafka, SETTINGS, now_ms=NOW_MS, already=already)

    def read(self, window: LogWindow, settings: TrainingSettings = SETTINGS, **options: Any) -> Window:
        return read_examples(self.kafka, window, settings, seed=1, **options)

    def close(self) -> None:
        self._producer.close()


def _at(ago_s: float) -> int:
    return NOW_MS - round(ago_s * 1000)


@pytest.fixture
def log(kafka: LocalKafka) -> Any:
    made = Log(kafka.bootstrap_servers)
    yield made
    made.close()


def by_request(window: Window) -> dict[str, list[float]]:
    return {one.request_id: one.gains_N.tolist() for one in (*window.fresh, *window.replay)}


def test_window_joins_what_three_topics_of_every_partition_say(log: Log) -> None:
    expected: dict[str, list[float]] = {}
    for number, user in enumerate(USERS):
        clicked, rated, guessed = (log.show(user, 5000 - 1000 * turn - number) for turn in range(3))
        log.click(user, "i1", 4990 - number, clicked)
        log.rate(user, 5, 3900 - number, rated)
        log.click(user, "i2", 2900 - number)
        expected |= {clicked: [0, 1, 0, 0], rated: [2, 0, 0, 0], guessed: [0, 0, 1, 0]}
    read = log.read(log.plan())
    assert by_request(read) == expected
    assert len({partition_of(user, PARTITIONS) for user in USERS}) == PARTITIONS
    assert [one.at_ms for one in read.fresh] == sorted(one.at_ms for one in read.fresh)
    assert (read.counts.impressions, read.counts.by_request, read.counts.by_item) == (36, 24, 12)


def test_what_is_logged_after_planning_is_not_seen_and_reading_twice_is_the_same(log: Log) -> None:
    requests = [log.show(user, 100 + number) for number, user in enumerate(USERS)]
    log.click(USERS[0], "i0", 90, requests[0])
    window = log.plan()
    first = log.read(window)
    for user, request in zip(USERS, requests, strict=True):
        log.show(user, 80)
        log.click(user, "i1", 70, request)
    log.erase(USERS[1], 60)
    log.flush()
    # The window survives the bundle that it is written into.
    again = log.read(msgspec.json.decode(msgspec.json.encode(window), type=LogWindow), chunk=1)
    assert same(first.fresh, again.fresh)
    assert first.counts == again.counts
    assert len(first.fresh) == len(USERS)
    assert sum(one.clicked_N.sum() for one in first.fresh) == 1
    # The next round sees it all: labels that were late for the last one, and the erasure.
    later = log.read(log.plan())
    assert len(later.fresh) == 2 * len(USERS) - 2
    assert sum(one.clicked_N.sum() for one in later.fresh) == len(USERS)
    assert later.counts.erased == 2


def test_erased_user_leaves_no_example_neither_fresh_nor_replayed(log: Log) -> None:
    for user in USERS[:4]:
        log.show(user, 5000)
        log.click(user, "i0", 4990)
        log.show(user, 200)
    log.erase(USERS[0], 100)
    after = log.show(USERS[0], 50)
    read = log.read(log.plan(fresh_since_s=1000))
    assert {one.user_id for one in read.replay} == set(USERS[1:4])
    assert [one.request_id for one in read.fresh if one.user_id == USERS[0]] == [after]
    assert (read.counts.erased, read.counts.forgotten) == (2, 1)


def test_window_begins_and_freshness_is_reckoned_by_the_time_of_the_records(log: Log) -> None:
    user = USERS[0]
    log.show(user, 2 * 86_400)
    old = log.show(user, 5000)
    waited = log.show(user, 1020)  # less than `wait_s` before the last cut-off, so no example then
    imported = log.show(user, 9 * 365 * 86_400, logged_ago_s=500)
    waiting = log.show(user, 20)
    window = log.plan(fresh_since_s=1000)
    read = log.read(window)
    assert [one.request_id for one in read.replay] == [old]
    assert [one.request_id for one in read.fresh] == [imported, waited]
    assert waiting not in by_request(read)
    assert read.counts.waiting == 1
    partition = partition_of(user, PARTITIONS)
    assert window.offsets[f"impressions:{partition}"] == (1, 5)


def test_undecodable_records_are_counted_and_the_rest_is_read(log: Log) -> None:
    user = USERS[0]
    request = log.show(user, 100)
    for stream in ("clicks", "ratings", "impressions"):
        log.put(stream, user, b"{ not json", _at(99))
    log.put("clicks", "another", encode(Click(**_click(user))), _at(98))
    log.click(user, "i0", 97, request)
    read = log.read(log.plan())
    assert by_request(read) == {request: [1, 0, 0, 0]}
    assert read.counts.undecodable == 4


def _click(user: str) -> dict[str, Any]:
    return {"event_id": EventId("e"), "user_id": UserId(user), "item_id": ItemId("i0"), "occurred_at": _at(98)}


def test_newest_fresh_examples_and_a_sample_of_the_rest_are_kept(log: Log) -> None:
    requests = [log.show(USERS[number % 12], 5000 - number) for number in range(60)]
    few = msgspec.structs.replace(SETTINGS, max_examples=10, replay_examples=20)
    window = log.plan()
    read = log.read(window, few)
    assert [one.request_id for one in read.fresh] == requests[-10:]
    assert len(read.replay) == 20
    assert not {one.request_id for one in read.replay} & set(requests[-10:])
    assert read.counts.examples == 60
    assert same(read.replay, log.read(window, few, chunk=3).replay)


def test_progress_ends_at_the_windows_records(log: Log) -> None:
    for user in USERS:
        log.click(user, "i0", 50, log.show(user, 100))
    heard: list[tuple[str, int, int]] = []
    window = log.plan()
    log.read(window, chunk=2, progress=lambda *said: heard.append(said))
    assert [done for _, done, _ in heard] == sorted(done for _, done, _ in heard)
    assert heard[-1][1:] == (24, 24)
    assert window.num_records == 24


def test_empty_log_gives_nothing(log: Log) -> None:
    read = log.read(log.plan())
    assert (read.fresh, read.replay, read.counts.impressions) == ([], [], 0)


def test_broker_that_does_not_answer_is_said_so() -> None:
    away = KafkaSettings(bootstrap_servers="127.0.0.1:1")
    begin = time.monotonic()
    with pytest.raises(BrokerUnavailable):
        plan_window(away, SETTINGS, now_ms=NOW_MS, already=None)
    assert time.monotonic() - begin < 30


def test_impression_sent_twice_is_one_example(log: Log) -> None:
    shown = impression("twice", user=USERS[0], occurred_at=_at(100))
    assert isinstance(shown, Impression)
    for ago_s in (99, 98):
        log.put("impressions", USERS[0], encode(shown), _at(ago_s))
    log.click(USERS[0], "i1", 90, RequestId("twice"))
    read = log.read(log.plan(), chunk=1)
    assert len(read.fresh) == 1
    assert np.array_equal(read.fresh[0].clicked_N, [False, True, False])
    assert (read.counts.impressions, read.counts.resent) == (1, 1)
