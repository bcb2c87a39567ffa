"""Every setting, its default and its unit, in one frozen object. Read once per process and passed in.

Order of authority: `TAILRACE_<SECTION>__<KEY>` in the environment, then the TOML file (`--settings`, or
`tailrace.toml` in the working directory), then the default written here. An unknown key is an error.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from tailrace.errors import SettingsError


def _doc(text: str) -> Meta:
    return Meta(description=text)


Port = Annotated[int, Meta(ge=0, le=65_535)]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0)]
Share = Annotated[float, Meta(ge=0, le=1)]

_STARS = "***"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class KafkaSettings(_Section, frozen=True, kw_only=True):
    """The broker and the topics."""

    bootstrap_servers: Annotated[str, _doc("Kafka to use; empty: the local one that `tailrace broker` runs")] = ""
    topic_prefix: Annotated[str, _doc("put before every topic name")] = ""
    user_partitions: Annotated[Positive, _doc("partitions of clicks, ratings, contexts, impressions, for good")] = 8
    item_partitions: Annotated[Positive, _doc("partitions of items and item-stats, for good")] = 4
    replication_factor: Annotated[Positive, _doc("copies of every partition; counts when topics are made")] = 1
    retention_days: Annotated[float, _doc("how long event topics keep their history; counts when topics are made")] = (
        90.0
    )
    security: Annotated[
        dict[str, str | int | bool],
        _doc("passed to every Kafka client: `security_protocol`, `sasl_mechanism`, `ssl_cafile`, …"),
    ] = {}


class StoreSettings(_Section, frozen=True, kw_only=True):
    """Where profiles, counters and offsets live."""

    kind: Annotated[
        Literal["lmdb", "valkey", "memory"],
        _doc("lmdb: one machine; valkey: several; memory: tests, no gateway sees it"),
    ] = "lmdb"
    path: Annotated[str, _doc("folder of the LMDB environments; relative to `data_dir`")] = "store"
    url: Annotated[str, _doc("Valkey or Redis, for example `redis://127.0.0.1:6379/0`")] = ""
    map_size_mb: Annotated[Positive, _doc("upper bound of one partition's LMDB file, MiB")] = 4096
    sync: Annotated[bool, _doc("fsync every LMDB commit; off: a power cut may cost a refold, not data")] = True


class StreamSettings(_Section, frozen=True, kw_only=True):
    """The stream workers and their supervisor."""

    group: Annotated[str, _doc("consumer group under which offsets are reported to Kafka")] = "tailrace"
    min_workers: Annotated[Positive, _doc("fewest workers")] = 1
    max_workers: Annotated[Positive, _doc("most workers; never more than partitions")] = 2
    lag_per_worker: Annotated[Positive, _doc("records of lag that justify one more worker")] = 20_000
    poll_timeout_s: Annotated[Seconds, _doc("longest wait for records in one poll")] = 0.5
    max_batch: Annotated[Positive, _doc("most records folded into one save")] = 5000
    profile_cache: Annotated[Positive, _doc("decoded profiles kept per worker")] = 50_000
    stats_interval_s: Annotated[Seconds, _doc("between two publications of item counters")] = 1.0
    max_ahead_s: Annotated[float, _doc("an event stamped further ahead of its record than this is a dead letter")] = (
        300.0
    )
    metrics_port: Annotated[Port, _doc("where the supervisor answers Prometheus on 127.0.0.1; 0: nowhere")] = 9465
    stall_s: Annotated[Seconds, _doc("a worker with lag and no progress for this long is replaced")] = 30.0


class RankerSettings(_Section, frozen=True, kw_only=True):
    """The ranker deployment: the model, its replicas and what it considers."""

    device: Annotated[Literal["cpu", "cuda"], _doc("where the sessions run")] = "cpu"
    precision: Annotated[Literal["int8", "fp16", "auto"], _doc("auto: int8 on cpu, fp16 on cuda")] = "auto"
    intra_op_threads: Annotated[Positive, _doc("ONNX Runtime threads per replica")] = 1
    min_replicas: Annotated[Positive, _doc("fewest replicas")] = 1
    max_replicas: Annotated[Positive, _doc("most replicas")] = 1
    target_ongoing_requests: Annotated[float, _doc("requests in flight per replica that autoscaling aims at")] = 4.0
    upscale_delay_s: Annotated[float, _doc("how long load must stay high before a replica is added")] = 2.0
    downscale_delay_s: Annotated[float, _doc("how long load must stay low before one is removed")] = 60.0
    max_ongoing_requests: Annotated[Positive, _doc("requests a replica holds at once")] = 16
    max_queued_requests: Annotated[Positive, _doc("requests that may wait; more are answered 429")] = 64
    max_batch_requests: Annotated[Positive, _doc("requests scored in one pass on cuda; on cpu always one")] = 8
    num_cpus: Annotated[float, _doc("CPUs a replica reserves in Ray")] = 0.5
    num_candidates: Annotated[Positive, _doc("candidates scored per request")] = 200
    deadline_s: Annotated[Seconds, _doc("after this the gateway answers from a lower rung")] = 0.5
    item_text_cache: Annotated[bool, _doc("keep item vectors and states of a version on disk")] = True

    @property
    def served_precision(self) -> Literal["int8", "fp16"]:
        """The precision of the graphs that serve: what is set, or what suits the device."""
        if self.precision == "auto":
            return "int8" if self.device == "cpu" else "fp16"
        return self.precision

    def __post_init__(self) -> None:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"`min_replicas` {self.min_replicas} is more than `max_replicas` {self.max_replicas}")


class SlateSettings(_Section, frozen=True, kw_only=True):
    """How ranked candidates become a slate."""

    rating_weight: Annotated[float, _doc("weight of the predicted rating (1 to 5) beside the click logit")] = 0.25
    diversity: Annotated[Share, _doc("MMR: 0 is pure relevance, 1 pure novelty")] = 0.15
    max_per_tag: Annotated[int, _doc("most items of one tag in a slate; 0: no cap")] = 4
    exploration: Annotated[Share, _doc("share of slate positions drawn at random from the next candidates")] = 0.05
    explore_pool: Annotated[Positive, _doc("how many candidates below the slate may be explored")] = 50
    unshown_logged: Annotated[int, _doc("losing candidates logged, of which alone training and the gate know")] = 10


class GatewaySettings(_Section, frozen=True, kw_only=True):
    """The HTTP service."""

    host: Annotated[str, _doc("address to listen on")] = "127.0.0.1"
    port: Annotated[Port, _doc("port to listen on")] = 8000
    replicas: Annotated[Positive, _doc("gateway replicas")] = 1
    num_cpus: Annotated[float, _doc("CPUs a replica reserves in Ray")] = 0.25
    max_ongoing_requests: Annotated[Positive, _doc("requests a replica holds at once")] = 64
    max_queued_requests: Annotated[Positive, _doc("requests that may wait; more are answered 429")] = 128
    max_events_per_call: Annotated[Positive, _doc("most events in one POST")] = 1000
    max_body_bytes: Annotated[Positive, _doc("largest request body")] = 4_194_304
    ack_timeout_s: Annotated[Seconds, _doc("longest wait for the broker to acknowledge")] = 5.0


class RegistrySettings(_Section, frozen=True, kw_only=True):
    """Where model bundles live."""

    url: Annotated[str, _doc("folder or fsspec URL; relative paths are below `data_dir`")] = "registry"
    keep: Annotated[Positive, _doc("bundles kept beside those that serve; a round removes older ones")] = 10
    base_model: Annotated[str, _doc("BERT that version 0 is built from: `packaged`, a local folder or a hub name")] = (
        "packaged"
    )
    split_layer: Annotated[int, _doc("k: below this layer item tokens do not see the user")] = 3
    item_states: Annotated[int, _doc("T: pooled states kept per item; 0 keeps every token")] = 4
    max_user_tokens: Annotated[Positive, _doc("longest user text, tokens")] = 96
    max_item_tokens: Annotated[Positive, _doc("longest item text, tokens")] = 32


class TrainingSettings(_Section, frozen=True, kw_only=True):
    """Training rounds: what they learn from, how, and what a challenger has to show."""

    window_s: Annotated[Seconds, _doc("how far back in the log a round reads")] = 7 * 86_400.0
    wait_s: Annotated[float, _doc("an impression becomes an example no sooner than this after it was shown")] = 30.0
    attribution_s: Annotated[Seconds, _doc("feedback that comes later than this after an impression is not its")] = (
        1800.0
    )
    view_gain: Annotated[float, _doc("what a view adds to an item's label")] = 0.3
    click_gain: Annotated[float, _doc("what a click adds to an item's label")] = 1.0
    like_gain: Annotated[float, _doc("what a like adds to an item's label")] = 2.0
    save_gain: Annotated[float, _doc("what a save adds to an item's label")] = 2.0
    share_gain: Annotated[float, _doc("what a share adds to an item's label")] = 3.0
    purchase_gain: Annotated[float, _doc("what a purchase adds to an item's label")] = 4.0
    skip_gain: Annotated[float, _doc("what a skip adds to an item's label; below zero takes away")] = -1.0
    hide_gain: Annotated[float, _doc("what a hide adds to an item's label")] = -3.0
    dwell_gain: Annotated[
        float, _doc("added per doubling of a click's dwell time above 10 s, three doublings at most")
    ] = 0.25
    rating_gain: Annotated[float, _doc("added per star above the middle of the scale, taken away per star below")] = 1.0
    min_examples: Annotated[Positive, _doc("with fewer fresh impressions a round does not begin")] = 200
    max_examples: Annotated[Positive, _doc("most fresh impressions in a round, the newest")] = 20_000
    replay_examples: Annotated[int, _doc("older impressions learned beside them, against forgetting")] = 4000
    replay_half_life_s: Annotated[
        Seconds, _doc("age at which an older impression is half as likely to be replayed")
    ] = 2 * 86_400.0
    holdout_share: Annotated[
        Share, _doc("newest share of the fresh impressions, unseen, on which the gate decides")
    ] = 0.2
    max_holdout: Annotated[Positive, _doc("most impressions the gate decides on")] = 1000
    stop_share: Annotated[Share, _doc("share before those, on which training is stopped early")] = 0.1
    epochs: Annotated[Positive, _doc("most passes over the examples")] = 4
    batch: Annotated[Positive, _doc("impressions per optimizer step")] = 16
    learning_rate: Annotated[float, _doc("peak rate of the BERT layers that learn")] = 5e-5
    head_learning_rate: Annotated[float, _doc("peak rate of the head")] = 2e-3
    weight_decay: Annotated[float, _doc("AdamW weight decay")] = 0.01
    dropout: Annotated[Share, _doc("dropout while training")] = 0.1
    warm_up_share: Annotated[Share, _doc("share of the steps in which the rates rise to their peak")] = 0.1
    pointwise_weight: Annotated[float, _doc("weight of the click log loss beside the listwise loss")] = 0.5
    rating_weight: Annotated[float, _doc("weight of the rating loss")] = 0.1
    kl_weight: Annotated[float, _doc("weight of staying near the parent's scores on replayed impressions")] = 0.1
    anchor_weight: Annotated[
        float,
        _doc("pull of the head towards what its epochs began with, spread over all examples: few move it little"),
    ] = 100.0
    unshown_weight: Annotated[Share, _doc("weight of a candidate that was not shown, in the listwise loss")] = 0.02
    silent_share: Annotated[
        Share, _doc("share of the impressions on which nothing happened that are learned from, each for several")
    ] = 0.25
    trainable_layers: Annotated[
        int, _doc("upper BERT layers that learn; none lies below the split; 0: the head alone")
    ] = 0
    lora_rank: Annotated[int, _doc("0: the layers themselves learn; above: low-rank adapters of that rank do")] = 0
    precision: Annotated[Literal["auto", "bf16", "fp32"], _doc("auto: bf16 where it is faster")] = "auto"
    device: Annotated[Literal["cpu", "cuda"], _doc("where training runs")] = "cpu"
    threads: Annotated[Positive, _doc("CPU threads of a round")] = 2
    workers: Annotated[
        Positive,
        _doc("processes that learn together, above 1 through Ray Train; machines must share `data_dir`"),
    ] = 1
    num_cpus: Annotated[float, _doc("CPUs that a round, and each of several workers, reserves in Ray")] = 0.5
    seed: Annotated[int, _doc("of sampling, order and dropout")] = 0
    trackers: Annotated[
        tuple[Literal["tensorboard", "mlflow", "wandb"], ...],
        _doc("where the figures of a round go; the last two need the extra `trackers`"),
    ] = ("tensorboard",)
    tracking_uri: Annotated[str, _doc("MLflow's server or database; empty: one beside the rounds")] = ""

    def __post_init__(self) -> None:
        if self.lora_rank and not self.trainable_layers:
            raise ValueError("`lora_rank` adapts layers that learn: say how many do in `trainable_layers`")


class GateSettings(_Section, frozen=True, kw_only=True):
    """What a challenger has to show before it serves, and while it does."""

    margin: Annotated[float, _doc("NDCG@10 a challenger may lose to the champion on the newest impressions")] = 0.005
    confidence: Annotated[Share, _doc("confidence with which it must not lose more")] = 0.95
    better_confidence: Annotated[
        Share, _doc("confidence with which it must be better at all, .5 or more: noise is no gain; 0: not asked")
    ] = 0.9
    bootstrap: Annotated[Positive, _doc("resamples behind each interval")] = 1000
    min_spread: Annotated[float, _doc("least standard deviation of scores within a slate")] = 1e-3
    max_popular_shift: Annotated[
        float, _doc("most that the share of first places held by popular items may rise, from 0 to 1")
    ] = 0.25
    max_cold_shift: Annotated[
        float, _doc("part of the champion's first places for new items that a challenger may take from them")
    ] = 0.25
    max_latency_ratio: Annotated[float, _doc("most the time to score may grow, as a ratio to the champion")] = 1.5
    canary_share: Annotated[Share, _doc("share of users, by hash, who get a challenger first; 0: all at once")] = 0.2
    canary_impressions: Annotated[
        Positive, _doc("impressions of a canary before it may be promoted; at four times as many a verdict is due")
    ] = 300
    max_canary_s: Annotated[Seconds, _doc("a canary still undecided after this long is taken back")] = 3 * 86_400.0
    max_click_loss: Annotated[
        Share, _doc("relative click rate a canary may lose; a champion just promoted, twice as much")
    ] = 0.2
    max_error_share: Annotated[
        Share, _doc("share of a version's requests that may miss the top rung, above the champion's")
    ] = 0.05

    def __post_init__(self) -> None:
        if 0.0 < self.better_confidence < 0.5:
            raise ValueError("`better_confidence` is 0, or .5 and more")


class Settings(_Section, frozen=True, kw_only=True):
    """All settings of one process."""

    data_dir: Annotated[
        str, _doc("everything Tailrace writes here, but for Kafka's jars, which go to the user's cache")
    ] = ".tailrace"
    log_level: Annotated[Literal["debug", "info", "warning", "error"], _doc("least severe line logged")] = "info"
    kafka: KafkaSettings = KafkaSettings()
    store: StoreSettings = StoreSettings()
    stream: StreamSettings = StreamSettings()
    ranker: RankerSettings = RankerSettings()
    slate: SlateSettings = SlateSettings()
    gateway: GatewaySettings = GatewaySettings()
    registry: RegistrySettings = RegistrySettings()
    training: TrainingSettings = TrainingSettings()
    gate: GateSettings = GateSettings()

    def path(self, name: str) -> Path:
        """Returns `name` below `data_dir`, or `name` itself where it is absolute."""
        return Path(self.data_dir).absolute() / name


def load_settings(file: Path | None = None, environ: Mapping[str, str] = os.environ, **overrides: Any) -> Settings:
    """Returns the settings from `file`, the environment and `overrides` (`kafka={...}`), the last one winning.

    Raises SettingsError naming the key.
    """
    found: dict[str, Any] = {}
    if file is not None:
        try:
            found = tomllib.loads(file.read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise SettingsError(f"{file}: {error}") from error
    _merge(found, _from_environ(environ))
    _merge(found, overrides)
    try:
        return msgspec.convert(found, Settings, strict=False)
    except msgspec.ValidationError as error:
        raise SettingsError(str(error)) from error


def _from_environ(environ: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in environ.items():
        if not name.startswith("TAILRACE_"):
            continue
        *sections, key = name.removeprefix("TAILRACE_").lower().split("__")
        try:
            read: Any = msgspec.json.decode(value) if value.startswith(("{", "[")) else value
        except msgspec.DecodeError as error:
            raise SettingsError(f"{name}: {error}") from error
        for step in (key, *reversed(sections)):
            read = {step: read}
        _merge(found, read)
    return found


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def without_secrets(settings: Settings) -> dict[str, Any]:
    """Returns the settings as plain values to be shown: passwords are stars, and so is what a URL says of its user."""
    found: dict[str, Any] = msgspec.to_builtins(settings)
    security = found["kafka"]["security"]
    found["kafka"]["security"] = {name: _STARS if "password" in name else value for name, value in security.items()}
    for section, name in (("store", "url"), ("registry", "url"), ("training", "tracking_uri")):
        found[section][name] = re.sub(r"(?<=://)[^/]*(?=@)", _STARS, found[section][name])
    return found


def settings_table() -> str:
    """Returns the Markdown table of every setting, as the README shows it."""
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for field in msgspec.structs.fields(Settings):
        if isinstance(field.default, _Section):
            rows += [_row(f"{field.name}.{inner.name}", inner) for inner in msgspec.structs.fields(field.default)]
        else:
            rows.append(_row(field.name, field))
    return "\n".join(rows)


def _row(name: str, field: msgspec.structs.FieldInfo) -> str:
    kind = msgspec.inspect.type_info(field.type)
    text = (getattr(kind, "extra_json_schema", None) or {}).get("description", "")
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    return f"| `{name}` | `{msgspec.json.encode(default).decode()}` | {text} |"
