"""The topics: what each is for, how it is keyed, and whether Kafka keeps its history or only its latest values."""

from dataclasses import dataclass
from typing import Literal

from tailrace.settings import KafkaSettings


@dataclass(frozen=True)
class Topic:
    """One topic as it must exist. `partitions` is fixed at creation because stored offsets rely on it."""

    name: str
    key: str
    partitions: int
    cleanup: Literal["delete", "compact"]
    retention_ms: int | None = None

    @property
    def config(self) -> dict[str, str]:
        """The topic's Kafka configuration."""
        config: dict[str, str] = {"cleanup.policy": self.cleanup}
        if self.retention_ms is not None:
            config["retention.ms"] = str(self.retention_ms)
        if self.cleanup == "compact":
            config |= {"min.cleanable.dirty.ratio": "0.2", "segment.ms": str(6 * 3_600_000)}
        return config


# Everything about a user is in the same partition number of these, in whatever order the four are read.
USER_STREAMS = ("clicks", "ratings", "contexts", "impressions")


def tailrace_topics(kafka: KafkaSettings) -> dict[str, Topic]:
    """Returns every topic by its role. Real names carry `kafka.topic_prefix`."""
    keep_ms = int(kafka.retention_days * 86_400_000)

    def topic(role: str, key: str, partitions: int, cleanup: Literal["delete", "compact"] = "delete") -> Topic:
        retention = keep_ms if cleanup == "delete" else None
        return Topic(kafka.topic_prefix + role, key, partitions, cleanup, retention)

    streams = {role: topic(role, "user_id", kafka.user_partitions) for role in USER_STREAMS}
    return streams | {
        "items": topic("items", "item_id", kafka.item_partitions, "compact"),
        "item-stats": topic("item-stats", "partition:item_id", kafka.item_partitions, "compact"),
        "models": topic("models", "pointer", 1, "compact"),
        "dead-letters": topic("dead-letters", "topic:partition:offset", 1),
    }
