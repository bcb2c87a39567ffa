"""Worker processes to be killed, each forked in a few milliseconds from one process that has imported everything.

A worker can be told where to die: SIGKILL as the named step of its n-th batch with records ends.
"""

import ctypes
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec

REPOSITORY = Path(__file__).parents[2]


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What is to run, and where it is to die, if anywhere. `max_file_bytes` limits what it can write (RLIMIT_FSIZE)."""

    number: int
    settings: str
    partitions: list[int]
    log: str
    die_after: str = ""
    on_batch: int = 1
    max_file_bytes: int | None = None


class Report(msgspec.Struct, frozen=True):
    """A process has started (`status` is None) or ended, as `subprocess.Popen.returncode` would say it."""

    number: int
    pid: int
    status: int | None = None


class WorkerProcess:
    """One forked worker, as the tests see it."""

    def __init__(self) -> None:
        self.pid = 0
        self.returncode: int | None = None
        self.started = threading.Event()
        self.ended = threading.Event()

    def wait(self, timeout_s: float) -> int:
        """Returns the exit status, negative for a signal. Raises AssertionError after `timeout_s`."""
        assert self.ended.wait(timeout_s), f"process {self.pid} did not end within {timeout_s:g} s"
        assert self.returncode is not None
        return self.returncode

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has ended."""
        if not self.ended.is_set():
            os.kill(self.pid, number)


class Launcher:
    """Starts worker processes. They end when it does, and it ends when its parent does."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.recovery.launcher"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        self._workers: list[WorkerProcess] = []
        threading.Thread(target=self._listen, name="launcher", daemon=True).start()

    def start(self, settings: Path, partitions: list[int], log: Path, **options: str | int | None) -> WorkerProcess:
        """Returns a running worker process."""
        worker = WorkerProcess()
        self._workers.append(worker)
        number = len(self._workers) - 1
        order = msgspec.convert(
            {"number": number, "settings": str(settings), "partitions": partitions, "log": str(log)} | options, Order
        )
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(order) + b"\n")
        self._process.stdin.flush()
        assert worker.started.wait(30), "the launcher started nothing"
        return worker

    def close(self) -> None:
        """Ends the launcher, which ends its workers."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            report = msgspec.json.decode(line, type=Report)
            worker = self._workers[report.number]
            if report.status is None:
                worker.pid = report.pid
                worker.started.set()
            else:
                worker.returncode = report.status
                worker.ended.set()


def main() -> None:
    """Forks a keeper for every order on standard input; the keeper forks the worker, and reports its life."""
    # Before the forks: that is what makes them fast.
    for module in ("stream.worker", "tailrace.stores.lmdb_store", "tailrace.stores.valkey_store"):
        importlib.import_module(module)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the keepers are nobody's business
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=Order)
        launcher = os.getpid()
        if os.fork() == 0:
            _keep(order, launcher)


def _keep(order: Order, launcher: int) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _end_with(launcher)
    keeper = os.getpid()
    pid = os.fork()
    if pid == 0:
        _end_with(keeper)
        _become_worker(order)
    _report(Report(order.number, pid))
    _, status = os.waitpid(pid, 0)
    _report(Report(order.number, pid, os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _report(report: Report) -> None:
    os.write(1, msgspec.json.encode(report) + b"\n")


def _become_worker(order: Order) -> None:
    status = 1
    try:
        log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _work(order)
        status = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _work(order: Order) -> None:
    import faulthandler
    import resource
    import traceback

    from stream.worker import StreamWorker
    from tailrace.settings import load_settings
    from tailrace.stores import open_store

    faulthandler.register(signal.SIGUSR1)  # where does it hang?
    if order.max_file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order.max_file_bytes, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so a write fails, as on a full disk, and kills nobody
    batches = 0
    has_records = False

    def on_step(step: str) -> None:
        nonlocal batches, has_records
        if step == "2 decode":  # nobody comes here without records
            batches += 1
            has_records = True
        if step == order.die_after and batches >= order.on_batch and (has_records or step == "1 poll"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == "8 publish":
            has_records = False

    try:
        settings = load_settings(Path(order.settings), {})
        store = open_store(settings)
        worker = StreamWorker(settings, order.partitions, store, on_step=on_step)
        signal.signal(signal.SIGTERM, lambda *_: worker.stop())
        worker.run()
        store.close()
    except BaseException:
        print(time.strftime("%H:%M:%S"), "the worker died of:", traceback.format_exc(), file=sys.stderr)
        raise


if __name__ == "__main__":
    main()
