"""The registry's names, and what a publish that dies half-way leaves behind on a real disk."""

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import msgspec
import pytest

from tailrace.errors import BundleError, SettingsError
from tailrace.ids import ModelVersion
from tailrace.registry import Registry, new_version, open_registry
from tailrace.settings import RegistrySettings, Settings

CARD = {
    "base_model": "tiny",
    "split_layer": 3,
    "item_states": 4,
    "feature_names_hash": "abc",
    "text_version": 1,
    "precisions": ["int8"],
}
V1 = ModelVersion("v1")

# Publishes, and kills itself with SIGKILL at the n-th file it opens for writing below the registry.
PUBLISH_AND_DIE = """
import os, signal, sys
from pathlib import Path
from tailrace.registry import Registry

source, registry, deadly = sys.argv[1], sys.argv[2], int(sys.argv[3])
opened = 0

def watch(event, arguments):
    global opened
    if event == "open" and str(arguments[0]).startswith(registry) and str(arguments[1])[:1] == "w":
        opened += 1
        if opened == deadly:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
Registry(registry).publish(Path(source), version="v1")
"""


def make_bundle(folder: Path, files: int = 3) -> Path:
    folder.mkdir()
    (folder / "model.json").write_bytes(msgspec.json.encode(CARD))
    for number in range(files):
        (folder / f"part-{number}.bin").write_bytes(os.urandom(1000))
    return folder


def test_versions_sort_by_time_and_carry_a_token() -> None:
    noon = datetime(2026, 11, 23, 14, 30, tzinfo=UTC)
    assert new_version(noon, "ab12") == "v20261123-143000-ab12"
    assert new_version(noon.astimezone(timezone(timedelta(hours=5))), "ab12") == "v20261123-143000-ab12"
    assert new_version(noon + timedelta(seconds=1)) > new_version(noon)
    assert len(new_version(noon)) == len("v20261123-143000-ab12")


@pytest.mark.parametrize("deadly", [1, 2, 3, 4, 5])  # four files and the manifest
def test_publish_killed_at_any_file_is_not_listed_and_the_next_publish_of_the_version_succeeds(
    tmp_path: Path, deadly: int
) -> None:
    source, url = make_bundle(tmp_path / "source"), str(tmp_path / "registry")
    died = subprocess.run([sys.executable, "-c", PUBLISH_AND_DIE, str(source), url, str(deadly)], check=False)
    assert died.returncode == -signal.SIGKILL
    registry = Registry(url)
    assert (tmp_path / "registry" / "bundles" / "v1").is_dir()
    assert registry.versions() == []
    with pytest.raises(BundleError, match="no bundle v1"):
        registry.fetch(V1, tmp_path / "cache")

    (source / "part-2.bin").unlink()  # what the dead attempt had uploaded of it must not come back
    manifest = registry.publish(source, version=V1)
    assert sorted(manifest.files) == ["model.json", "part-0.bin", "part-1.bin"]
    assert registry.fetch(V1, tmp_path / "cache") == tmp_path / "registry" / "bundles" / "v1"


def test_two_promoters_cannot_both_move_the_pointer(tmp_path: Path) -> None:
    source, url = make_bundle(tmp_path / "source"), str(tmp_path / "registry")
    ours = Registry(url)
    for name in ("a", "b", "c"):
        ours.publish(source, version=ModelVersion(name))
    ours.promote(ModelVersion("a"))

    # The other promoter acts between our look at the pointer and our move: when our clock is asked.
    def act() -> datetime:
        Registry(url).promote(ModelVersion("b"))
        return datetime.now(UTC)

    with pytest.raises(BundleError, match="someone else moved the pointer"):
        Registry(url, clock=act).promote(ModelVersion("c"))
    pointer = ours.pointer()
    assert pointer is not None
    assert (pointer.champion, pointer.history) == ("b", ["a"])


def test_relative_registry_is_below_data_dir_and_a_url_is_taken_as_it_is(tmp_path: Path) -> None:
    assert open_registry(Settings(data_dir=str(tmp_path))).url == str(tmp_path / "registry")
    elsewhere = Settings(registry=RegistrySettings(url="memory://models"))
    assert open_registry(elsewhere).url == "memory://models"


def test_unknown_protocol_is_a_settings_error() -> None:
    with pytest.raises(SettingsError, match=r"registry\.url"):
        Registry("nosuchstore://bucket/models")
