"""Kafka clients, made one way: settings in, connected client out. Nothing here connects at import."""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic, OffsetSpec
from kafka.errors import KafkaError, KafkaTimeoutError, TopicAlreadyExistsError
from kafka.partitioner import murmur2

from tailrace.errors import BrokerUnavailable, SettingsError, TopicMismatch
from tailrace.settings import KafkaSettings
from tailrace.topics import USER_STREAMS, tailrace_topics

# A broker that comes back is noticed within a second, and one that is away is reported within five.
_CLIENT_DEFAULTS = {"client_id": "tailrace", "reconnect_backoff_max_ms": 1000, "bootstrap_timeout_ms": 5000}


def partition_of(key: str, partitions: int) -> int:
    """Returns the partition Kafka's default partitioner (murmur2) gives a key, so a reader finds it alone."""
    return int((murmur2(key.encode()) & 0x7FFFFFFF) % partitions)


def open_consumer(kafka: KafkaSettings, **options: Any) -> Any:
    """Returns a KafkaConsumer that commits nothing by itself. One thread owns it. Raises BrokerUnavailable."""
    return _connect(KafkaConsumer, kafka, enable_auto_commit=False, allow_auto_create_topics=False, **options)


def open_producer(kafka: KafkaSettings, **options: Any) -> Any:
    """Returns an idempotent KafkaProducer acknowledged by every in-sync copy. Raises BrokerUnavailable."""
    defaults: dict[str, Any] = {
        "acks": "all",
        "enable_idempotence": True,
        "max_request_size": 4_194_304,
        "allow_auto_create_topics": False,
    }
    return _connect(KafkaProducer, kafka, **(defaults | options))


def close_producer(producer: Any, timeout_s: float) -> None:
    """Closes a KafkaProducer. What is not acknowledged in time fails through its own future, not here."""
    # kafka-python's close flushes first, and raises where the broker is away.
    with suppress(KafkaTimeoutError):
        producer.close(timeout=timeout_s)


def open_admin(kafka: KafkaSettings) -> Any:
    """Returns a KafkaAdminClient. Raises BrokerUnavailable."""
    return _connect(KafkaAdminClient, kafka)


def _connect(client: Any, kafka: KafkaSettings, **options: Any) -> Any:
    if not kafka.bootstrap_servers:
        raise BrokerUnavailable(
            "no Kafka: set `kafka.bootstrap_servers`, or run `tailrace broker` to bring one up on this machine"
        )
    # kafka-python would say the values of those it does not know, too: a password under a misspelled name.
    if unknown := kafka.security.keys() - client.DEFAULT_CONFIG.keys():
        raise SettingsError(f"kafka.security: kafka-python knows no {', '.join(sorted(unknown))}")
    try:
        return client(
            bootstrap_servers=kafka.bootstrap_servers.split(","),
            **(_CLIENT_DEFAULTS | kafka.security | options),
        )
    except (KafkaError, OSError) as error:
        raise BrokerUnavailable(f"Kafka at {kafka.bootstrap_servers} does not answer: {error}") from error


def create_topics(kafka: KafkaSettings) -> dict[str, str]:
    """Creates the topics that do not exist and returns every topic's id by role.

    Raises TopicMismatch when one exists with another partition count: stored offsets rely on it.
    """
    topics = tailrace_topics(kafka)
    admin = open_admin(kafka)
    try:
        existing = set(admin.list_topics())
        for topic in topics.values():
            if topic.name in existing:
                continue
            new = NewTopic(topic.name, topic.partitions, kafka.replication_factor, topic_configs=dict(topic.config))
            try:
                admin.create_topics([new])
            except TopicAlreadyExistsError:
                continue  # another process was first; its partition count is checked below
        names = [topic.name for topic in topics.values()]
        admin.wait_for_topics(names)
        found: Mapping[str, Any] = {row["name"]: row for row in admin.describe_topics(names)}
    except KafkaError as error:
        raise BrokerUnavailable(f"Kafka at {kafka.bootstrap_servers} failed: {error}") from error
    finally:
        admin.close()
    ids: dict[str, str] = {}
    for role, topic in topics.items():
        count = len(found[topic.name]["partitions"])
        if count != topic.partitions:
            raise TopicMismatch(
                f"topic {topic.name} has {count} partitions but the settings say {topic.partitions}; partition "
                "counts are fixed at creation: change the setting, or use another `kafka.topic_prefix`"
            )
        ids[role] = str(found[topic.name]["topic_id"])
    return ids


def stream_lag(admin: Any, kafka: KafkaSettings, group: str) -> dict[tuple[str, int], int]:
    """Returns how many records the workers have yet to fold, by stream and partition. Raises BrokerUnavailable."""
    topics = tailrace_topics(kafka)
    names = {topics[role].name: role for role in USER_STREAMS}
    partitions = [TopicPartition(name, index) for name in names for index in range(kafka.user_partitions)]
    try:
        ends = admin.list_partition_offsets(dict.fromkeys(partitions, OffsetSpec.LATEST))
        done = admin.list_group_offsets({group: partitions})[group]
    except KafkaError as error:
        raise BrokerUnavailable(f"Kafka at {kafka.bootstrap_servers} failed: {error}") from error
    return {
        (names[partition.topic], partition.partition): ends[partition].offset - max(done[partition].offset, 0)
        for partition in partitions
    }
