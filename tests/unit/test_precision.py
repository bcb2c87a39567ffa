"""Which numbers a fine-tune works in."""

from collections.abc import Iterator
from typing import Literal

import pytest
import torch

from tailrace.settings import TrainingSettings
from training import precision
from training.precision import choose_precision, precision_of
from training.team import Team


@pytest.fixture(autouse=True)
def never_asked() -> Iterator[None]:
    asked = precision._bf16_pays
    asked.cache_clear()
    yield
    asked.cache_clear()


@pytest.mark.parametrize(
    ("has_it", "takes_s", "expected"),
    [(True, 0.4, "bf16"), (True, 0.9, "fp32"), (True, 2.0, "fp32"), (False, 0.1, "fp32")],
)
def test_auto_is_bf16_where_the_processor_has_it_and_is_faster_with_it(
    monkeypatch: pytest.MonkeyPatch, has_it: bool, takes_s: float, expected: str
) -> None:
    now = 0.0

    def multiply(states: torch.Tensor, weights: torch.Tensor) -> None:
        nonlocal now
        now += takes_s if torch.is_autocast_enabled("cpu") else 1.0

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_it)
    monkeypatch.setattr(torch.nn.functional, "linear", multiply)
    monkeypatch.setattr(precision.time, "perf_counter", lambda: now)
    assert choose_precision(TrainingSettings()) == expected


@pytest.mark.parametrize(("name", "found"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_a_precision_that_is_asked_for_is_taken_and_is_what_products_come_in(
    name: Literal["bf16", "fp32"], found: torch.dtype
) -> None:
    assert choose_precision(TrainingSettings(precision=name)) == name
    with precision_of(name, "cpu")():
        assert torch.nn.functional.linear(torch.ones(2, 3), torch.ones(4, 3)).dtype == found


def test_a_team_works_in_what_its_first_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_bf16_pays", lambda device: False)
    monkeypatch.setattr(Team, "as_leader", lambda self, tensor: torch.ones_like(tensor))
    assert choose_precision(TrainingSettings(), Team(rank=1, size=2)) == "bf16"


def test_asking_draws_no_random_number() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    choose_precision(TrainingSettings())
    assert torch.rand(3).tolist() == expected.tolist()
