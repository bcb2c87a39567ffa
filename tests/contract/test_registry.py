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

from tailrace.errors import BundleError
from tailrace.ids import ModelVersion
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
def test_damaged_bundle_is_refused_naming_the_file_and_nothing_is_left_in_the_cache(
    place: Place, damage: Callable[[Place], None], found: str
) -> None:
    place.registry.publish(place.source, version=V1)
    damage(place)
    with pytest.raises(BundleError, match=found):
        place.registry.fetch(V1, place.cache)
    assert list(place.cache.glob("*")) == []


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
