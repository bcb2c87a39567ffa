"""All that `model.json` says of a version of the ranker: written by training, read by serving and the next round."""

from pathlib import Path
from typing import Any

import msgspec

from tailrace.bundle import MODEL_CARD, ModelCard
from tailrace.errors import BundleError
from tailrace.features import FEATURE_NAMES_HASH
from tailrace.ids import ModelVersion
from tailrace.text import TEXT_VERSION

CARD_FORMAT = 1


class RankerCard(ModelCard, frozen=True, kw_only=True):
    """The shape of the ranker, beside what the registry reads.

    `item_states` 0: every item token keeps its state.
    """

    version: ModelVersion
    max_user_tokens: int
    max_item_tokens: int
    num_layers: int
    num_heads: int
    hidden_size: int
    head_width: int
    pad_token_id: int
    feature_names: list[str]
    prior: dict[str, float]
    bert_config: dict[str, Any]
    format: int = CARD_FORMAT


def takes_our_input(card: ModelCard) -> bool:
    """Whether a model was made for the features and the text that this program makes: others can serve no longer."""
    return (card.feature_names_hash, str(card.text_version)) == (FEATURE_NAMES_HASH, str(TEXT_VERSION))


def save_ranker_card(card: RankerCard, directory: Path) -> None:
    """Writes `model.json` into the directory."""
    (directory / MODEL_CARD).write_bytes(msgspec.json.format(msgspec.json.encode(card), indent=2))


def load_ranker_card(directory: Path) -> RankerCard:
    """Returns the card of the bundle in the directory. Raises BundleError where it is missing or unreadable."""
    path = directory / MODEL_CARD
    try:
        card = msgspec.json.decode(path.read_bytes(), type=RankerCard)
    except (OSError, msgspec.MsgspecError) as error:
        raise BundleError(f"{path}: {error}") from error
    if card.format != CARD_FORMAT:
        raise BundleError(f"{path}: format {card.format}, where this program reads {CARD_FORMAT}")
    return card
