"""Ray as Tailrace starts it: a cluster that exists, or one of its own on loopback that ends with the caller."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import structlog
from ray._private import ray_constants

from tailrace.errors import TailraceError

log = structlog.get_logger()

NAMESPACE = "tailrace"
LOOPBACK = "127.0.0.1"
NICE = 10  # what trains gives way to what serves where they share cores
_OBJECT_STORE_BYTES = 200 * 2**20  # nothing large goes through it here
_ATTEMPTS = 3


@contextmanager
def ray_cluster(address: str | None = None, *, keep_logs: Path | None = None) -> Iterator[None]:
    """Joins the Ray cluster at `address`, or runs one on 127.0.0.1 while the block lasts.

    What the processes of its own wrote then comes to lie in `keep_logs`, in place of what lay there.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address is not None:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    # A processor-only machine: without this Ray warns that it will stop hiding the accelerators nobody has.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray runs every worker at nice 15. Ours are services, which answer before anything else; training gives way itself.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # A short path: Ray's sockets stand below it, and their names may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="tailrace-ray-", ignore_cleanup_errors=True) as folder:
        try:
            _keep_to_loopback()
            _start(folder)
            if ray.util.get_node_ip_address() != LOOPBACK:  # type: ignore[no-untyped-call]  # Ray leaves it untyped
                raise TailraceError("Ray would not keep to 127.0.0.1; a newer Ray may decide it elsewhere")
            yield
        finally:
            ray.shutdown()
            if keep_logs is not None:
                _keep(Path(folder) / "session_latest" / "logs", keep_logs)


def _keep(logs: Path, kept: Path) -> None:
    try:
        shutil.rmtree(kept, ignore_errors=True)
        shutil.copytree(logs, kept)
    except (OSError, shutil.Error) as error:  # a full disk, or Ray never came so far
        log.warning("the logs of Ray's processes could not be kept", error=str(error))


def _keep_to_loopback() -> None:
    """Makes the Ray that is started next listen on 127.0.0.1 alone.

    On Linux Ray puts the machine's own address in the place of any loopback address it is given, and listens on every
    interface, unless this switch is off; its name speaks of other systems, its effect is on all. Ray reads it when it
    is imported, so it is set both for this process and, in the environment, for those that Ray starts.
    """
    ray_constants.ENABLE_RAY_CLUSTER = False
    os.environ[ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"


def _start(folder: str) -> None:
    """Starts Ray, again where a busy machine was slower than the 30 s that Ray allows its own node."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            ray.init(
                num_cpus=max(os.cpu_count() or 1, 4),  # slots for actors that mostly wait, not a claim on cores
                include_dashboard=False,
                namespace=NAMESPACE,
                object_store_memory=_OBJECT_STORE_BYTES,
                log_to_driver=False,
                logging_level=logging.ERROR,
                _node_ip_address=LOOPBACK,
                _temp_dir=folder,
            )
            return
        except Exception as error:  # Ray raises a bare Exception when its node is late
            ray.shutdown()
            if attempt == _ATTEMPTS or "timed out during startup" not in str(error):
                raise
            log.warning("Ray was slow to start; once more", attempt=attempt)
