"""The API in this process, on a real Kafka: every kind of bad request with its answer, and every rung of the ladder."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import msgspec
import pytest
from kafka import TopicPartition

from services.bodies import RankedAnswer, RecommendedItem
from services.event_log import EventLog
from services.gateway import GatewayParts, build_api
from services.metrics import GatewayMetrics
from services.profiles import ProfileReader
from stream.broker import LocalKafka
from tailrace.catalogue import Catalogue
from tailrace.counters import CounterTable, item_stats
from tailrace.errors import NotReady, Overloaded, StoreError, TailraceError, TooLate
from tailrace.events import Click, Impression, decode_event, encode
from tailrace.fold import fold_event
from tailrace.ids import ItemId, ModelVersion, UserId
from tailrace.items import Item
from tailrace.kafka_clients import create_topics, open_consumer, partition_of
from tailrace.profile import Profile, encode_profile
from tailrace.registry import Registry
from tailrace.settings import Settings, load_settings
from tailrace.stores.memory import MemoryStore
from tailrace.stores.store import Batch, Store
from tailrace.topics import USER_STREAMS, tailrace_topics
from tests.fakes import FixedRanker

NOW_MS = 1_790_000_000_000
FIXED = RankedAnswer(
    model_version=ModelVersion("fixed"),
    degraded="none",
    items=[RecommendedItem(item_id=ItemId("i1"), title="One", position=0, score=1.0, source="user", explored=False)],
    impression=encode(
        Impression(
            event_id="fixed",
            request_id="fixed",
            user_id="u",
            occurred_at=NOW_MS,
            model_version="fixed",
            feature_names_hash="",
            user_text="",
            shown=[],
        )
    ),
    timings={"score": 1.0},
)


class Service:
    """An API over chosen parts, and a client for it."""

    def __init__(self, settings: Settings, folder: Path, event_log: EventLog) -> None:
        self.settings = settings
        self.ranker = FixedRanker(msgspec.msgpack.encode(FIXED))
        self.store: Store = MemoryStore()
        self.catalogue = Catalogue()
        for number in range(20):
            item = Item(item_id=f"i{number}", title=f"Item {number}", tags=["odd" if number % 2 else "even"])
            self.catalogue.apply_item(item.item_id, encode(item), NOW_MS - 1000 * number)
        self.metrics = GatewayMetrics("test")
        self.event_log = event_log
        self.api = build_api(
            GatewayParts(
                settings=settings,
                ranker=self.ranker,
                profiles=ProfileReader(lambda: self.store, settings.kafka.user_partitions),
                event_log=event_log,
                catalogue=self.catalogue,
                tables=[],
                registry=Registry(str(folder / "registry")),
                metrics=self.metrics,
                new_id=lambda: uuid4().hex,
                now_ms=lambda: NOW_MS,
            )
        )

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.call_all([(method, path, options)])[0]

    def call_all(self, calls: list[tuple[str, str, dict[str, Any]]]) -> list[httpx.Response]:
        async def run() -> list[httpx.Response]:
            transport = httpx.ASGITransport(self.api, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await asyncio.gather(
                    *(client.request(method, path, **options) for method, path, options in calls)
                )

        return asyncio.run(run())

    def save_profile(self, profile: Profile) -> None:
        partition = partition_of(profile.user_id, self.settings.kafka.user_partitions)
        self.store.save(
            partition, self.store.claim(partition), Batch(profiles={profile.user_id: encode_profile(profile)})
        )

    def records_of(self, stream: str, key: str) -> list[bytes | None]:
        topic = tailrace_topics(self.settings.kafka)[stream]
        consumer = open_consumer(self.settings.kafka)
        place = TopicPartition(topic.name, partition_of(key, topic.partitions))
        consumer.assign([place])
        consumer.seek_to_beginning(place)
        end = consumer.end_offsets([place])[place]
        found = []
        while consumer.position(place) < end:
            for records in consumer.poll(timeout_ms=200).values():
                found += [record.value for record in records if record.key == key.encode()]
        consumer.close()
        return found


@pytest.fixture(scope="module")
def on_kafka(kafka: LocalKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    settings = load_settings(
        None,
        {},
        kafka={
            "bootstrap_servers": kafka.bootstrap_servers,
            "topic_prefix": f"gateway-{uuid4().hex[:8]}-",
            "user_partitions": 2,
        },
        gateway={"max_events_per_call": 10, "max_body_bytes": 20_000},
    )
    create_topics(settings.kafka)
    event_log = EventLog(settings.kafka, delivery_timeout_s=5.0).start()
    yield Service(settings, tmp_path_factory.mktemp("gateway"), event_log)
    event_log.close()


@pytest.fixture
def offline(tmp_path: Path) -> Iterator[Service]:
    """A service whose broker is not there; most of what it answers does not need one."""
    settings = load_settings(
        None,
        {},
        kafka={"bootstrap_servers": "127.0.0.1:1", "user_partitions": 2},
        gateway={
            "ack_timeout_s": 0.2,
            "max_body_bytes": 20_000,
            "max_events_per_call": 10,
            "max_ongoing_requests": 1,
            "max_queued_requests": 1,
        },
        ranker={"deadline_s": 2.0},
    )
    event_log = EventLog(settings.kafka, delivery_timeout_s=0.2)
    yield Service(settings, tmp_path, event_log)


def problem(response: httpx.Response, status: int, slug: str) -> dict[str, Any]:
    """Returns the problem, which must be one by RFC 9457."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["type"] == f"urn:tailrace:problem:{slug}" and body["status"] == status
    assert body["title"] and body["detail"] and body["instance"]
    return body


