"""What a worker does when Kafka, its topics or the disk let it down while it lives."""

import resource
import signal
from collections.abc import Callable
from pathlib import Path

from kafka import TopicPartition

from stream.broker import LocalKafka
from tailrace.kafka_clients import create_topics, open_admin
from tailrace.profile import decode_profile
from tailrace.stores.store import Offset
from tailrace.topics import tailrace_topics
from tests.recovery.launcher import Launcher
from tests.recovery.oracle import assert_state_equals_log, assert_stats_equal_counters
from tests.recovery.scene import Scene, stop_gracefully, wait_until
from tests.recovery.traffic import produce

MakeScene = Callable[..., Scene]


def test_broker_away_at_the_start_and_in_mid_run_is_waited_for(tmp_path: Path, launcher: Launcher) -> None:
    kafka = LocalKafka.start(tmp_path / "kafka")
    here = Scene(tmp_path, kafka.bootstrap_servers, launcher)
    try:
        produce(here.settings, seed=21, count=1000)
        kafka.kill()
        worker, impatient = here.start_worker([0]), here.start_worker([1])
        wait_until(lambda: here.logs().count("BrokerUnavailable") >= 2, "both workers say that the broker is away")
        stop_gracefully(impatient)  # asked to stop while it waits, a worker does
        kafka = LocalKafka.start(tmp_path / "kafka")
        here.wait_for_progress(0)
        kafka.kill()
        kafka = LocalKafka.start(tmp_path / "kafka")
        second = here.start_worker([1])
        produce(here.settings, seed=22, count=1000)
        here.wait_for_the_end()
        stop_gracefully(worker)
        stop_gracefully(second)
        assert_state_equals_log(here.settings, here.store)
        assert_stats_equal_counters(here.settings, here.store)
    finally:
        here.close()
        kafka.stop()


def test_topic_created_anew_is_read_from_its_start_and_said_loudly(scene: MakeScene) -> None:
    here = scene()
    clicks = tailrace_topics(here.settings.kafka)["clicks"].name
    produce(here.settings, seed=23, count=600)
    worker = here.start_worker()
    here.wait_for_the_end()
    before = _places(here)

    # While a worker lives:
    _recreate(here, clicks)
    produce(here.settings, seed=24, count=300)
    here.wait_for_the_end()
    between = _places(here)
    assert all(between[number].topic_id != before[number].topic_id for number in (0, 1))
    assert "created anew" in here.logs()

    # And while none does: more records than before, so that only the topic's id can tell.
    stop_gracefully(worker)
    _recreate(here, clicks)
    produce(here.settings, seed=25, count=900)
    heir = here.start_worker()
    here.wait_for_the_end()
    stop_gracefully(heir)
    after = _places(here)
    assert all(after[number].topic_id != between[number].topic_id for number in (0, 1))
    assert _event_ids(here) >= {"e24-", "e25-"}


def _places(here: Scene) -> dict[int, Offset]:
    return {number: here.store.load_offsets(number)["clicks"] for number in (0, 1)}


def _recreate(here: Scene, topic: str) -> None:
    admin = open_admin(here.settings.kafka)
    admin.delete_topics([topic])
    wait_until(lambda: topic not in admin.list_topics(), "the topic is gone")
    admin.close()
    create_topics(here.settings.kafka)


def _event_ids(here: Scene) -> set[str]:
    """Returns the seeds of the clicks that are in the profiles, as the first characters of their event ids."""
    found: set[str] = set()
    for number in (0, 1):
        for data in here.store.load_profiles(number, here.store.load_users(number)).values():
            found |= {event_id[:4] for event_id in decode_profile(data).clicks.event_ids}
    return found


def test_records_that_retention_took_are_skipped_and_the_rest_is_folded(scene: MakeScene) -> None:
    here = scene()
    topic = tailrace_topics(here.settings.kafka)["clicks"].name
    produce(here.settings, seed=26, count=300)
    worker = here.start_worker()
    here.wait_for_the_end()
    stop_gracefully(worker)
    produce(here.settings, seed=27, count=300)
    admin = open_admin(here.settings.kafka)
    admin.delete_records({TopicPartition(topic, 0): here.ends()[0]["clicks"] - 5})
    admin.close()
    heir = here.start_worker()
    here.wait_for_the_end()
    stop_gracefully(heir)
    assert "retention passed the stored offset" in here.logs()


def test_full_disk_costs_nothing_but_time(scene: MakeScene) -> None:
    here = scene()
    produce(here.settings, seed=28, count=3000)
    worker = here.start_worker(max_file_bytes=150_000)
    wait_until(lambda: "StoreError" in here.logs(), "the store fails")
    # What was saved before is whole, what was not is not there, and the worker goes on trying.
    stuck = [here.offsets(number) for number in (0, 1)]
    assert stuck != list(here.ends().values())
    wait_until(lambda: here.logs().count("StoreError") > 4, "it tries again and again")
    assert not worker.ended.is_set()
    # Space returns.
    resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    here.wait_for_the_end()
    stop_gracefully(worker)
    assert_state_equals_log(here.settings, here.store)
    assert_stats_equal_counters(here.settings, here.store)


def test_worker_killed_with_a_full_disk_leaves_the_state_of_the_log(scene: MakeScene) -> None:
    here = scene()
    produce(here.settings, seed=29, count=3000)
    worker = here.start_worker(max_file_bytes=150_000)
    wait_until(lambda: "StoreError" in here.logs(), "the store fails")
    worker.signal(signal.SIGKILL)
    worker.wait(10)
    heir = here.start_worker()
    here.wait_for_the_end()
    stop_gracefully(heir)
    assert_state_equals_log(here.settings, here.store)
