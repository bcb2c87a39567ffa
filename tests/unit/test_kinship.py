"""What a challenger shares with its parent, and what may differ."""

from pathlib import Path

import msgspec
import pytest

from tailrace.errors import ParityError
from tailrace.ids import ModelVersion
from tailrace.model_card import load_ranker_card, save_ranker_card
from tests.unit.test_fine_tune import small_ranker, tokenizer
from training.export import export_bundle
from training.kinship import require_kinship


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path]:
    """Two bundles of the same ranker."""
    folders = tmp_path / "parent", tmp_path / "child"
    for folder in folders:
        export_bundle(small_ranker(), tokenizer(), folder, version=ModelVersion(folder.name), precisions=("fp32",))
    return folders


def change_card(folder: Path, **fields: object) -> None:
    save_ranker_card(msgspec.structs.replace(load_ranker_card(folder), **fields), folder)


def test_version_learns_on_from_its_kin(family: tuple[Path, Path]) -> None:
    parent, child = family
    require_kinship(parent, child)
    change_card(child, prior={"cos_user": 3.0})
    require_kinship(parent, child)


def test_card_of_another_shape_is_named(family: tuple[Path, Path]) -> None:
    parent, child = family
    change_card(child, item_states=7)
    with pytest.raises(ParityError, match="item_states of the card"):
        require_kinship(parent, child)
