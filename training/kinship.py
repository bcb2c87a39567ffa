"""What a challenger must share with its parent: how it reads a text, and what it makes of it before it ranks.

Vectors and states of items are kept from version to version, and the cosines in the log were made by an earlier one:
all of that rests on a tokenizer, a shape and layers that never change. Parity cannot see a change of them, since a
bundle with another tokenizer agrees with itself. Another base model is a new version 0, not a challenger.
"""

from pathlib import Path

import msgspec
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from tailrace.errors import ParityError
from tailrace.model_card import load_ranker_card
from training.export import TOKENIZER_FILE, WEIGHTS_FILE

_OWN = {"version", "prior"}  # what a card says of its version alone
_EMBEDS = "bert."  # the weights that no round changes
_LARGEST = 1e5  # no learning rate brings a weight so far; one may sleep in a unit that only an unseen text wakes


def require_kinship(parent: Path, bundle: Path) -> None:
    """Raises ParityError naming what a bundle does not share with the one it learned on from, or is out of reach."""
    cards = [msgspec.structs.asdict(load_ranker_card(folder)) for folder in (parent, bundle)]
    found = [f"{name} of the card" for name in cards[0] if name not in _OWN and cards[0][name] != cards[1][name]]
    # As this library writes them, so that only what they do is compared.
    tokenizers = {Tokenizer.from_file(str(folder / TOKENIZER_FILE)).to_str() for folder in (parent, bundle)}
    found += ["the tokenizer"] if len(tokenizers) > 1 else []
    before, after = (load_file(folder / WEIGHTS_FILE) for folder in (parent, bundle))
    found += [
        name
        for name, weight in after.items()
        if name.startswith(_EMBEDS) and not (name in before and torch.equal(weight, before[name]))
    ]
    if found:
        raise ParityError(f"not shared with its parent: {', '.join(found)}")
    broken = [name for name, weight in after.items() if not bool((weight.abs() <= _LARGEST).all())]  # nor is a NaN
    if broken:
        raise ParityError(f"weights that no training makes: {', '.join(broken)}")
