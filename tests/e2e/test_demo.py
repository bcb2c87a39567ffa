"""The demo as a newcomer runs it, on a few seconds of readers: it answers, sums up, and leaves nothing behind."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from tests.servers import free_port

_MARK = "DEMO_TEST_RUN"


def processes_of(run: str) -> list[str]:
    """The command lines of live processes that were started, however indirectly, with this run's environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{_MARK}={run}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue  # ended meanwhile
    return [line for line in found if line]


def run_demo(folder: Path, seconds: int) -> str:
    run = folder.name
    environ = os.environ | {
        _MARK: run,
        "TAILRACE_DATA_DIR": str(folder / "data"),
        "TAILRACE_GATEWAY__PORT": str(free_port()),
        "TAILRACE_STREAM__METRICS_PORT": str(free_port()),
    }
    command = [sys.executable, "-m", "deploy.demo", "--duration", str(seconds), "--past", "60"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(
        command, cwd=root, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        try:
            output, _ = demo.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            demo.send_signal(signal.SIGINT)
            output, _ = demo.communicate()
    assert demo.returncode == 0, output
    assert processes_of(run) == []
    return output


def test_the_demo_runs_sums_up_leaves_nothing_behind_and_goes_on_from_its_data(tmp_path: Path) -> None:
    first = run_demo(tmp_path, 5)
    assert "First recommendation" in first
    assert re.search(r"recommendations\s+│\s+\d+ .* 0 failed calls", first), first
    assert re.search(r"click rate, personalised", first)
    assert "60 visits of the last days are in the log" in first
    model = (tmp_path / "data" / "logs" / "model.log").read_text()
    assert "published and promoted" in model
    services = [path.read_text() for path in (tmp_path / "data" / "logs" / "ray").glob("worker-*.err")]
    assert any("models serve" in one for one in services), "what a replica logged is kept"

    again = run_demo(tmp_path, 5)
    assert re.search(r"recommendations\s+│\s+\d+ .* 0 failed calls", again), again
    assert "visits of the last days" not in again
    assert "serves already" in (tmp_path / "data" / "logs" / "model.log").read_text()
