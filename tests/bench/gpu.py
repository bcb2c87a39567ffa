"""What a GPU gives, beside the CPU of the same machine, in one run: `python -m tests.bench.gpu`.

Requests are of 200 candidates with a user text of their own, through `LoadedModel` as a replica holds it: its queues,
its batches. The GPU runs the fp16 graphs, the CPU the int8 ones, of one bundle. Fine-tuning is that of a round. Needs
torch, an ONNX Runtime that knows CUDA, and a card; neither Kafka nor Ray.
"""

import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from services.encodings import EncodedItems
from services.loaded_model import LoadedModel
from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
from tailrace.ids import ModelVersion
from tailrace.settings import Settings, TrainingSettings, load_settings
from tests.bench.ranker import ITEM_TEXT, USER_TEXT
from tests.bench.report import GPU_RESULTS, Row, describe_tree, figure, save_results
from tests.bench.training import make_example
from training.bert import PACKAGED, load_base
from training.export import build_version_zero, load_ranker
from training.fine_tune import fine_tune

NUM_CANDIDATES = 200
CALLERS = {"cpu": (1, 4), "cuda": (1, 8, 32)}
SECONDS = 4.0  # of each measurement, after as many requests as there are callers to warm up
CATALOGUE = 2_000
IMPRESSIONS = {"cpu": 250, "cuda": 10_000}
LEARNING = {0: "the head alone", 3: "three layers"}
_PATIENCE_S = 60.0


def bench_gpu(console: Console) -> list[Row]:
    """Returns requests per second and their times by callers, items encoded per second, and impressions learned."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as folder:
        bundle = Path(folder) / "v0"
        console.print("exporting version 0")
        build_version_zero(bundle, version=ModelVersion("v0"), feature_names=FEATURE_NAMES, prior=PRIOR_WEIGHTS)
        for device in ("cpu", "cuda"):
            settings = load_settings(
                None, environ={}, data_dir=folder, ranker={"device": device, "item_text_cache": False}
            )
            rows += _bench_serving(bundle, settings, console)
        for device in ("cuda", "cpu"):
            for layers, name in LEARNING.items():
                rows += _bench_learning(bundle, Path(folder), device, layers, name, console)
    return rows


def _bench_serving(bundle: Path, settings: Settings, console: Console) -> list[Row]:
    device = settings.ranker.device
    model = LoadedModel.load(bundle, ModelVersion("v0"), settings)
    model.start()
    items = [ITEM_TEXT.format(number) for number in range(CATALOGUE)]
    model.encode_items(items[:NUM_CANDIDATES])
    started = time.perf_counter()
    states_NTH, mask_NT, vectors_ND = model.encode_items(items)
    rate = CATALOGUE / (time.perf_counter() - started)
    candidates = slice(NUM_CANDIDATES)
    encoded = EncodedItems(items[candidates], states_NTH[candidates], mask_NT[candidates], vectors_ND[candidates])
    rows: list[Row] = [{"name": f"{device} {model.precision}, items encoded", "value": rate, "unit": "items/s"}]
    for callers in CALLERS[device]:
        name = f"{device} {model.precision}, {callers} at once"
        took_s, wall_s = _ask(partial(_request, model, encoded), callers)
        rows += [
            {"name": f"{name}, requests of {NUM_CANDIDATES}", "value": len(took_s) / wall_s, "unit": "requests/s"},
            {"name": f"{name}, p50", "value": float(np.percentile(took_s, 50)) * 1000, "unit": "ms"},
            {"name": f"{name}, p99", "value": float(np.percentile(took_s, 99)) * 1000, "unit": "ms"},
        ]
        console.print(f"{name}: {', '.join(figure(row) for row in rows[-3:])}")
    model.retire()
    return rows


def _request(model: LoadedModel, items: EncodedItems, number: int) -> None:
    """Scores for a user nobody has asked for before, so that no cache answers."""
    deadline = time.monotonic() + _PATIENCE_S
    user = model.encode_user(f"reader {number}; {USER_TEXT}", deadline)
    features_NF = np.random.default_rng(number).normal(size=(NUM_CANDIDATES, len(FEATURE_NAMES))).astype(np.float32)
    model.score(user, items, features_NF, np.zeros(NUM_CANDIDATES, np.float32), deadline)


def _ask(request: Callable[[int], None], callers: int) -> tuple[Sequence[float], float]:
    """Returns the seconds that each request took, and all of them."""

    def call(caller: int, until: float) -> list[float]:
        took_s = []
        while (began := time.perf_counter()) < until:
            request(caller * 1_000_000 + len(took_s))
            took_s.append(time.perf_counter() - began)
        return took_s

    with ThreadPoolExecutor(callers) as pool:
        list(pool.map(lambda caller: request(1_000_000_000 + caller), range(callers)))
        started = time.perf_counter()
        found = list(pool.map(partial(call, until=started + SECONDS), range(callers)))
        return [one for took_s in found for one in took_s], time.perf_counter() - started


def _bench_learning(bundle: Path, folder: Path, device: str, layers: int, name: str, console: Console) -> list[Row]:
    ranker, _, card = load_ranker(bundle)
    count = IMPRESSIONS[device]
    examples = [make_example(number) for number in track(range(count), "examples", console=console, transient=True)]
    stop = [make_example(count + number) for number in range(count // 10)]
    learned = fine_tune(
        ranker,
        load_base(PACKAGED)[1],
        examples,
        stop,
        [],
        TrainingSettings(device=device, trainable_layers=layers, trackers=[], threads=os.cpu_count() or 1),
        max_user_tokens=card.max_user_tokens,
        max_item_tokens=card.max_item_tokens,
        folder=folder / f"{device}-{layers}",
    )
    what = f"{device} {learned.precision}, {name} learning {count:,} impressions"
    console.print(f"{what}: {learned.took_s:.1f} s, {learned.reading_s:.1f} of reading, {len(learned.history)} epochs")
    return [
        {"name": what, "value": learned.impressions_per_s, "unit": "impressions/s"},
        {"name": f"{what}, all of it", "value": learned.took_s, "unit": "s"},
        {"name": f"{what}, of which reading", "value": learned.reading_s, "unit": "s"},
    ]


def main() -> None:
    """Measures, prints a table, and writes tests/bench/results-gpu.json."""
    console = Console()
    rows = bench_gpu(console)
    table = Table("measure", "figure", title="Measured", title_justify="left")
    for row in rows:
        table.add_row(row["name"], figure(row))
    console.print(table)
    card = torch.cuda.get_device_name()
    machine = f"one {card} and {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"
    save_results("gpu", {"machine": machine, "tree": describe_tree(), "rows": rows}, GPU_RESULTS)


if __name__ == "__main__":
    main()
