"""Structured logs, set up once per process. Secrets never reach them: settings are logged by section name only."""

import logging
import sys
from typing import TextIO

import structlog

from tailrace.settings import Settings


def configure_logging(settings: Settings, stream: TextIO | None = None) -> None:
    """Sends structured log lines to `stream` (standard error by default): text on a terminal, JSON elsewhere."""
    out = stream or sys.stderr
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if out.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[settings.log_level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(out),
    )
    # kafka-python tells of every reconnect through the standard library; only what matters belongs in our stream.
    logging.getLogger("kafka").setLevel(logging.CRITICAL)