BAD_REQUESTS = [
    (b"{", 400, "not-json", None),
    (b"[]", 422, "invalid", "$"),
    (b"{}", 422, "invalid", "$.user_id"),
    (b'{"user_id":""}', 422, "invalid", "$.user_id"),
    (b'{"user_id":7}', 422, "invalid", "$.user_id"),
    (b'{"user_id":"u","n":0}', 422, "invalid", "$.n"),
    (b'{"user_id":"u","n":101}', 422, "invalid", "$.n"),
    (b'{"user_id":"u","n":"ten"}', 422, "invalid", "$.n"),
    (b'{"user_id":"u","limit":10}', 422, "invalid", "$.limit"),
    (b'{"user_id":"u","context":{"colour":"red"}}', 422, "invalid", "$.context.colour"),
    (b'{"user_id":"u","filters":{"tags":["a"]}}', 422, "invalid", "$.filters.tags"),
    (b'{"user_id":"u","filters":{"tags_any":[3]}}', 422, "invalid", "$.filters.tags_any[0]"),
    (b'{"user_id":"u","candidates":[]}', 422, "invalid", "$.candidates"),
    (b'{"user_id":"u","exclude":["a",""]}', 422, "invalid", "$.exclude[1]"),
    (b'{"user_id":"u","query":"' + b"x" * 1001 + b'"}', 422, "invalid", "$.query"),
    (b'{"user_id":"' + b"\xff" + b'"}', 400, "not-json", None),
    (b'{"user_id":"u","n":1e999}', 422, "invalid", "$.n"),
    (b'{"user_id":"u","filters":{"tags_all":[' + b'"a",' * 64 + b'"a"]}}', 422, "invalid", "$.filters.tags_all"),
    (b" " * 20_001, 413, "too-large", None),
]


@pytest.mark.parametrize(("body", "status", "slug", "field"), BAD_REQUESTS)
def test_bad_request_is_a_problem_naming_the_field(
    offline: Service, body: bytes, status: int, slug: str, field: str | None
) -> None:
    found = problem(offline.call("POST", "/v1/recommendations", content=body), status, slug)
    assert found["instance"] == "/v1/recommendations"
    assert field is None or found["errors"][0]["field"] == field


