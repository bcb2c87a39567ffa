"""A slot of two models: who gets which, what is loaded when, and what becomes of bundles that are not sound."""

import gc
import json
import shutil
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from services.bodies import Asked, RankedAnswer, RecommendationRequest
from services.hot_swap import ModelSlot
from services.loaded_model import LoadedModel
from services.recommender import recommend
from services.scorer import Scorer
from tailrace.bundle import Bundle
from tailrace.catalogue import Catalogue
from tailrace.events import ModelAnnouncement, encode
from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
from tailrace.ids import ModelVersion, RequestId, UserId
from tailrace.items import Item
from tailrace.pointer import assigned_version
from tailrace.registry import Registry, open_registry
from tailrace.settings import Settings, load_settings
from tests.bundles import retouch_graph
from tests.fakes import Gate
from training.export import build_version_zero

NOW_MS = 1_790_000_000_000
USERS = [UserId(f"user-{number}") for number in range(40)]
V1, V2, V3 = ModelVersion("v1"), ModelVersion("v2"), ModelVersion("v3")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A version 0 on the features that serving makes."""
    folder = tmp_path_factory.mktemp("canary") / "bundle"
    build_version_zero(folder, version=V1, feature_names=FEATURE_NAMES, prior=PRIOR_WEIGHTS, precisions=("int8",))
    (folder / "weights.safetensors").unlink()  # for training alone, and most of what would be copied
    return folder


class Place:
    """A registry, a catalogue of 40 items, and one slot on them, which is told of every move."""

    def __init__(self, folder: Path, bundle: Path) -> None:
        self.settings: Settings = load_settings(None, {}, data_dir=str(folder))
        self.registry: Registry = open_registry(self.settings)
        self.bundle = bundle
        self.catalogue = Catalogue()
        for number in range(40):
            self.announce_item(f"i{number}", f"Book number {number} of ships and ghosts")
        self.loads: list[ModelVersion] = []
        self.before_load: Callable[[ModelVersion], None] = lambda version: None
        self.slot = ModelSlot(
            self.settings,
            self.registry,
            self.catalogue,
            load=self._load,
            items_read=lambda: True,
            warm_up=lambda asked, model: self._recommend(asked, model),
        )

    def start(self) -> None:
        """With `v1` as the champion, and `v2` published."""
        for version in (V1, V2):
            self.registry.publish(self.bundle, version=version)
        self.registry.promote(V1)
        assert self.slot.start().wait(30)

    def announce_item(self, item_id: str, title: str) -> None:
        self.catalogue.apply_item(item_id, encode(Item(item_id=item_id, title=title)), NOW_MS)

    def tell(self, announcement: ModelAnnouncement) -> None:
        self.slot.apply_announcement("pointer", encode(announcement), NOW_MS)

    def ask(self, user_id: UserId) -> RankedAnswer:
        request = RecommendationRequest(user_id=user_id, dry_run=True)
        asked = Asked(request_id=RequestId(uuid4().hex), request=request, profile=None, now_ms=NOW_MS, budget_s=10.0)
        with self.slot.lease(user_id) as model:
            return self._recommend(asked, model)

    def served(self) -> dict[UserId, ModelVersion]:
        """Which version serves each user, without asking it anything."""
        found = {}
        for user_id in USERS:
            with self.slot.lease(user_id) as model:
                found[user_id] = model.version
        return found

    def held(self, version: ModelVersion) -> "weakref.ref[LoadedModel]":
        """A reference to the loaded model of a version that does not keep it."""
        for user_id in USERS:
            with self.slot.lease(user_id) as model:
                if model.version == version:
                    return weakref.ref(model)
        raise AssertionError(f"{version} serves nobody")

    def _load(self, bundle: Bundle, version: ModelVersion, *rest: Any) -> LoadedModel:
        self.loads.append(version)
        self.before_load(version)
        return LoadedModel.open(bundle, version, *rest)

    def _recommend(self, asked: Asked, model: LoadedModel) -> RankedAnswer:
        asked = msgspec.structs.replace(asked, budget_s=30.0)
        return recommend(asked, self.catalogue, model, self.settings.ranker, self.settings.slate)


@pytest.fixture
def place(tmp_path: Path, bundle: Path) -> Iterator[Place]:
    found = Place(tmp_path, bundle)
    yield found
    found.slot.stop()


def wait_until(good: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not good():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def test_canary_serves_the_users_of_its_share_and_both_models_know_new_items(place: Place) -> None:
    place.start()
    place.tell(place.registry.start_canary(V2, 0.4))
    wait_until(lambda: place.slot.status().canary == V2)
    pointer = place.registry.pointer()
    assert pointer is not None
    assert place.served() == {user_id: assigned_version(user_id, pointer) for user_id in USERS}
    assert set(place.served().values()) == {V1, V2}
    with place.slot.lease() as model:
        assert model.version == V1  # for what is asked of no user
    for user_id, version in list(place.served().items())[:6]:
        answer = place.ask(user_id)
        assert (answer.model_version, answer.degraded) == (version, "none")

    place.announce_item("new", "A new book of whales")
    place.slot.note_item()
    wait_until(lambda: (place.slot.status().items, place.slot.status().pending) == (41, 0))
    status = place.slot.status()
    assert (status.serving, status.canary, status.refused, status.swaps) == (V1, V2, {}, 1)


def test_promoted_canary_is_not_loaded_again_and_the_old_champion_is_freed(place: Place) -> None:
    place.start()
    place.tell(place.registry.start_canary(V2, 0.5))
    wait_until(lambda: place.slot.status().canary == V2)
    place.ask(USERS[0])
    champion, canary = place.held(V1), place.held(V2)
    gc.disable()  # whatever is not freed by itself would wait for a collection that may not come for long
    try:
        place.tell(place.registry.promote(V2))
        wait_until(lambda: place.slot.status().serving == V2)
        assert set(place.served().values()) == {V2}
        wait_until(lambda: champion() is None)
    finally:
        gc.enable()
    assert canary() is place.held(V2)() is not None
    assert place.loads == [V1, V2]
    assert (place.slot.status().canary, place.slot.status().swaps) == (None, 2)


def test_canary_rolled_back_leaves_at_once_but_finishes_what_it_has_begun(place: Place) -> None:
    place.start()
    place.tell(place.registry.start_canary(V2, 0.5))
    wait_until(lambda: place.slot.status().canary == V2)
    user_id = next(user_id for user_id, version in place.served().items() if version == V2)
    canary = place.held(V2)
    with place.slot.lease(user_id) as held:
        place.tell(place.registry.rollback())
        wait_until(lambda: place.slot.status().canary is None)
        assert place.ask(user_id).model_version == V1
        assert held.version == V2 and held.encode_user("still here", time.monotonic() + 10).keys.size
    del held
    wait_until(lambda: canary() is None)
    assert place.loads == [V1, V2]


def test_another_share_moves_users_without_a_load(place: Place) -> None:
    place.start()
    place.tell(place.registry.start_canary(V2, 0.2))
    wait_until(lambda: place.slot.status().canary == V2)
    few = {user_id for user_id, version in place.served().items() if version == V2}
    place.tell(place.registry.start_canary(V2, 0.8))
    wait_until(lambda: sum(version == V2 for version in place.served().values()) > 20)
    assert few < {user_id for user_id, version in place.served().items() if version == V2}
    assert place.loads == [V1, V2]


def test_canary_that_is_rolled_back_while_it_loads_never_serves(place: Place) -> None:
    place.start()
    gate = Gate()
    place.before_load = lambda version: gate.wait()
    place.tell(place.registry.start_canary(V2, 0.5))
    assert gate.reached.wait(10)
    place.tell(place.registry.rollback())
    gate.open()
    wait_until(lambda: place.slot.status().loading is None)
    # The next move is followed after that one: once it is, the canary's turn has passed.
    place.registry.publish(place.bundle, version=V3)
    place.tell(place.registry.promote(V3))
    wait_until(lambda: place.slot.status().serving == V3)
    status = place.slot.status()
    assert V2 not in status.versions and status.canary is None and status.refused == {}


def test_slot_that_starts_while_a_canary_runs_serves_both(place: Place) -> None:
    for version in (V1, V2):
        place.registry.publish(place.bundle, version=version)
    place.registry.promote(V1)
    place.registry.start_canary(V2, 0.5)  # and nothing announced
    assert place.slot.start().wait(30)
    wait_until(lambda: place.slot.status().canary == V2)
    assert place.loads == [V1, V2]


# -- bundles that are not sound ------------------------------------------------------------------------------------


def _nan_weights(folder: Path) -> None:
    path = folder / "int8" / "scorer.onnx"
    model = onnx.load(path)
    weights = next(one for one in model.graph.initializer if one.data_type == onnx.TensorProto.FLOAT and one.dims)
    poisoned = np.full(tuple(weights.dims), np.nan, np.float32)
    weights.CopyFrom(numpy_helper.from_array(poisoned, weights.name))
    onnx.save(model, path)


def _nan_encoder(folder: Path) -> None:
    path = folder / "int8" / "item_encoder.onnx"
    model = onnx.load(path, load_external_data=False)
    for weights in model.graph.initializer:
        if weights.data_type == onnx.TensorProto.FLOAT and not weights.external_data and len(weights.dims) == 1:
            poisoned = np.full(tuple(weights.dims), np.nan, np.float32)
            weights.CopyFrom(numpy_helper.from_array(poisoned, weights.name))
    onnx.save(model, path)


def _wrong_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"] for token in tokenizer["added_tokens"]}
    vocab = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {word: at if word in special else at + 1_000_000 for word, at in vocab.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _other_features(folder: Path) -> None:
    card = json.loads((folder / "model.json").read_text())
    card["feature_names"] = ["something_else"]
    (folder / "model.json").write_text(json.dumps(card))


def _truncated(folder: Path) -> None:
    path = folder / "int8" / "scorer.onnx"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _no_model_at_all(folder: Path) -> None:
    (folder / "int8" / "user_encoder.onnx").write_bytes(b"not a graph")


POISONS = {
    "NaN weights": (_nan_weights, "not finite"),
    "NaN in the item encoder": (_nan_encoder, "not finite"),
    "wrong tokenizer": (_wrong_tokenizer, "encoding items failed"),
    "other features": (_other_features, "other features"),
    "truncated file": (_truncated, "scorer.onnx"),
    "no graph": (_no_model_at_all, "user_encoder.onnx"),
}


@pytest.mark.parametrize(
    ("name", "as_canary"), [*((name, True) for name in POISONS), ("NaN weights", False), ("wrong tokenizer", False)]
)
def test_unsound_bundle_leaves_everyone_on_the_champion_and_says_why(
    place: Place, tmp_path: Path, name: str, as_canary: bool
) -> None:
    poison, why = POISONS[name]
    place.start()
    folder = tmp_path / "poisoned"
    shutil.copytree(place.bundle, folder)
    poison(folder)
    place.registry.publish(folder, version=V3)  # its sums are right: it was made so
    place.tell(place.registry.start_canary(V3, 0.5) if as_canary else place.registry.promote(V3))
    wait_until(lambda: V3 in place.slot.status().refused)
    status = place.slot.status()
    assert why in status.refused[V3]
    assert (status.serving, status.canary) == (V1, None)
    assert set(place.served().values()) == {V1}
    assert place.ask(USERS[0]).degraded == "none"
    # A sound version is taken up after it as if nothing had been.
    place.tell(place.registry.rollback())
    place.tell(place.registry.start_canary(V2, 0.5))
    wait_until(lambda: place.slot.status().canary == V2)


@pytest.fixture
def retouched(tmp_path: Path, bundle: Path) -> Callable[[str], Path]:
    """Makes a bundle with one graph of its own; all else is as in `bundle`."""
    return lambda name: retouch_graph(bundle, tmp_path / f"other-{name}", name)


def test_canary_damaged_after_it_was_published_is_refused(place: Place, retouched: Callable[[str], Path]) -> None:
    place.start()
    place.registry.publish(retouched("scorer"), version=V3)
    announcement = place.registry.start_canary(V3, 0.5)
    path = Path(place.registry.url) / "bundles" / V3 / "int8" / "scorer.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    place.tell(announcement)
    wait_until(lambda: V3 in place.slot.status().refused)
    assert "scorer.onnx" in place.slot.status().refused[V3]
    assert set(place.served().values()) == {V1}


# -- what two versions have in common ------------------------------------------------------------------------------


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The graphs that sessions were created of, in turn."""
    found: list[str] = []
    create = onnxruntime.InferenceSession.__init__

    def noted(session: Any, path: Path, *args: Any, **options: Any) -> None:
        found.append(path.stem)
        create(session, path, *args, **options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "__init__", noted)
    return found


