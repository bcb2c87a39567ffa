"""A training round as a process of its own, on a tiny random BERT and a made-up log, which kills itself where told.

Usage: python -m tests.recovery.round_process FOLDER [STEP]
"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from deploy.training_parts import open_scorer
from tailrace.features import FEATURE_NAMES
from tailrace.ids import ModelVersion
from tailrace.registry import Registry, open_registry
from tailrace.rounds import open_round_log
from tailrace.settings import Settings, load_settings
from tests.made_up_slates import make_examples
from training.bert import PACKAGED, Bert, BertShape, load_base
from training.examples import Example, JoinCounts
from training.export import export_bundle
from training.log_window import AlreadyRead, LogWindow, Window
from training.model import SplitRanker
from training.round import Progress, RoundParts, run_round

FIRST = ModelVersion("v0")
_SHAPE = BertShape(
    vocab_size=30_522,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)
_LEARNED = FEATURE_NAMES.index("cos_user")


class MadeUpLog:
    """A log whose impressions were clicked for one feature, which version 0 knows nothing of."""

    def __init__(self, count: int = 400) -> None:
        examples, worths = make_examples(count)
        self.examples = [_with_worth(example, worth) for example, worth in zip(examples, worths, strict=True)]

    def plan(self, *, now_ms: int, already: AlreadyRead | None) -> LogWindow:
        """Returns a window over everything."""
        return LogWindow(since_ms=0, cutoff_ms=now_ms, already=already, offsets={})

    def read(self, window: LogWindow, progress: Progress) -> Window:
        """Returns the examples."""
        count = len(self.examples)
        progress("read", count, count)
        return Window(self.examples, [], JoinCounts(impressions=count, examples=count))


def _with_worth(example: Example, worth: np.ndarray) -> Example:
    features_NF = example.features_NF.copy()
    features_NF[:, _LEARNED] = worth
    return replace(example, features_NF=features_NF)


def make_settings(folder: Path) -> Settings:
    """Returns the settings of every round in `folder`."""
    return load_settings(
        None,
        {},
        data_dir=str(folder),
        log_level="warning",
        training={
            "min_examples": 100,
            "epochs": 2,
            "trainable_layers": 0,
            "head_learning_rate": 0.02,
            "threads": 1,
            "precision": "fp32",
        },
        gate={"canary_share": 0.0, "max_latency_ratio": 10.0, "max_popular_shift": 1.0, "max_cold_shift": 1.0},
    )


def publish_first(registry: Registry, folder: Path) -> None:
    """Publishes and promotes a ranker that knows nothing."""
    torch.manual_seed(0)
    ranker = SplitRanker(
        Bert(_SHAPE), split_layer=1, item_states=2, feature_names=FEATURE_NAMES, prior={}, head_width=8
    )
    export_bundle(
        ranker,
        load_base(PACKAGED)[1],
        folder,
        version=FIRST,
        max_user_tokens=16,
        max_item_tokens=8,
        precisions=("int8",),
    )
    registry.publish(folder, version=FIRST)
    registry.promote(FIRST)


def make_parts(settings: Settings, die_at: str = "") -> RoundParts:
    """Returns the parts of a round that kills its own process when it begins the step `die_at`."""

    def on_step(step: str) -> None:
        if step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return RoundParts(
        settings=settings,
        registry=open_registry(settings),
        rounds=open_round_log(settings),
        log=MadeUpLog(),
        open_scorer=open_scorer(settings),
        announce=lambda announcement: None,
        on_step=on_step,
    )


if __name__ == "__main__":
    run_round(make_parts(make_settings(Path(sys.argv[1])), *sys.argv[2:]))