def test_unknown_field_is_named(offline: Service) -> None:
    body = problem(offline.call("POST", "/v1/recommendations", json={"user_id": "u", "limit": 3}), 422, "invalid")
    assert "limit" in body["errors"][0]["reason"]


def test_unknown_path_method_item_user_and_query_are_problems(offline: Service) -> None:
    problem(offline.call("GET", "/v2/anything"), 404, "not-found")
    not_allowed = offline.call("GET", "/v1/recommendations")
    problem(not_allowed, 405, "method-not-allowed")
    assert "POST" in not_allowed.headers["allow"]
    problem(offline.call("GET", "/v1/items/nowhere"), 404, "unknown-item")
    problem(offline.call("GET", "/v1/items/nowhere/similar"), 404, "unknown-item")
    problem(offline.call("GET", "/v1/users/nobody/profile"), 404, "unknown-user")
    too_long = problem(offline.call("GET", f"/v1/users/{'x' * 257}/profile"), 422, "invalid")
    assert too_long["errors"][0]["field"] == "path.user_id"
    found = problem(offline.call("GET", "/v1/items/i1/similar", params={"n": 0}), 422, "invalid")
    assert found["errors"][0]["field"] == "query.n"


def test_chunked_body_over_the_limit_is_refused(offline: Service) -> None:
    async def chunks() -> Any:
        for _ in range(30):
            yield b" " * 1000

    problem(offline.call("POST", "/v1/recommendations", content=chunks()), 413, "too-large")


# The ladder.


def ask(service: Service, **fields: Any) -> dict[str, Any]:
    response = service.call("POST", "/v1/recommendations", json={"user_id": "u", **fields})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_answer_of_a_ranker_names_model_and_freshness(offline: Service) -> None:
    profile = Profile(UserId("u"))
    for number in range(3):
        event = Click(event_id=f"e{number}", user_id="u", item_id="i1", occurred_at=NOW_MS - 1500 - number)
        fold_event(event, profile, CounterTable(), None)
    offline.save_profile(profile)
    answer = ask(offline, explain=True)
    assert answer["model_version"] == "fixed" and answer["degraded"] == "none"
    assert (answer["profile_events"], answer["profile_age_ms"]) == (3, 1500)
    assert answer["items"][0]["item_id"] == "i1" and answer["timings"] == {"score": 1.0}
    assert "timings" not in ask(offline)


@pytest.mark.parametrize("failure", [TooLate("late"), Overloaded("full"), NotReady("gone")])
def test_without_a_ranker_the_answer_is_popular(offline: Service, failure: TailraceError) -> None:
    offline.ranker.failure = failure
    counters = CounterTable()
    for number in range(5):
        click = Click(event_id=f"e{number}", user_id=f"x{number}", item_id="i7", occurred_at=NOW_MS - 5000)
        fold_event(click, Profile(UserId(f"x{number}")), counters, None)
    stats = item_stats(ItemId("i7"), 0, counters.items[ItemId("i7")])
    offline.catalogue.apply_stats("0:i7", encode(stats), NOW_MS)
    answer = ask(offline, n=5)
    assert answer["degraded"] == answer["model_version"] == "popular"
    assert answer["items"][0]["item_id"] == "i7" and len(answer["items"]) == 5


def test_filters_exclusions_and_seen_hold_on_the_lowest_rung(offline: Service) -> None:
    offline.ranker.failure = NotReady("gone")
    profile = Profile(UserId("u"))
    click = Click(event_id="e", user_id="u", item_id="i3", occurred_at=NOW_MS)
    fold_event(click, profile, CounterTable(), offline.catalogue.item(ItemId("i3")))
    offline.save_profile(profile)
    answer = ask(offline, n=20, filters={"tags_any": ["odd"]}, exclude=["i1", "i5"])
    assert {item["item_id"] for item in answer["items"]} == {"i7", "i9", "i11", "i13", "i15", "i17", "i19"}


