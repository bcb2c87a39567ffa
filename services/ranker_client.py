"""The gateway's way to the rankers: a Ray Serve handle, with its failures told in our words."""

import asyncio
from collections.abc import Awaitable
from typing import Any, Protocol

import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from services.bodies import ModelStatus
from services.pages import SimilarItem
from tailrace.errors import NotReady, Overloaded, TooLate
from tailrace.ids import ItemId

_similar_decoder = msgspec.msgpack.Decoder(list[SimilarItem])
_status_decoder = msgspec.msgpack.Decoder(ModelStatus)


class RankerClient(Protocol):
    """What the gateway asks of the rankers. Every call raises TooLate, Overloaded or NotReady."""

    async def rank(self, asked: bytes, timeout_s: float) -> bytes:
        """Returns the encoded RankedAnswer to an encoded Asked, from whichever replica is least busy."""

    async def similar(self, item_id: ItemId, n: int, timeout_s: float) -> list[SimilarItem]:
        """Returns the items nearest to one, nearest first; empty for an unknown item."""

    async def statuses(self, timeout_s: float) -> list[ModelStatus]:
        """Returns what each live replica has loaded."""


class ServeRankerClient:
    """Implements RankerClient over a Ray Serve deployment handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def rank(self, asked: bytes, timeout_s: float) -> bytes:
        """Returns the encoded RankedAnswer to an encoded Asked."""
        answer: bytes = await self._call(self._handle.rank.remote(asked), timeout_s)
        return answer

    async def similar(self, item_id: ItemId, n: int, timeout_s: float) -> list[SimilarItem]:
        """Returns the items nearest to one."""
        return _similar_decoder.decode(await self._call(self._handle.similar.remote(item_id, n), timeout_s))

    async def statuses(self, timeout_s: float) -> list[ModelStatus]:
        """Returns what each live replica has loaded."""
        found = await self._call(self._handle.broadcast("status").results_async(return_exceptions=True), timeout_s + 1)
        return [_status_decoder.decode(one) for one in found if isinstance(one, bytes)]

    async def _call(self, response: Awaitable[Any], timeout_s: float) -> Any:
        try:
            return await asyncio.wait_for(response, timeout_s)
        except TimeoutError:
            raise TooLate(f"no ranker answered within {timeout_s:.3f} s") from None
        except BackPressureError as error:
            raise Overloaded(error.message) from error
        except (RayServeException, RayError) as error:
            # What a replica raises comes wrapped, with its traceback for a message.
            cause = error.cause if isinstance(error, RayTaskError) else error
            if isinstance(cause, NotReady | Overloaded | TooLate):
                raise cause from None
            raise NotReady(f"no ranker: {type(cause).__name__}: {cause}") from error
