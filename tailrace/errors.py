"""The errors Tailrace raises. Each carries the coordinates of what failed.

TailraceError
├── SettingsError          a setting is unknown, of the wrong type, or out of range
├── InvalidRecord          one record cannot be used; names the field; becomes a dead letter or a 4xx
├── TopicMismatch          a topic exists with another shape than stored offsets rely on
├── BrokerUnavailable      no Kafka cluster answers, or one cannot be started here
├── StoreError             the profile store refused or failed
│   └── Fenced             another worker has claimed the partition since
├── BundleError            a model bundle is missing, damaged or unsuited
│   ├── ParityError        an exported model differs from its source by more than its tolerance
│   ├── Pinned             a version is pinned: no other is promoted and no canary begins until it is unpinned
│   └── ProviderError      ONNX Runtime did not give the execution provider that was asked for
├── NothingToLearn         too few fresh impressions for a training round; nothing was changed
├── RoundRunning           another training round runs; nothing was changed
├── TrainingDiverged       a fine-tune's loss is no number any more; names the step
├── TooLittleOverlap       logged slates tell too little of another policy; says how little
├── ScoringError           the model's sessions failed on a request; the answer comes without them
├── NotReady               a table or a model has not been loaded yet
├── Overloaded             a queue is full; says when to try again
└── TooLate                a deadline passed before the work was done
"""

import copyreg
from typing import Any


class TailraceError(Exception):
    """Anything Tailrace raises on purpose. It passes from process to process as it is."""

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is otherwise made again from its message, where these take what the message is made of.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class SettingsError(TailraceError):
    """A setting is unknown, of the wrong type, or out of range."""


class InvalidRecord(TailraceError):
    """One record cannot be used. `field` is a JSON path such as `$.occurred_at`."""

    def __init__(self, reason: str, *, field: str = "$") -> None:
        super().__init__(f"{field}: {reason}")
        self.reason = reason
        self.field = field


class TopicMismatch(TailraceError):
    """A topic exists with another shape than the one stored offsets rely on."""


class BrokerUnavailable(TailraceError):
    """No Kafka cluster answers, or one cannot be started here."""


class StoreError(TailraceError):
    """The profile store refused or failed."""


class Fenced(StoreError):
    """Another worker has claimed the partition since; the holder of the old token must stop."""

    def __init__(self, partition: int, token: int, current: int) -> None:
        super().__init__(f"partition {partition}: fencing token {token} is older than {current}")
        self.partition = partition


class BundleError(TailraceError):
    """A model bundle is missing, damaged or unsuited."""


class ParityError(BundleError):
    """An exported model differs from its source by more than its stated tolerance."""


class Pinned(BundleError):
    """A version is pinned: no other is promoted and no canary begins until it is unpinned."""


class ProviderError(BundleError):
    """ONNX Runtime did not give the execution provider that was asked for."""


class NothingToLearn(TailraceError):
    """There are too few fresh impressions for a training round. Nothing was changed."""


class RoundRunning(TailraceError):
    """Another training round runs. Nothing was changed."""


class TrainingDiverged(TailraceError):
    """A fine-tune's loss, or its gradient, is no number any more. `step` counts from 0."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"step {step}: the loss is {loss}, or its gradient is no number")
        self.step = step


class TooLittleOverlap(TailraceError):
    """Logged slates tell too little of what another policy would have earned."""

    def __init__(self, slates: int, effective: float, mean_weight: float, reason: str) -> None:
        super().__init__(
            f"{slates} logged slates are worth {effective:.1f} of the other policy's, with a mean weight of "
            f"{mean_weight:.3g}: {reason}"
        )
        self.effective = effective
        self.mean_weight = mean_weight


class ScoringError(TailraceError):
    """The model's sessions failed on a request; the answer comes without them."""


class NotReady(TailraceError):
    """A table or a model has not been loaded yet."""


class Overloaded(TailraceError):
    """A queue is full. `retry_after_s` says when to try again."""

    def __init__(self, reason: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class TooLate(TailraceError):
    """A deadline passed before the work was done; whoever asked gets a lesser answer, or none."""
