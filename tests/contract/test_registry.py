"""What every registry promises, on a local folder and on an object-store-like filesystem alike."""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
import msgspec
import pytest

from tailrace.bundle import FileEntry
from tailrace.errors import BundleError, Pinned
from tailrace.ids import ModelVersion
from tailrace.pointer import Pointer
from tailrace.registry import Registry

CARD = {
    "base_model": "tiny",
    "split_layer": 3,
    "item_states": 4,
    "feature_names_hash": "abc",
    "text_version": 1,
    "precisions": ["int8", "fp16"],
    "max_user_tokens": 96,
}
V1, V2, V3 = ModelVersion("v1"), ModelVersion("v2"), ModelVersion("v3")


@dataclass
class Place:
    """A registry, a bundle to publish, a cache, and a way to meddle with what is stored."""

    registry: Registry
    source: Path
    cache: Path
    files: Any
    root: str

    def write(self, path: str, data: bytes) -> None:
        self.files.pipe_file(f"{self.root}/{path}", data)

    def read(self, path: str) -> bytes:
        return bytes(self.files.cat_file(f"{self.root}/{path}"))

    def remove(self, path: str) -> None:
        self.files.rm(f"{self.root}/{path}")


@pytest.fixture(params=["folder", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    url = str(tmp_path / "registry") if request.param == "folder" else f"memory://{uuid.uuid4().hex}/models"
    source = tmp_path / "source"
    (source / "tokenizer").mkdir(parents=True)
    (source / "model.json").write_bytes(msgspec.json.encode(CARD))
    (source / "ranker.onnx").write_bytes(bytes(range(256)) * 20)
    (source / "tokenizer" / "vocab.txt").write_text("one\ntwo\n")
    files, root = fsspec.core.url_to_fs(url)
    return Place(Registry(url), source, tmp_path / "cache", files, str(root).rstrip("/"))


def test_published_bundle_is_listed_and_fetched_whole(place: Place) -> None:
    manifest = place.registry.publish(place.source, version=V1, parent=V2, metrics={"auc": 0.64})
    assert place.registry.versions() == [V1]
    assert place.registry.manifest(V1) == manifest
    assert (manifest.parent, manifest.metrics, manifest.model.precisions) == (V2, {"auc": 0.64}, ["int8", "fp16"])
    assert sorted(manifest.files) == ["model.json", "ranker.onnx", "tokenizer/vocab.txt"]
    for _ in range(2):  # the second time from the cache, where there is one
        folder = place.registry.fetch(V1, place.cache)
        for name in manifest.files:
            assert (folder / name).read_bytes() == (place.source / name).read_bytes()


def test_local_folder_is_used_in_place_and_a_remote_one_is_cached(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    folder = place.registry.fetch(V1, place.cache)
    local = not place.registry.url.startswith("memory")
    assert folder == (Path(place.root) / "bundles" / V1 if local else place.cache / V1)
    assert [path.name for path in place.cache.glob("*")] == ([] if local else [V1])


def test_published_version_never_changes(place: Place) -> None:
    before = place.registry.publish(place.source, version=V1)
    with pytest.raises(BundleError, match="v1 exists"):
        place.registry.publish(place.source, version=V1)
    assert place.registry.manifest(V1) == before


@pytest.mark.parametrize("version", ["", "../v1", "a/b", ".hidden", "x" * 129])
def test_version_that_is_no_plain_name_is_refused(place: Place, version: str) -> None:
    with pytest.raises(BundleError, match="is no version"):
        place.registry.publish(place.source, version=ModelVersion(version))


def test_folder_without_a_model_card_is_not_published(place: Place) -> None:
    (place.source / "model.json").unlink()
    with pytest.raises(BundleError, match=r"no model\.json"):
        place.registry.publish(place.source, version=V1)
    (place.source / "model.json").write_text('{"base_model": "tiny"}')
    with pytest.raises(BundleError, match="split_layer"):
        place.registry.publish(place.source, version=V1)
    assert place.registry.versions() == []


def test_folder_without_a_manifest_is_no_bundle(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    place.remove("bundles/v1/manifest.json")
    assert place.registry.versions() == []
    for ask in (lambda: place.registry.fetch(V1, place.cache), lambda: place.registry.promote(V1)):
        with pytest.raises(BundleError, match="no bundle v1"):
            ask()


def _truncate(place: Place) -> None:
    place.write("bundles/v1/ranker.onnx", place.read("bundles/v1/ranker.onnx")[:-1])


def _flip_bit(place: Place) -> None:
    data = bytearray(place.read("bundles/v1/ranker.onnx"))
    data[100] ^= 1
    place.write("bundles/v1/ranker.onnx", bytes(data))


def _lose(place: Place) -> None:
    place.remove("bundles/v1/ranker.onnx")


def _add(place: Place) -> None:
    place.write("bundles/v1/extra.onnx", b"not ours")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (_truncate, r"ranker\.onnx has 5119 bytes, published with 5120"),
        (_flip_bit, r"ranker\.onnx does not have the sum"),
        (_lose, r"ranker\.onnx is missing"),
        (_add, r"extra\.onnx is not in its manifest"),
    ],
)
def test_damaged_bundle_is_refused_naming_the_file_and_nothing_unsound_is_left_in_the_cache(
    place: Place, damage: Callable[[Place], None], found: str
) -> None:
    place.registry.publish(place.source, version=V1)
    damage(place)
    with pytest.raises(BundleError, match=found):
        place.registry.fetch(V1, place.cache)
    left = [path for path in place.cache.rglob("*") if path.is_file()]
    assert all(path.read_bytes() == (place.source / path.name).read_bytes() for path in left)
    assert "ranker.onnx" not in {path.name for path in left}


def test_file_that_is_not_asked_for_is_neither_checked_nor_downloaded(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    _flip_bit(place)
    bundle = place.registry.open(V1, place.cache)
    assert bundle.file("model.json").read_bytes() == (place.source / "model.json").read_bytes()
    assert [path.name for path in place.cache.rglob("*.onnx")] == []
    with pytest.raises(BundleError, match=r"ranker\.onnx does not have the sum"):
        bundle.file("ranker.onnx")
    with pytest.raises(BundleError, match=r"nothing\.onnx is missing"):
        bundle.file("nothing.onnx")


def test_damaged_manifest_is_refused(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    good = json.loads(place.read("bundles/v1/manifest.json"))
    place.write("bundles/v1/manifest.json", b'{"version": "v1", ')
    with pytest.raises(BundleError, match="damaged"):
        place.registry.manifest(V1)
    outside = good | {"files": {"../../etc/passwd": {"sha256": "0", "bytes": 1}}}
    place.write("bundles/v1/manifest.json", json.dumps(outside).encode())
    with pytest.raises(BundleError, match="outside the bundle"):
        place.registry.fetch(V1, place.cache)
    place.write("bundles/v1/manifest.json", json.dumps(good | {"version": "v2"}).encode())
    with pytest.raises(BundleError, match="is of version v2"):
        place.registry.manifest(V1)


def test_rotten_copy_in_the_cache_is_fetched_anew(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    folder = place.registry.fetch(V1, place.cache)
    if folder == place.cache / V1:
        (folder / "ranker.onnx").write_bytes(b"rot")
    again = place.registry.fetch(V1, place.cache)
    assert (again / "ranker.onnx").read_bytes() == (place.source / "ranker.onnx").read_bytes()


def test_promotions_and_rollbacks_walk_one_history(place: Place) -> None:
    registry = place.registry
    for version in (V1, V2, V3):
        registry.publish(place.source, version=version)
    assert registry.pointer() is None

    said = [registry.promote(V1), registry.promote(V2), registry.promote(V3), registry.rollback(), registry.rollback()]
    assert [(one.version, one.previous, one.reason) for one in said] == [
        (V1, None, "promote"),
        (V2, V1, "promote"),
        (V3, V2, "promote"),
        (V2, V3, "rollback"),
        (V1, V2, "rollback"),
    ]
    pointer = registry.pointer()
    assert pointer is not None
    assert (pointer.champion, pointer.history, pointer.generation) == (V1, [], 5)
    with pytest.raises(BundleError, match="first champion"):
        registry.rollback()
    assert registry.promote(V3).previous == V1


def test_promoting_the_champion_again_only_announces_again(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    first = place.registry.promote(V1)
    pointer = place.registry.pointer()
    assert place.registry.promote(V1) == first
    assert place.registry.pointer() == pointer


def test_unknown_version_is_not_promoted(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    with pytest.raises(BundleError, match=r"no bundle v9 .*there: v1"):
        place.registry.promote(ModelVersion("v9"))
    assert place.registry.pointer() is None


def test_rollback_with_nothing_promoted_says_so(place: Place) -> None:
    with pytest.raises(BundleError, match="nothing was ever promoted"):
        place.registry.rollback()


def test_truncated_bundle_is_not_promoted_and_the_champion_stays(place: Place) -> None:
    place.registry.publish(place.source, version=V2)
    place.registry.promote(V2)
    place.registry.publish(place.source, version=V1)
    _truncate(place)
    with pytest.raises(BundleError, match=r"ranker\.onnx has 5119 bytes"):
        place.registry.promote(V1)
    pointer = place.registry.pointer()
    assert pointer is not None
    assert pointer.champion == V2


def test_rollback_to_a_bundle_that_is_gone_is_refused(place: Place) -> None:
    for version in (V1, V2):
        place.registry.publish(place.source, version=version)
        place.registry.promote(version)
    place.remove("bundles/v1/manifest.json")
    with pytest.raises(BundleError, match="no bundle v1"):
        place.registry.rollback()
    pointer = place.registry.pointer()
    assert pointer is not None
    assert pointer.champion == V2


# -- canary and pin ------------------------------------------------------------------------------------------------


def publish_all(place: Place) -> Registry:
    """Three versions, the first of which is the champion."""
    for version in (V1, V2, V3):
        place.registry.publish(place.source, version=version)
    place.registry.promote(V1)
    return place.registry


def pointer_of(registry: Registry) -> Pointer:
    pointer = registry.pointer()
    assert pointer is not None
    return pointer


def test_canary_serves_a_share_beside_the_champion_and_becomes_champion_when_promoted(place: Place) -> None:
    registry = publish_all(place)
    said = registry.start_canary(V2, 0.2)
    assert (said.version, said.reason, said.canary, said.canary_share) == (V1, "canary", V2, 0.2)
    pointer = pointer_of(registry)
    assert (pointer.champion, pointer.canary, pointer.canary_share, pointer.history) == (V1, V2, 0.2, [])
    said = registry.promote(V2)
    assert (said.version, said.previous, said.reason, said.canary) == (V2, V1, "promote", None)
    pointer = pointer_of(registry)
    assert (pointer.champion, pointer.canary, pointer.canary_share, pointer.history) == (V2, None, 0.0, [V1])
    assert pointer.generation == 3


def test_rollback_ends_the_canary_first_and_the_champion_next(place: Place) -> None:
    registry = publish_all(place)
    registry.promote(V2)
    registry.start_canary(V3, 0.5)
    said = registry.rollback()
    assert (said.version, said.reason, said.canary, said.canary_share) == (V2, "rollback", None, 0.0)
    assert (pointer_of(registry).champion, pointer_of(registry).canary, pointer_of(registry).history) == (
        V2,
        None,
        [V1],
    )
    said = registry.rollback()
    assert (said.version, said.previous) == (V1, V2)
    assert (pointer_of(registry).champion, pointer_of(registry).history) == (V1, [])


def test_promoting_a_third_version_ends_the_canary(place: Place) -> None:
    registry = publish_all(place)
    registry.start_canary(V2, 0.2)
    registry.promote(V3)
    pointer = pointer_of(registry)
    assert (pointer.champion, pointer.canary, pointer.canary_share, pointer.history) == (V3, None, 0.0, [V1])


def test_promoting_the_champion_again_announces_its_canary_again(place: Place) -> None:
    registry = publish_all(place)
    first = registry.start_canary(V2, 0.2)
    assert registry.promote(V1) == first == registry.start_canary(V2, 0.2)
    assert pointer_of(registry).generation == 2


def test_a_canary_is_widened_but_never_replaced(place: Place) -> None:
    registry = publish_all(place)
    registry.start_canary(V2, 0.2)
    assert registry.start_canary(V2, 0.5).canary_share == 0.5
    with pytest.raises(BundleError, match="v2 is the canary: promote it or roll it back first"):
        registry.start_canary(V3, 0.2)
    assert (pointer_of(registry).canary, pointer_of(registry).canary_share) == (V2, 0.5)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_a_share_of_none_or_all_is_no_canary(place: Place, share: float) -> None:
    registry = publish_all(place)
    with pytest.raises(ValueError, match="above 0 and below 1"):
        registry.start_canary(V2, share)
    assert pointer_of(registry).generation == 1


def test_champion_unknown_and_first_version_are_no_canaries(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    with pytest.raises(BundleError, match="nothing was ever promoted"):
        place.registry.start_canary(V1, 0.2)
    place.registry.promote(V1)
    with pytest.raises(BundleError, match="v1 is the champion"):
        place.registry.start_canary(V1, 0.2)
    with pytest.raises(BundleError, match="no bundle v9"):
        place.registry.start_canary(ModelVersion("v9"), 0.2)
    assert pointer_of(place.registry).generation == 1


def test_truncated_bundle_is_no_canary(place: Place) -> None:
    place.registry.publish(place.source, version=V2)
    place.registry.promote(V2)
    place.registry.publish(place.source, version=V1)
    _truncate(place)
    with pytest.raises(BundleError, match=r"ranker\.onnx has 5119 bytes"):
        place.registry.start_canary(V1, 0.2)
    assert pointer_of(place.registry).canary is None


def test_pinned_version_serves_and_refuses_promotions_and_canaries_until_it_is_unpinned(place: Place) -> None:
    registry = publish_all(place)
    registry.start_canary(V3, 0.2)
    said = registry.pin(V2)
    assert (said.version, said.previous, said.reason, said.canary) == (V2, V1, "pin", None)
    pointer = pointer_of(registry)
    assert (pointer.champion, pointer.pinned, pointer.canary, pointer.history) == (V2, True, None, [V1])
    assert registry.pin(V2) == said == registry.promote(V2)
    for refused in (lambda: registry.promote(V3), lambda: registry.start_canary(V3, 0.2)):
        with pytest.raises(Pinned, match="v2 is pinned"):
            refused()
    assert pointer_of(registry) == pointer

    said = registry.unpin()
    assert (said.version, said.reason) == (V2, "unpin")
    assert not pointer_of(registry).pinned
    assert registry.promote(V3).version == V3


def test_pinning_the_champion_and_another_pin_and_a_rollback_move_a_pinned_pointer(place: Place) -> None:
    registry = publish_all(place)
    assert registry.pin(V1).previous is None
    assert registry.pin(V2).previous == V1
    assert (pointer_of(registry).champion, pointer_of(registry).history, pointer_of(registry).pinned) == (
        V2,
        [V1],
        True,
    )
    assert registry.rollback().version == V1
    assert (pointer_of(registry).champion, pointer_of(registry).pinned) == (V1, True)


def test_first_version_may_be_pinned_and_nothing_is_unpinned_twice(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    with pytest.raises(BundleError, match="no version is pinned"):
        place.registry.unpin()
    assert place.registry.pin(V1).reason == "pin"
    place.registry.unpin()
    with pytest.raises(BundleError, match="no version is pinned"):
        place.registry.unpin()


def test_a_move_meant_for_an_older_generation_is_refused(place: Place) -> None:
    registry = publish_all(place)
    registry.start_canary(V2, 0.2)
    seen = pointer_of(registry).generation
    registry.rollback()  # by someone else
    for late in (lambda: registry.promote(V2, generation=seen), lambda: registry.rollback(generation=seen)):
        with pytest.raises(BundleError, match="someone else moved the pointer"):
            late()
    assert pointer_of(registry).champion == V1
    assert registry.promote(V2, generation=seen + 1).version == V2


def test_pointer_written_before_there_were_canaries_still_reads(place: Place) -> None:
    registry = publish_all(place)
    old = {"generation": 2, "champion": "v2", "history": ["v1"], "reason": "promote"}
    old_file = json.dumps(old | {"updated_at": "2026-11-23T14:30:00Z"}).encode()
    place.write("pointer/0000000002.json", old_file)
    pointer = pointer_of(registry)
    assert (pointer.champion, pointer.canary, pointer.canary_share, pointer.pinned) == (V2, None, 0.0, False)
    assert registry.rollback().version == V1


def test_prune_keeps_what_serves_and_the_newest(place: Place) -> None:
    names = [ModelVersion(f"v{number}") for number in range(6)]
    for version in names:
        place.registry.publish(place.source, version=version)
    place.registry.promote(names[0])
    place.registry.start_canary(names[1], 0.5)
    assert place.registry.prune(2) == [names[2], names[3]]
    assert place.registry.versions() == [names[0], names[1], names[4], names[5]]
    assert place.registry.prune(2) == []
    assert not place.files.exists(f"{place.root}/bundles/{names[2]}")
    place.registry.fetch(names[1], place.cache)


def test_prune_keeps_a_hundred_generations_of_the_pointer(place: Place) -> None:
    place.registry.publish(place.source, version=V1)
    place.registry.promote(V1)
    for _ in range(51):
        place.registry.pin(V1)
        place.registry.unpin()
    before = place.registry.pointer()
    assert before is not None and before.generation == 103
    place.registry.prune(2)
    assert place.registry.pointer() == before
    assert len(place.files.glob(f"{place.root}/pointer/*.json")) == 100
    place.registry.pin(V1)
    assert place.registry.pointer() != before


def test_prune_keeps_the_champions_before_to_roll_back_to(place: Place) -> None:
    names = [ModelVersion(f"v{number}") for number in range(9)]
    for version in names:
        place.registry.publish(place.source, version=version)
    for version in names[:5]:
        place.registry.promote(version)
    place.registry.prune(1)
    assert place.registry.versions() == [*names[1:5], names[8]]
    place.registry.rollback()


def test_canary_starts_only_where_the_pointer_still_is(place: Place) -> None:
    for version in (V1, V2):
        place.registry.publish(place.source, version=version)
    place.registry.promote(V1)
    place.registry.pin(V1)
    place.registry.unpin()
    with pytest.raises(BundleError, match="meanwhile"):
        place.registry.start_canary(V2, 0.2, generation=1)
    assert place.registry.start_canary(V2, 0.2, generation=3).canary == V2


def test_bundle_that_is_refused_or_breaks_off_leaves_nothing_behind(place: Place) -> None:
    judged = {"ranker.onnx": FileEntry(sha256="0" * 64, bytes=1)}
    with pytest.raises(BundleError, match="not what was judged"):
        place.registry.publish(place.source, version=V1, judged=judged)
    assert not place.files.exists(f"{place.root}/bundles/{V1}")
    assert place.registry.versions() == []


def test_cache_lets_go_of_what_the_registry_has_let_go_of(place: Place) -> None:
    if place.registry.url.startswith("memory:"):
        for version in (V1, V2):
            place.registry.publish(place.source, version=version)
            place.registry.fetch(version, place.cache)
        assert sorted(path.name for path in place.cache.iterdir()) == [V1, V2]
        place.registry.promote(V2)
        place.registry.prune(0)
        place.registry.fetch(V2, place.cache)
        assert sorted(path.name for path in place.cache.iterdir()) == [V2]
    else:  # used in place
        place.registry.publish(place.source, version=V1)
        place.registry.fetch(V1, place.cache)
        assert not place.cache.exists()
