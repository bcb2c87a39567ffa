"""The command line without a broker: what it prints, and how it says no."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from tailrace.cli import main
from tailrace.features import FEATURE_NAMES_HASH
from tailrace.ids import ModelVersion
from tailrace.registry import Registry
from tailrace.text import TEXT_VERSION
from tests.servers import hear_interrupts

CARD = {
    "base_model": "tiny",
    "split_layer": 3,
    "item_states": 4,
    "feature_names_hash": FEATURE_NAMES_HASH,
    "text_version": TEXT_VERSION,
    "precisions": ["int8"],
}


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    file = tmp_path / "tailrace.toml"
    file.write_text(f'data_dir = "{tmp_path / "data"}"\n')
    return file


def run(*arguments: object, settings: Path | None = None, env: dict[str, str] | None = None) -> Result:
    chosen = ["--settings", str(settings)] if settings else []
    return CliRunner().invoke(main, [*chosen, *map(str, arguments)], env=env)


def said_no(result: Result, *words: str) -> None:
    """Checks that one line on stderr says what is wrong, with exit code 1 and no traceback."""
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize("command", [[], *([name] for name in sorted(main.commands))])
def test_every_command_has_help(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_schemas_prints_one_or_all() -> None:
    assert {"Click", "Rating", "Context", "Impression", "Item"} <= set(json.loads(run("schemas").stdout))
    assert "dwell_s" in json.loads(run("schemas", "Click").stdout)["properties"]
    assert set(json.loads(run("schemas", "Click", "Item").stdout)) == {"Click", "Item"}
    assert run("schemas", "Klick").exit_code == 2


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [[], ["--json"], ["--check"]])
def test_settings_shows_no_password(settings_file: Path, options: list[str]) -> None:
    env = {"TAILRACE_KAFKA__SECURITY__SASL_PLAIN_PASSWORD": "hush", "TAILRACE_STORE__URL": "redis://:hush@cache/0"}
    result = run("settings", *options, settings=settings_file, env=env)
    assert result.exit_code == 0
    assert "hush" not in result.output


def test_status_of_a_store_in_memory_is_refused(settings_file: Path) -> None:
    env = {"TAILRACE_STORE__KIND": "memory", "TAILRACE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    said_no(run("status", settings=settings_file, env=env), "store.kind")


def test_settings_shows_values_from_file_and_environment(settings_file: Path) -> None:
    env = {"TAILRACE_KAFKA__USER_PARTITIONS": "3"}
    found = json.loads(run("settings", "--json", settings=settings_file, env=env).stdout)
    assert found["kafka"]["user_partitions"] == 3
    assert found["data_dir"].endswith("data")
    line = next(
        line
        for line in run("settings", settings=settings_file, env=env).stdout.splitlines()
        if line.startswith("kafka.user_partitions")
    )
    assert line.split() == ["kafka.user_partitions", "3", "8"]
    assert run("settings", "--check", settings=settings_file).stdout == "settings are good\n"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[kafka]\nuser_partitions = 0\n", "kafka.user_partitions"),
        ("[kafka]\nuser_partition = 8\n", "user_partition"),
        ("port = 1 2\n", "tailrace.toml"),
    ],
)
def test_bad_settings_are_one_line_that_names_the_key(settings_file: Path, text: str, named: str) -> None:
    settings_file.write_text(text)
    said_no(run("settings", "--check", settings=settings_file), named)
    assert run("settings", "--help", settings=settings_file).exit_code == 0


def test_settings_file_in_the_working_directory_is_read(settings_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(settings_file.parent)
    assert json.loads(run("settings", "--json").stdout)["data_dir"].endswith("data")


# -- a broker that is not there ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["topics", "status", "stream", "serve"])
def test_without_kafka_a_command_says_what_to_do(settings_file: Path, command: str) -> None:
    said_no(run(command, settings=settings_file), "tailrace broker", "kafka.bootstrap_servers")


@pytest.mark.parametrize("command", ["topics", "status"])
def test_kafka_that_does_not_answer_is_named(settings_file: Path, command: str) -> None:
    env = {"TAILRACE_KAFKA__BOOTSTRAP_SERVERS": "127.0.0.1:1"}
    said_no(run(command, settings=settings_file, env=env), "127.0.0.1:1")


def test_bad_row_stops_an_import_before_kafka_is_asked(settings_file: Path, tmp_path: Path) -> None:
    rows = '{"user_id":"u","item_id":"i","occurred_at":1}\n{"user_id":"u","occurred_at":1}\n'
    (tmp_path / "e.jsonl").write_text(rows)
    said_no(run("import", "jsonl", tmp_path / "e.jsonl", settings=settings_file), "e.jsonl:2", "item_id")


@pytest.mark.parametrize("wrong", [["--map", "user_id"], ["--epoch", "h"], ["--limit", "0"], ["--to", "models"]])
def test_wrong_option_of_import_is_a_usage_error(tmp_path: Path, wrong: list[str]) -> None:
    (tmp_path / "e.csv").write_text("a\n")
    assert run("import", "csv", tmp_path / "e.csv", *wrong).exit_code == 2


@pytest.mark.parametrize("speed", ["0", "-1", "fast", "nan"])
def test_wrong_speed_of_replay_is_a_usage_error(tmp_path: Path, speed: str) -> None:
    (tmp_path / "e.csv").write_text("a\n")
    result = run("replay", "csv", tmp_path / "e.csv", "--speed", speed)
    assert result.exit_code == 2
    assert "neither `max` nor a number above 0" in result.stderr


# -- models --------------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(settings_file: Path, tmp_path: Path) -> Registry:
    source = tmp_path / "bundle"
    source.mkdir()
    (source / "model.json").write_bytes(msgspec.json.encode(CARD))
    (source / "ranker.onnx").write_bytes(b"weights")
    registry = Registry(str(tmp_path / "data" / "registry"))
    registry.publish(source, version=ModelVersion("v1"), metrics={"auc": 0.64})
    registry.publish(source, version=ModelVersion("v2"), parent=ModelVersion("v1"))
    registry.promote(ModelVersion("v1"))
    return registry


def test_models_list_marks_the_one_that_serves(settings_file: Path, registry: Registry) -> None:
    lines = run("models", "list", settings=settings_file).stdout.splitlines()
    assert lines[1].split()[:2] == ["serves", "v1"]
    assert lines[2].split()[0] == "v2"
    assert "auc 0.64" in lines[1]
    found = json.loads(run("models", "list", "--json", settings=settings_file).stdout)
    assert found["pointer"]["champion"] == "v1"
    assert [one["version"] for one in found["versions"]] == ["v1", "v2"]


def test_models_show_prints_the_manifest_of_the_champion_or_of_a_version(
    settings_file: Path, registry: Registry
) -> None:
    assert json.loads(run("models", "show", settings=settings_file).stdout)["version"] == "v1"
    assert json.loads(run("models", "show", "v2", settings=settings_file).stdout)["parent"] == "v1"
    said_no(run("models", "show", "v9", settings=settings_file), "v9", "v1, v2")


def test_promotion_without_kafka_says_that_the_pointer_moved_and_replicas_were_not_told(
    settings_file: Path, registry: Registry
) -> None:
    said_no(run("models", "promote", "v2", settings=settings_file), "the pointer is at v2", "models promote v2")
    pointer = registry.pointer()
    assert pointer is not None
    assert pointer.champion == "v2"


def test_promoting_an_unknown_version_and_rolling_back_the_first_are_refused(
    settings_file: Path, registry: Registry
) -> None:
    said_no(run("models", "promote", "v9", settings=settings_file), "no bundle v9")
    said_no(run("models", "rollback", settings=settings_file), "first champion")


def test_models_list_shows_the_canary_with_its_share_and_a_pin(settings_file: Path, registry: Registry) -> None:
    registry.start_canary(ModelVersion("v2"), 0.2)
    lines = run("models", "list", settings=settings_file).stdout.splitlines()
    assert lines[1].split()[:2] == ["serves", "v1"] and lines[2].split()[:3] == ["canary", "20%", "v2"]
    found = json.loads(run("models", "list", "--json", settings=settings_file).stdout)
    assert (found["pointer"]["canary"], found["pointer"]["canary_share"]) == ("v2", 0.2)
    registry.pin(ModelVersion("v2"))
    lines = run("models", "list", settings=settings_file).stdout.splitlines()
    assert lines[2].split()[:3] == ["serves,", "pinned", "v2"]


def test_pin_holds_against_promotion_until_it_is_lifted(settings_file: Path, registry: Registry) -> None:
    said_no(run("models", "pin", settings=settings_file), "the pointer is at v1", "not told")
    said_no(run("models", "promote", "v2", settings=settings_file), "v1 is pinned", "models unpin")
    said_no(run("models", "promote", "v2", "--share", "0.1", settings=settings_file), "v1 is pinned")
    said_no(run("models", "unpin", settings=settings_file), "the pointer is at v1", "not told")
    said_no(run("models", "promote", "v2", "--share", "0.1", settings=settings_file), "the pointer is at v1")
    pointer = registry.pointer()
    assert pointer is not None
    assert (pointer.champion, pointer.canary, pointer.canary_share) == ("v1", "v2", 0.1)
    assert run("models", "promote", "v2", "--share", "1", settings=settings_file).exit_code == 2


def test_models_export_copies_a_checked_bundle_into_an_empty_folder(
    settings_file: Path, registry: Registry, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    assert run("models", "export", "v1", target, settings=settings_file).exit_code == 0
    assert sorted(path.name for path in target.iterdir()) == ["manifest.json", "model.json", "ranker.onnx"]
    said_no(run("models", "export", "v1", target, settings=settings_file), "not empty")


def test_models_init_leaves_a_registry_that_serves_alone(settings_file: Path, registry: Registry) -> None:
    assert run("models", "init", settings=settings_file).stdout == "v1 serves already\n"
    assert registry.versions() == ["v1", "v2"]


def test_models_init_replaces_a_champion_made_for_other_features(settings_file: Path, tmp_path: Path) -> None:
    source = tmp_path / "bundle"
    source.mkdir()
    (source / "model.json").write_bytes(msgspec.json.encode(CARD | {"feature_names_hash": "of old"}))
    registry = Registry(str(tmp_path / "data" / "registry"))
    registry.publish(source, version=ModelVersion("v1"))
    registry.promote(ModelVersion("v1"))
    registry.pin(ModelVersion("v1"))
    said_no(run("models", "init", settings=settings_file), "v1", "is pinned", "models unpin")
    registry.unpin()
    assert "starting anew" in run("models", "init", settings=settings_file).stdout
    pointer = registry.pointer()
    assert pointer is not None and pointer.champion != "v1" and pointer.history == ["v1"]
    assert "serves already" in run("models", "init", settings=settings_file).stdout
    # Nor does it come back: replicas would refuse it one by one, and serve on.
    for back in (["rollback"], ["promote", "v1"], ["promote", "v1", "--share", "0.5"], ["pin", "v1"]):
        said_no(run("models", *back, settings=settings_file), "v1 was made for other features", "no replica")
    assert registry.pointer() == pointer


# -- being stopped -------------------------------------------------------------------------------------------------


def test_ctrl_c_is_exit_code_130_without_a_traceback(tmp_path: Path) -> None:
    fifo = tmp_path / "events.jsonl"
    os.mkfifo(fifo)  # the import waits for its first line
    command = [sys.executable, "-m", "tailrace.cli", "import", "jsonl", str(fifo)]
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
        ) as process,
        fifo.open("w"),
    ):
        process.send_signal(signal.SIGINT)  # the import has opened its end: it is waiting for a line
        out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "stopped\n")
