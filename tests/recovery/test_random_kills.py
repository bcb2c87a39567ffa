"""Workers, the broker and the store killed at random while producers go on: nothing lost, nothing counted twice."""

import os
import random
import signal
import statistics
import threading
from collections import defaultdict
from pathlib import Path

import pytest

from stream.broker import LocalKafka
from tests.recovery.launcher import Launcher
from tests.recovery.oracle import assert_state_equals_log, assert_stats_equal_counters
from tests.recovery.scene import Scene, stop_gracefully
from tests.recovery.traffic import Traffic, produce
from tests.servers import start_valkey

SEED = int(os.environ.get("TEST_SEED", "7"))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["lmdb", "valkey"])
def test_random_kills_leave_the_state_of_the_log(tmp_path: Path, launcher: Launcher, kills: int, kind: str) -> None:
    rng = random.Random(SEED)
    kafka = LocalKafka.start(tmp_path / "kafka")
    valkey = start_valkey(tmp_path, append_only=True) if kind == "valkey" else None
    here = Scene(
        tmp_path,
        kafka.bootstrap_servers,
        launcher,
        partitions=4,
        store={"kind": kind, "url": valkey.url if valkey else ""},
    )
    groups = ([0, 1], [2, 3])
    recovery_s: dict[str, list[float]] = defaultdict(list)
    pause = threading.Event()  # never set: its timed wait is the random moment
    try:
        produce(here.settings, SEED, 2000)
        traffic = Traffic(here.settings, SEED + 1, per_s=400).start()
        workers = [here.start_worker(group) for group in groups]
        victims = ["worker", "broker", *(["store"] if valkey else [])]  # each once at least
        victims += rng.choices(victims, weights=[8, 1, 2][: len(victims)], k=max(kills - len(victims), 0))
        rng.shuffle(victims)
        for victim in victims:
            which = rng.randrange(2)
            if rng.random() < 0.7:  # mostly at work; sometimes while the last one still starts
                here.wait_for_progress(groups[which][0])
            pause.wait(rng.random() * 0.3)
            match victim:
                case "worker":
                    workers[which].signal(signal.SIGKILL)
                    workers[which].wait(10)
                    workers[which] = here.start_worker(groups[which])
                    recovery_s["worker"].append(here.wait_for_progress(groups[which][0]))
                case "broker":
                    kafka.kill()
                    kafka = LocalKafka.start(tmp_path / "kafka")
                    recovery_s["broker"].append(here.wait_for_progress(groups[which][0]))
                case "store":
                    assert valkey is not None
                    valkey.kill()
                    valkey = start_valkey(tmp_path, append_only=True, port=valkey.port)
                    recovery_s["store"].append(here.wait_for_progress(groups[which][0]))
        traffic.stop()
        here.wait_for_the_end()
        for worker in workers:
            stop_gracefully(worker)
        folded = assert_state_equals_log(here.settings, here.store)
        assert_stats_equal_counters(here.settings, here.store)
        for killed, seconds in recovery_s.items():
            print(
                f"{kind}: {len(seconds)} kills of a {killed}, back at work after a median of "
                f"{statistics.median(seconds):.2f} s, at most {max(seconds):.2f} s"
            )
        print(
            f"{kind}: {folded.events} events, {folded.repeated} retries, {len(folded.dead_letters)} dead letters; "
            "0 lost, 0 doubled"
        )
    finally:
        here.close()
        if valkey:
            valkey.stop()
        kafka.stop()