def test_swap_to_a_version_that_embeds_alike_opens_only_what_ranks_and_encodes_no_item(
    place: Place, retouched: Callable[[str], Path], opened: list[str]
) -> None:
    place.start()
    assert sorted(opened) == ["item_encoder", "scorer", "user_encoder"]
    with place.slot.lease() as model:
        before = model.encodings
    opened.clear()
    place.registry.publish(retouched("scorer"), version=V3)
    announcement = place.registry.promote(V3)
    # What is shared is not even read: now it cannot be.
    (Path(place.registry.url) / "bundles" / V3 / "int8" / "item_encoder.onnx").unlink()
    place.tell(announcement)
    wait_until(lambda: place.slot.status().serving == V3)
    assert opened == ["scorer"]
    with place.slot.lease() as model:
        assert model.encodings is before
    assert place.ask(USERS[0]).degraded == "none"

    place.announce_item("new", "A new book of whales")
    place.slot.note_item()
    wait_until(lambda: (place.slot.status().items, place.slot.status().pending) == (41, 0))


@pytest.mark.parametrize(("changed", "anew"), [("scorer", 0), ("user_encoder", 1)])
def test_swap_encodes_users_anew_only_where_their_encoder_differs(
    place: Place, retouched: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, changed: str, anew: int
) -> None:
    place.start()
    with place.slot.lease() as model:
        before = model.encode_user("loved: ghosts", time.monotonic() + 30)
    place.registry.publish(retouched(changed), version=V3)
    place.tell(place.registry.promote(V3))
    wait_until(lambda: place.slot.status().serving == V3)
    told: list[str] = []
    encode_users = Scorer.encode_users
    monkeypatch.setattr(Scorer, "encode_users", lambda self, texts: told.extend(texts) or encode_users(self, texts))
    with place.slot.lease() as model:
        after = model.encode_user("loved: ghosts", time.monotonic() + 30)
    assert told == ["loved: ghosts"] * anew
    assert (after is before) == (not anew)


def test_swap_to_a_version_whose_item_encoder_differs_encodes_every_item_anew(
    place: Place, retouched: Callable[[str], Path], opened: list[str]
) -> None:
    place.start()
    with place.slot.lease() as model:
        before = model.encodings
    opened.clear()
    place.registry.publish(retouched("item_encoder"), version=V3)
    place.tell(place.registry.promote(V3))
    wait_until(lambda: place.slot.status().serving == V3)
    assert opened == ["item_encoder"]
    with place.slot.lease() as model:
        assert model.encodings is not before
        assert model.encodings.num_ready == 40


def test_what_no_version_uses_any_more_is_let_go(place: Place, retouched: Callable[[str], Path]) -> None:
    place.start()
    with place.slot.lease() as model:
        encodings = weakref.ref(model.encodings)
    del model
    place.registry.publish(retouched("item_encoder"), version=V3)
    place.tell(place.registry.promote(V3))
    wait_until(lambda: place.slot.status().serving == V3)
    wait_until(lambda: encodings() is None)
