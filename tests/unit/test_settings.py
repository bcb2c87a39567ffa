"""Settings: the order of authority, what is refused, and the table that documents them."""

from pathlib import Path

import msgspec
import pytest

from tailrace.errors import SettingsError
from tailrace.settings import Settings, load_settings, settings_table, without_secrets


def test_without_anything_the_defaults_hold() -> None:
    assert load_settings(environ={}) == Settings()


def test_overrides_win_over_the_environment_which_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tailrace.toml"
    file.write_text('log_level = "debug"\n[gateway]\nport = 1\nreplicas = 2\nmax_ongoing_requests = 3\n')
    environ = {"TAILRACE_GATEWAY__PORT": "4", "TAILRACE_GATEWAY__REPLICAS": "5", "HOME": "elsewhere"}
    found = load_settings(file, environ, gateway={"port": 6})
    assert (found.gateway.port, found.gateway.replicas, found.gateway.max_ongoing_requests) == (6, 5, 3)
    assert found.log_level == "debug"


def test_the_environment_may_carry_any_type() -> None:
    environ = {
        "TAILRACE_STORE__SYNC": "false",
        "TAILRACE_SLATE__DIVERSITY": "0.5",
        "TAILRACE_KAFKA__SECURITY": '{"security_protocol": "SASL_SSL", "api_version_auto_timeout_ms": 5}',
    }
    found = load_settings(environ=environ)
    assert found.store.sync is False
    assert found.slate.diversity == 0.5
    assert found.kafka.security == {"security_protocol": "SASL_SSL", "api_version_auto_timeout_ms": 5}


@pytest.mark.parametrize(
    ("environ", "word"),
    [
        ({"TAILRACE_GATEWAY__PROT": "80"}, "prot"),
        ({"TAILRACE_GATEWAY__PORT": "eighty"}, "gateway.port"),
        ({"TAILRACE_GATEWAY__PORT": "70000"}, "gateway.port"),
        ({"TAILRACE_STORE__KIND": "sqlite"}, "store.kind"),
        ({"TAILRACE_SLATE__DIVERSITY": "2"}, "slate.diversity"),
        ({"TAILRACE_STREAM__MAX_BATCH": "0"}, "stream.max_batch"),
        ({"TAILRACE_NOWHERE": "1"}, "nowhere"),
        ({"TAILRACE_KAFKA__SECURITY": "{broken"}, "TAILRACE_KAFKA__SECURITY"),
        ({"TAILRACE_STORE": "x", "TAILRACE_STORE__KIND": "x"}, "store.kind"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(environ: dict[str, str], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        load_settings(environ=environ)


@pytest.mark.parametrize(
    ("section", "told", "word"),
    [
        ("training", {"lora_rank": 4}, "trainable_layers"),
        ("gate", {"better_confidence": 0.3}, "better_confidence"),
        ("ranker", {"min_replicas": 3, "max_replicas": 2}, "max_replicas"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_section(
    section: str, told: dict[str, int], word: str
) -> None:
    with pytest.raises(SettingsError, match=f"{word}.*{section}"):
        load_settings(None, {}, **{section: told})


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nowhere"):
        load_settings(tmp_path / "nowhere.toml", environ={})
    broken = tmp_path / "broken.toml"
    broken.write_text("= 3")
    with pytest.raises(SettingsError, match="broken"):
        load_settings(broken, environ={})


def test_an_unknown_key_in_the_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tailrace.toml"
    file.write_text("[kafka]\nbroker = 1\n")
    with pytest.raises(SettingsError, match="broker"):
        load_settings(file, environ={})


def test_paths_are_below_the_data_folder_unless_absolute(tmp_path: Path) -> None:
    found = load_settings(environ={}, data_dir=str(tmp_path / "data"))
    assert found.path("store") == tmp_path / "data" / "store"
    assert found.path(str(tmp_path / "other")) == tmp_path / "other"


def test_the_table_has_one_described_row_for_every_setting() -> None:
    rows = settings_table().splitlines()[2:]
    expected = 0
    for field in msgspec.structs.fields(Settings):
        is_section = isinstance(field.default, msgspec.Struct)
        expected += len(msgspec.structs.fields(field.default)) if is_section else 1
    assert len(rows) == expected
    for row in rows:
        name, default, text = (cell.strip() for cell in row.strip("|").split("|"))
        assert name.startswith("`")
        assert default.startswith("`")
        assert text, name


def test_what_is_shown_of_settings_holds_no_password_and_what_is_set_keeps_it() -> None:
    environ = {
        "TAILRACE_KAFKA__SECURITY": '{"sasl_plain_username": "ann", "sasl_plain_password": "hush", "ssl_password": ""}',
        "TAILRACE_STORE__URL": "rediss://ann:hush@cache:6379/0",
        "TAILRACE_REGISTRY__URL": "s3://bucket/models",
    }
    found = load_settings(environ=environ)
    shown = without_secrets(found)
    assert shown["kafka"]["security"] == {
        "sasl_plain_username": "ann",
        "sasl_plain_password": "***",
        "ssl_password": "***",
    }
    assert (shown["store"]["url"], shown["registry"]["url"]) == ("rediss://***@cache:6379/0", "s3://bucket/models")
    assert found.kafka.security["sasl_plain_password"] == "hush"
