"""Kafka clients: what is refused before anything connects."""

from collections.abc import Callable
from typing import Any

import pytest

from tailrace.errors import SettingsError
from tailrace.kafka_clients import open_admin, open_consumer, open_producer
from tailrace.settings import KafkaSettings


@pytest.mark.parametrize("open_client", [open_admin, open_consumer, open_producer])
def test_an_unknown_security_setting_is_refused_by_name_and_its_value_is_not_said(
    open_client: Callable[[KafkaSettings], Any],
) -> None:
    kafka = KafkaSettings(bootstrap_servers="127.0.0.1:1", security={"sasl_plain_passwrd": "hush"})
    with pytest.raises(SettingsError, match="sasl_plain_passwrd") as caught:
        open_client(kafka)
    assert "hush" not in str(caught.value)
