"""Version 0 of the ranker, built once for every test that scores."""

from pathlib import Path

import pytest
import torch

from tailrace.ids import ModelVersion
from training.export import build_version_zero

FEATURE_NAMES = ("cosine", "clicked_1h_log", "shown_1h_log", "age_log_h", "rank_in_pool")
PRIOR = {"cosine": 4.0, "clicked_1h_log": 0.7, "shown_1h_log": -0.2}

# Tests are many and small: threads of torch would wait for each other longer than they work.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file of version 0 but the manifest, in int8, fp16 and fp32."""
    directory = tmp_path_factory.mktemp("bundle") / "v0"
    build_version_zero(
        directory,
        version=ModelVersion("v0"),
        feature_names=FEATURE_NAMES,
        prior=PRIOR,
        precisions=("int8", "fp16", "fp32"),
    )
    return directory
