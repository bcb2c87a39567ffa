"""Child processes that do not outlive their parent, however it ends."""

import os
import subprocess
import sys
import threading
from pathlib import Path
from queue import SimpleQueue

# Becomes the program in its arguments, which is told to stop (SIGTERM) when the thread that started it ends.
BOUND_TO_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.getppid() == int(sys.argv[1]) or sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def start_bound(
    command: list[str], log: Path, *, folder: Path, pass_fds: tuple[int, ...] = ()
) -> subprocess.Popen[bytes]:
    """Returns a child process in `folder` that writes to `log`, hears no Ctrl-C and, on Linux, ends when we do.

    Linux signals the end of the THREAD that forked, not of the process: one waits here as long as the child runs.
    Raises OSError when it cannot be started.
    """
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", BOUND_TO_PARENT, str(os.getpid()), *command]
    started: SimpleQueue[subprocess.Popen[bytes] | OSError] = SimpleQueue()

    def run() -> None:
        try:
            with log.open("wb") as out:
                child = subprocess.Popen(
                    command,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=pass_fds,
                )
        except OSError as error:
            started.put(error)
            return
        started.put(child)
        child.wait()

    threading.Thread(target=run, name="bound-process", daemon=True).start()
    child = started.get()
    if isinstance(child, OSError):
        raise child
    return child
