"""How far the stream has got: per partition, where the log ends and where the stored state stands."""

from contextlib import closing

import msgspec
from kafka import TopicPartition
from kafka.errors import KafkaError

from tailrace.errors import BrokerUnavailable, SettingsError
from tailrace.kafka_clients import open_consumer
from tailrace.pointer import Pointer
from tailrace.registry import open_registry
from tailrace.rounds import RoundRecord, open_round_log
from tailrace.settings import KafkaSettings, Settings
from tailrace.stores import open_store
from tailrace.topics import USER_STREAMS, tailrace_topics


class StreamStatus(msgspec.Struct, frozen=True):
    """One stream of one partition. `lag` counts the records that the stored state does not reflect yet."""

    stream: str
    end: int
    stored: int
    lag: int


class PartitionStatus(msgspec.Struct, frozen=True):
    """One partition: its four streams and how many profiles it holds."""

    partition: int
    streams: list[StreamStatus]
    profiles: int


class Status(msgspec.Struct, frozen=True):
    """What `tailrace status` shows."""

    bootstrap_servers: str
    partitions: list[PartitionStatus]
    profiles: int
    lag: int
    pointer: Pointer | None
    last_round: RoundRecord | None


def load_status(settings: Settings) -> Status:
    """Returns the status. Raises BrokerUnavailable, StoreError, or SettingsError for a store others cannot see."""
    if settings.store.kind == "memory":
        raise SettingsError("`store.kind` is memory: what a worker holds there, no other process can see")
    spans = load_spans(settings.kafka)
    partitions = []
    with closing(open_store(settings, read_only=True)) as store:
        for partition in range(settings.kafka.user_partitions):
            offsets = store.load_offsets(partition)
            streams = []
            for role in USER_STREAMS:
                begin, end = spans[role, partition]
                stored = offsets[role].next_offset if role in offsets else 0
                # Records that retention has deleted are nobody's lag.
                streams.append(StreamStatus(role, end, stored, max(end - max(stored, begin), 0)))
            partitions.append(PartitionStatus(partition, streams, len(store.load_users(partition))))
    return Status(
        bootstrap_servers=settings.kafka.bootstrap_servers,
        partitions=partitions,
        profiles=sum(partition.profiles for partition in partitions),
        lag=sum(stream.lag for partition in partitions for stream in partition.streams),
        pointer=open_registry(settings).pointer(),
        last_round=next(iter(open_round_log(settings).newest(1)), None),
    )


def load_spans(kafka: KafkaSettings) -> dict[tuple[str, int], tuple[int, int]]:
    """Returns first and next offset of every user stream's partitions. Raises BrokerUnavailable."""
    topics = tailrace_topics(kafka)
    partitions = {
        (role, index): TopicPartition(topics[role].name, index)
        for role in USER_STREAMS
        for index in range(kafka.user_partitions)
    }
    with closing(open_consumer(kafka)) as consumer:
        try:
            missing = {topics[role].name for role in USER_STREAMS} - set(consumer.topics())
            if missing:
                raise BrokerUnavailable(f"no topic {', '.join(sorted(missing))}: run `tailrace topics` first")
            begins = consumer.beginning_offsets(list(partitions.values()))
            ends = consumer.end_offsets(list(partitions.values()))
        except KafkaError as error:
            raise BrokerUnavailable(f"Kafka at {kafka.bootstrap_servers} failed: {error}") from error
    return {coordinates: (begins[found], ends[found]) for coordinates, found in partitions.items()}