def test_failing_store_leaves_an_answer_as_for_a_new_user(offline: Service) -> None:
    class FailingStore(MemoryStore):
        def load_profiles(self, partition: int, user_ids: Any) -> dict[UserId, bytes]:
            raise StoreError("the store is gone")

    offline.store = FailingStore()
    answer = ask(offline)
    assert offline.ranker.last_asked().profile_missing  # the ranker names the rung, in its impression too
    assert answer["profile_age_ms"] is None and answer["items"]
    problem(offline.call("GET", "/v1/users/u/profile"), 503, "store-unavailable")


def test_ranker_that_keeps_failing_is_left_alone_for_a_moment(offline: Service) -> None:
    offline.ranker.failure = TooLate("late")
    for _ in range(12):
        assert ask(offline)["degraded"] == "popular"
    assert offline.ranker.asked == 5


def test_more_than_the_queue_holds_is_429_with_retry_after(offline: Service) -> None:
    class SlowRanker(FixedRanker):
        async def rank(self, asked: bytes, timeout_s: float) -> bytes:
            await asyncio.sleep(0.05)
            return self.answer

    offline.ranker.rank = SlowRanker(offline.ranker.answer).rank  # type: ignore[method-assign]
    call = ("POST", "/v1/recommendations", {"json": {"user_id": "u"}})
    health = ("GET", "/healthz", {})
    *answers, healthy = offline.call_all([call] * 6 + [health])
    assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429, 429, 429]
    refused = next(answer for answer in answers if answer.status_code == 429)
    problem(refused, 429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert healthy.status_code == 200


def test_similar_falls_back_to_shared_tags(offline: Service) -> None:
    assert offline.call("GET", "/v1/items/i1/similar").json()["items"][0]["item_id"] == "near"
    offline.ranker.failure = NotReady("gone")
    page = offline.call("GET", "/v1/items/i1/similar", params={"n": 3}).json()
    assert page["degraded"] == "no_text" and all(int(item["item_id"][1:]) % 2 for item in page["items"])


def test_impressions_without_a_broker_never_hold_up_the_answer_and_are_counted(tmp_path: Path) -> None:
    settings = load_settings(None, {}, kafka={"bootstrap_servers": "127.0.0.1:1"})
    event_log = EventLog(settings.kafka, delivery_timeout_s=0.2, max_pending_bytes=1000).start()
    service = Service(settings, tmp_path, event_log)
    for _ in range(5):
        assert ask(service)["degraded"] == "none"
    text = service.call("GET", "/metrics").text
    assert 'tailrace_impressions_total{outcome="produced",replica="test"} 0.0' in text
    assert 'tailrace_impressions_total{outcome="dropped",replica="test"} 3.0' in text
    event_log.close()
    text = service.call("GET", "/metrics").text
    assert 'tailrace_impressions_total{outcome="dropped",replica="test"} 5.0' in text


def test_readiness_names_what_is_missing(offline: Service) -> None:
    offline.ranker.serving = None
    found = problem(offline.call("GET", "/readyz"), 503, "not-ready")
    assert [row["field"] for row in found["errors"]] == ["model", "broker"]
    assert offline.call("GET", "/healthz").json() == {"status": "up"}


# Events, on a real broker.


def click(**fields: Any) -> dict[str, Any]:
    return {"type": "click", "user_id": "u", "item_id": "i1", **fields}


BAD_EVENTS = [
    (7, "$"),
    ({}, "$.type"),
    ({"type": "impression"}, "$.type"),
    ({"type": "click", "item_id": "i1"}, "$.user_id"),
    (click(user_id=""), "$.user_id"),
    (click(item_id=None), "$.item_id"),
    (click(action="dance"), "$.action"),
    (click(dwell_s=-1), "$.dwell_s"),
    (click(occurred_at="yesterday"), "$.occurred_at"),
    (click(occurred_at="2026-01-01T00:00:00"), "$.occurred_at"),
    (click(occurred_at=NOW_MS + 3_600_000), "$.occurred_at"),
    (click(position=-1), "$.position"),
    (click(event_id=""), "$.event_id"),
    ({"type": "rating", "user_id": "u", "item_id": "i1", "value": 9}, "$.value"),
    ({"type": "context", "user_id": "u", "ttl_s": 0}, "$.ttl_s"),
]


@pytest.mark.parametrize(("bad", "field"), BAD_EVENTS)
def test_bad_event_costs_one_record_and_its_field_is_named(on_kafka: Service, bad: Any, field: str) -> None:
    user = f"user-{uuid4().hex}"
    response = on_kafka.call("POST", "/v1/events", json=[click(user_id=user), bad, click(user_id=user)])
    answer = response.json()
    assert response.status_code == 207 and (answer["accepted"], answer["rejected"]) == (2, 1)
    assert [verdict["status"] for verdict in answer["verdicts"]] == ["accepted", "rejected", "accepted"]
    assert answer["verdicts"][1]["error"]["field"] == field and answer["verdicts"][1]["error"]["reason"]
    assert len(on_kafka.records_of("clicks", user)) == 2


def test_accepted_events_are_on_the_broker_as_they_were_sent(on_kafka: Service) -> None:
    user = f"user-{uuid4().hex}"
    posted = [
        click(user_id=user, event_id="e1", occurred_at="2026-01-01T10:00:00+01:00", action="like", request_id="r"),
        {"type": "rating", "user_id": user, "item_id": "i2", "value": 4.5, "review": "fine"},
        {"type": "context", "user_id": user, "device": "phone", "attributes": {"weather": "rain"}},
    ]
    response = on_kafka.call("POST", "/v1/events", json=posted)
    assert response.status_code == 200
    verdicts = response.json()["verdicts"]
    assert verdicts[0]["event_id"] == "e1" and len({verdict["event_id"] for verdict in verdicts}) == 3
    for stream, verdict in zip(("clicks", "ratings", "contexts"), verdicts, strict=True):
        (value,) = on_kafka.records_of(stream, user)
        assert value is not None
        event = decode_event(stream, value)
        assert event.event_id == verdict["event_id"] and event.user_id == user
    (value,) = on_kafka.records_of("ratings", user)
    assert value is not None and decode_event("ratings", value).at_ms == NOW_MS


def test_single_event_object_is_taken(on_kafka: Service) -> None:
    assert on_kafka.call("POST", "/v1/events", json=click()).json()["accepted"] == 1


def test_no_usable_event_is_422_and_none_at_all_is_fine(on_kafka: Service) -> None:
    assert on_kafka.call("POST", "/v1/events", json=[{}]).status_code == 422
    assert on_kafka.call("POST", "/v1/events", json=[]).json() == {
        "accepted": 0,
        "rejected": 0,
        "retry": 0,
        "verdicts": [],
    }


def test_bodies_of_events_that_cannot_be_used_are_problems(on_kafka: Service) -> None:
    problem(on_kafka.call("POST", "/v1/events", content=b"[{"), 400, "not-json")
    problem(on_kafka.call("POST", "/v1/events", json="click"), 422, "invalid")
    problem(on_kafka.call("POST", "/v1/events", content=b"[" * 10_000), 422, "invalid")
    problem(on_kafka.call("POST", "/v1/events", json=[click()] * 11), 413, "too-many-events")
    problem(on_kafka.call("POST", "/v1/events", content=b" " * 20_001), 413, "too-large")


def test_events_without_a_broker_are_to_be_sent_again(offline: Service) -> None:
    response = offline.call("POST", "/v1/events", json=[click(event_id="mine"), {}])
    assert response.status_code == 503 and response.headers["retry-after"] == "1"
    first, second = response.json()["verdicts"]
    assert (first["status"], first["event_id"], second["status"]) == ("retry", "mine", "rejected")
    problem(offline.call("DELETE", "/v1/users/u/profile"), 503, "broker-unavailable")


def test_deletion_is_an_empty_record_under_the_users_key_in_each_stream(on_kafka: Service) -> None:
    user = f"user-{uuid4().hex}"
    assert on_kafka.call("DELETE", f"/v1/users/{user}/profile").status_code == 202
    assert [on_kafka.records_of(stream, user) for stream in USER_STREAMS] == [[None]] * 4
    problem(on_kafka.call("DELETE", f"/v1/users/{'x' * 257}/profile"), 422, "invalid")


def test_profile_page_shows_what_is_known(on_kafka: Service) -> None:
    user = UserId(f"user-{uuid4().hex}")
    profile = Profile(user)
    liked = Click(event_id="e", user_id=user, item_id="i1", occurred_at=NOW_MS - 10, action="like")
    fold_event(liked, profile, CounterTable(), on_kafka.catalogue.item(ItemId("i1")))
    on_kafka.save_profile(profile)
    page = on_kafka.call("GET", f"/v1/users/{user}/profile").json()
    assert page["events"] == 1 and page["counts"] == {"like": 1}
    assert page["recent"] == [{"at_ms": NOW_MS - 10, "item_id": "i1", "action": "like", "value": 0.0}]
    assert page["interests"][0]["key"] == "tag:odd"


def test_impression_reaches_the_broker_and_a_dry_run_leaves_none(on_kafka: Service) -> None:
    user = f"user-{uuid4().hex}"
    on_kafka.call("POST", "/v1/recommendations", json={"user_id": user, "dry_run": True})
    on_kafka.call("POST", "/v1/recommendations", json={"user_id": user})
    deadline = time.monotonic() + 10
    while not (found := on_kafka.records_of("impressions", user)):
        assert time.monotonic() < deadline, "no impression came"
    assert found == [FIXED.impression]


# What describes and measures.


def test_ready_service_says_so(on_kafka: Service) -> None:
    assert on_kafka.call("GET", "/readyz").json() == {"status": "ready"}


def test_openapi_names_every_body_and_problem(offline: Service) -> None:
    document = offline.call("GET", "/openapi.json").json()
    schemas = document["components"]["schemas"]
    body = document["paths"]["/v1/recommendations"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/RecommendationRequest"}
    assert schemas["RecommendationRequest"]["properties"]["n"]["maximum"] == 100
    assert schemas["RecommendationRequest"]["additionalProperties"] is False
    assert schemas["PostedClick"]["required"] == ["type", "user_id", "item_id"]
    for methods in document["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                assert answer["content"] and (
                    status in ("200", "202", "207") or "application/problem+json" in answer["content"]
                )
    text = msgspec.json.encode(document).decode()
    assert all(f'"{name}":' in text for name in _names_referred_to(text))


def _names_referred_to(text: str) -> set[str]:
    return {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}


def test_metrics_count_by_route_template_and_rung(offline: Service) -> None:
    ask(offline)
    offline.call("GET", "/v1/items/i1")
    offline.call("GET", "/v1/items/i2")
    text = offline.call("GET", "/metrics").text
    assert 'tailrace_recommendations_total{degraded="none",replica="test"} 1.0' in text
    assert 'tailrace_http_requests_total{replica="test",route="/v1/items/{item_id:path}",status="200"} 2.0' in text
    assert 'tailrace_ranker_stage_seconds_count{replica="test",stage="score"} 1.0' in text
    assert 'tailrace_model_info{replica="test",version="fixed"} 1.0' in text


def test_item_page_shows_the_item_and_its_day(offline: Service) -> None:
    page = offline.call("GET", "/v1/items/i1").json()
    assert page["item"]["title"] == "Item 1" and page["last_day"]["clicked"] == 0.0
