"""The jars of Apache Kafka: fetched once, checked against `kafka.lock` before every use.

The lock is a plain `sha256sum` list in the layout of a Maven repository, so `sha256sum -c` can read it there.
It names every jar, so nothing is resolved when fetching. `python -m stream.kafka_jars` prints a new one.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tailrace.errors import BrokerUnavailable

# log4j-slf4j-impl would be the obvious logger, but its parent POM pulls kafka-clients down to 3.9.1.
COORDINATES = "org.apache.kafka:kafka_2.13:4.3.1+org.slf4j:slf4j-simple:1.7.36"
LOCK = Path(__file__).with_name("kafka.lock")
FETCHES_AT_ONCE = 8


def user_cache() -> Path:
    """Returns the folder that every checkout of this user shares, so that Kafka is fetched once."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tailrace"


def kafka_class_path(cache_dir: Path, *, lock: Path = LOCK) -> str:
    """Returns the Java class path of Apache Kafka: that of `KAFKA_HOME` where set, else of the locked jars.

    Raises BrokerUnavailable when `KAFKA_HOME` holds no Kafka, a jar differs from the lock, or it cannot be fetched.
    """
    if home := os.environ.get("KAFKA_HOME"):
        if not any(Path(home, "libs").glob("kafka_*.jar")):
            raise BrokerUnavailable(f"KAFKA_HOME is {home}, but no kafka_*.jar is in its folder libs")
        return str(Path(home, "libs", "*").absolute())
    return os.pathsep.join(str(jar) for jar in ensure_kafka(cache_dir.absolute(), lock=lock))


def ensure_kafka(cache_dir: Path, *, lock: Path = LOCK) -> list[Path]:
    """Returns the jars named in `lock`, each with the right checksum, fetched through jgo when `cache_dir` has none.

    Raises BrokerUnavailable naming the first jar that differs, or what to do when they cannot be fetched.
    """
    sums = read_lock(lock)
    folder = cache_dir / Path(next(iter(sums))).stem
    if not folder.exists():
        _fetch(sums, folder)
    for path, expected in sums.items():
        jar = folder / Path(path).name
        if not jar.exists() or _sha256(jar) != expected:
            state = "does not have the checksum in kafka.lock" if jar.exists() else "is missing"
            raise BrokerUnavailable(f"{jar} {state}; remove the folder {folder} and start again to fetch it anew")
    return [folder / Path(path).name for path in sums]


def read_lock(lock: Path) -> dict[str, str]:
    """Returns SHA-256 (hex) by path inside a Maven repository, in class path order."""
    lines = [line.split() for line in lock.read_text().splitlines() if line and not line.startswith("#")]
    return {path: sha256 for sha256, path in lines}


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _fetch(sums: Mapping[str, str], folder: Path) -> None:
    """Fills `folder` with the jars: beside it first, checked, then renamed, so it is either whole or absent."""
    try:
        from jgo.constants import default_maven_repo
        from jgo.maven import MavenContext
    except ImportError as error:
        raise BrokerUnavailable(
            _cannot_fetch("the package jgo is not installed (`pip install tailrace[demo]`)")
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    bar = (TextColumn("Fetching Apache Kafka"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="fetching-", dir=folder.parent) as scratch,
        Progress(*bar, console=Console(stderr=True), transient=True) as progress,
        ThreadPoolExecutor(FETCHES_AT_ONCE) as pool,
    ):
        context = MavenContext(repo_cache=Path(scratch, "repository"))
        (whole := Path(scratch, "jars")).mkdir()

        def fetch(path: str) -> None:
            jar = default_maven_repo() / path
            if not jar.exists() or _sha256(jar) != sums[path]:
                *group, name, version, _ = path.split("/")
                jar = context.project(".".join(group), name).at_version(version).artifact().resolve()
            if _sha256(jar) != sums[path]:
                raise BrokerUnavailable(
                    f"{path} came with another checksum than the one in kafka.lock; nothing was kept"
                )
            shutil.copyfile(jar, whole / jar.name)

        try:
            for _ in progress.track(pool.map(fetch, sums), total=len(sums)):
                pass
        except (OSError, RuntimeError) as error:
            raise BrokerUnavailable(_cannot_fetch(str(error))) from error
        finally:
            pool.shutdown(cancel_futures=True)
        try:
            whole.rename(folder)
        except OSError:
            if not folder.exists():  # another process was first, and checked the same sums
                raise


def _cannot_fetch(reason: str) -> str:
    return (
        f"Apache Kafka could not be fetched: {reason}\nEither point `kafka.bootstrap_servers` at a running cluster, "
        "or set KAFKA_HOME to an unpacked Apache Kafka 4 (its libs folder is used), or fetch the coordinates "
        f"{COORDINATES} into the local Maven repository where the network allows it."
    )


def resolve_lock() -> str:
    """Returns the text of a new lock: what COORDINATES resolve to today, through jgo and the network."""
    import jgo
    from jgo.constants import default_maven_repo

    jars = [artifact.resolve() for artifact in jgo.resolve(COORDINATES)]

    head = f"# {COORDINATES}\n# made by `python -m stream.kafka_jars`; `sha256sum -c` reads it in a Maven repository\n"
    return head + "".join(f"{_sha256(jar)}  {jar.relative_to(default_maven_repo()).as_posix()}\n" for jar in jars)


if __name__ == "__main__":
    print(resolve_lock(), end="")
