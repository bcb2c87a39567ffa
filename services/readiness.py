"""Whether a gateway replica can do its work in full, and if not, which part is missing."""

import asyncio
import socket
from typing import TYPE_CHECKING

from services.problem import FieldError
from tailrace.errors import NotReady, Overloaded, StoreError, TooLate

if TYPE_CHECKING:
    from services.gateway import GatewayParts

_TIMEOUT_S = 1.0


async def check_readiness(parts: "GatewayParts") -> list[FieldError]:
    """Returns what is missing, named: tables, model, broker, store. Empty when the replica is ready."""
    found = await asyncio.gather(_tables(parts), _model(parts), _broker(parts), _store(parts))
    return [row for row in found if row is not None]


async def _tables(parts: "GatewayParts") -> FieldError | None:
    unread = [table.role for table in parts.tables if not table.caught_up]
    return FieldError("tables", f"not read yet: {', '.join(unread)}") if unread else None


async def _model(parts: "GatewayParts") -> FieldError | None:
    try:
        statuses = await parts.ranker.statuses(_TIMEOUT_S)
    except (NotReady, Overloaded, TooLate) as error:
        return FieldError("model", str(error))
    if any(status.serving is not None for status in statuses):
        return None
    refused = "; ".join(f"{version}: {why}" for status in statuses for version, why in status.refused.items())
    return FieldError("model", refused or "no ranker replica has loaded one")


async def _broker(parts: "GatewayParts") -> FieldError | None:
    servers = parts.settings.kafka.bootstrap_servers
    if not parts.event_log.connected:
        return FieldError("broker", f"Kafka at {servers or '(not set)'} has not answered yet")
    reachable = await asyncio.gather(*(asyncio.to_thread(_answers, server) for server in servers.split(",")))
    return None if any(reachable) else FieldError("broker", f"nothing listens at {servers}")


async def _store(parts: "GatewayParts") -> FieldError | None:
    try:
        await parts.profiles.check(_TIMEOUT_S)
    except StoreError as error:
        return FieldError("store", str(error))
    return None


def _answers(server: str) -> bool:
    host, _, port = server.strip().rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT_S):
            return True
    except (OSError, ValueError):
        return False
