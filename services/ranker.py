"""The ranker: one replica's tables, model and threads behind a few async methods. Knows nothing of Ray.

`app.build_app` deploys this class on Ray Serve. The event loop only hands work over: a request is ranked on a thread
of a small pool, which meets the other requests in the model's queues.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import msgspec
import numpy as np

from services.bodies import Asked, RankedAnswer
from services.candidates import nearest
from services.encodings import EncodedItems
from services.hot_swap import ModelSlot
from services.loaded_model import LoadedModel
from services.pages import SimilarItem
from services.recommender import TextModel, recommend
from services.scorer import EncodedUsers
from tailrace.catalogue import Catalogue
from tailrace.cosines import Floats
from tailrace.errors import NotReady, ScoringError, TooLate
from tailrace.ids import ItemId
from tailrace.registry import open_registry
from tailrace.settings import Settings
from tailrace.table_reader import TableReader
from tailrace.tastes import Answers
from tailrace.telemetry import configure_logging

_WARM_UP_S = 60.0
_WARM_UP_CANDIDATES = 50  # every graph has run and every user is encoded, in a quarter of a request's time
_asked_decoder = msgspec.msgpack.Decoder(Asked)
_encoder = msgspec.msgpack.Encoder()

Given = ParamSpec("Given")
Result = TypeVar("Result")


class _Watched:
    """A model as one request meets it: remembers whether the model itself has failed this request."""

    def __init__(self, model: LoadedModel) -> None:
        self.version, self.encodings, self.prior, self.failed = model.version, model.encodings, model.prior, False
        self._model = model

    def tag_worth(self, answers: Answers) -> Floats:
        return self._model.tag_worth(answers)

    def encode_user(self, text: str, deadline: float) -> EncodedUsers:
        return self._noting(self._model.encode_user, text, deadline)

    def embed(self, text: str, deadline: float) -> Floats:
        return self._noting(self._model.embed, text, deadline)

    def score(
        self, user: EncodedUsers, items: EncodedItems, features_NF: Floats, tag_worth_N: Floats, deadline: float
    ) -> tuple[Floats, Floats]:
        return self._noting(self._model.score, user, items, features_NF, tag_worth_N, deadline)

    def _noting(self, call: Callable[Given, Result], *given: Given.args, **named: Given.kwargs) -> Result:
        try:
            return call(*given, **named)
        except ScoringError:
            self.failed = True
            raise


class Ranker:
    """One replica. Starting it needs neither a broker nor a model; it says NotReady until it has both."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings)
        self._settings = settings
        self._catalogue = Catalogue()
        self.slot = ModelSlot(
            settings,
            open_registry(settings),
            self._catalogue,
            items_read=lambda: self._tables[0].caught_up,
            warm_up=self._warm_up,
        )
        self._tables = [
            TableReader(settings.kafka, "items", self._apply_item),
            TableReader(settings.kafka, "item-stats", self._catalogue.apply_stats),
            TableReader(settings.kafka, "models", self.slot.apply_announcement),
        ]
        self._pool = ThreadPoolExecutor(settings.ranker.max_ongoing_requests, thread_name_prefix="rank")
        for table in self._tables:
            table.start()
        self.slot.start()

    def wait(self, timeout_s: float) -> bool:
        """Returns whether a model serves, once the first has been loaded or refused, or after `timeout_s`."""
        return self.slot.wait(timeout_s)

    async def rank(self, asked: bytes) -> bytes:
        """Returns the encoded RankedAnswer to an encoded Asked. Raises NotReady, or TooLate where no time is left."""
        received = time.monotonic()
        answer = await asyncio.get_running_loop().run_in_executor(
            self._pool, self._rank, _asked_decoder.decode(asked), received
        )
        return _encoder.encode(answer)

    async def similar(self, item_id: ItemId, n: int) -> bytes:
        """Returns the encoded list of SimilarItem, nearest first. Raises NotReady, also before the item is encoded."""
        found = await asyncio.get_running_loop().run_in_executor(self._pool, self._similar, item_id, n)
        return _encoder.encode(found)

    async def status(self) -> bytes:
        """Returns the encoded ModelStatus."""
        return _encoder.encode(self.slot.status())

    def close(self) -> None:
        """Stops the replica's threads."""
        for table in self._tables:
            table.stop()
        self.slot.stop()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _rank(self, asked: Asked, received: float) -> RankedAnswer:
        with self.slot.lease(asked.request.user_id) as model:
            # Waiting for a thread has cost some of the budget.
            left_s = asked.budget_s - (time.monotonic() - received)
            if left_s <= 0:
                raise TooLate("the deadline passed while the request waited for a thread; nobody waits for it now")
            watched = _Watched(model)
            try:
                answer = self._recommend(msgspec.structs.replace(asked, budget_s=left_s), watched)
            except Exception:
                model.tally.note_no_answer()
                raise
            model.tally.note_answer(answer, failed=watched.failed)
            self.slot.note_request(asked)
            return msgspec.structs.replace(answer, waiting=model.waiting)

    def _recommend(self, asked: Asked, model: TextModel) -> RankedAnswer:
        return recommend(asked, self._catalogue, model, self._settings.ranker, self._settings.slate)

    def _warm_up(self, asked: Asked, model: LoadedModel) -> RankedAnswer:
        request = msgspec.structs.replace(asked.request, dry_run=False)  # the impression is made, and goes nowhere
        few = msgspec.structs.replace(self._settings.ranker, num_candidates=_WARM_UP_CANDIDATES)
        asked = msgspec.structs.replace(asked, request=request, budget_s=_WARM_UP_S)
        return recommend(asked, self._catalogue, model, few, self._settings.slate)

    def _similar(self, item_id: ItemId, n: int) -> list[SimilarItem]:
        with self.slot.lease() as model:
            row = self._catalogue.row(item_id)
            if row is None or not model.encodings.ready(np.array([row]))[0]:
                raise NotReady(f"item {item_id!r} is not encoded yet")
            vectors_RD = model.encodings.vectors
            live_rows = self._catalogue.live_rows()
            others_R = np.zeros(len(vectors_RD), dtype=np.bool_)
            others_R[live_rows[live_rows < len(others_R)]] = True
            others_R[row] = False
            best = nearest(vectors_RD, vectors_RD[row], others_R, n)
            items = zip(self._catalogue.items_at(best), (vectors_RD[best] @ vectors_RD[row]).tolist(), strict=True)
            return [
                SimilarItem(item_id=item.item_id, title=item.title, score=round(score, 4))
                for item, score in items
                if item is not None
            ]

    def _apply_item(self, item_id: str, value: bytes | None, at_ms: int) -> None:
        self._catalogue.apply_item(item_id, value, at_ms)
        self.slot.note_item()
