"""A stream worker as a process that can be told where to die: `--die-after "6 save" --on-batch 2`."""

import os
import signal
from pathlib import Path

import click

from stream.worker import StreamWorker
from tailrace.settings import load_settings
from tailrace.stores import open_store


@click.command()
@click.option("--settings", "file", required=True, type=click.Path(path_type=Path))
@click.option("--partitions", required=True)
@click.option("--die-after", default="")
@click.option("--on-batch", default=1)
def main(file: Path, partitions: str, die_after: str, on_batch: int) -> None:
    """Runs a worker; kills this process (SIGKILL) as the named step of the given batch with records ends."""
    batches = 0
    folding = False

    def on_step(step: str) -> None:
        nonlocal batches, folding
        if step == "2 decode":  # only a batch with records comes here
            batches += 1
            folding = True
        if step == die_after and batches >= on_batch and (folding or step == "1 poll"):
            os.kill(os.getpid(), signal.SIGKILL)
        if step == "8 publish":
            folding = False

    settings = load_settings(file)
    store = open_store(settings)
    worker = StreamWorker(settings, [int(number) for number in partitions.split(",")], store, on_step=on_step)
    signal.signal(signal.SIGTERM, lambda *_: worker.stop())
    worker.run()
    store.close()


if __name__ == "__main__":
    main()
