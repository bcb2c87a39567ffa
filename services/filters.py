"""What a caller wants to see: conditions that every recommended item satisfies. Pure.

Shapes: R rows of the catalogue.
"""

from collections.abc import Mapping
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta

from tailrace.catalogue import Catalogue, Flags, Rows
from tailrace.events import Scalar, ShortText
from tailrace.items import TAG, Fact, Item

_FEW = Meta(max_length=64)  # conditions of one kind: each is a pass over the catalogue


class Range(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A number between `min` and `max`, both included; absent means unbounded."""

    min: float | None = None
    max: float | None = None


class Filters(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the caller wants to see. Every stated condition must hold.

    `attributes` maps a name to the value it must equal, or to a Range. An item without the attribute is left out.

    >>> msgspec.json.decode('{"tags_any":["gothic"],"attributes":{"year":{"max":1900}}}', type=Filters).tags_any
    ['gothic']
    """

    tags_any: Annotated[list[ShortText], _FEW] = []
    tags_all: Annotated[list[ShortText], _FEW] = []
    tags_none: Annotated[list[ShortText], _FEW] = []
    facts: Annotated[list[Fact], _FEW] = []
    attributes: Annotated[dict[ShortText, Scalar | Range], _FEW] = {}


def fitting(catalogue: Catalogue, filters: Filters, allowed_R: Flags) -> Flags:
    """Returns bool [R]: which of the allowed rows satisfy every condition."""
    fitting_R = allowed_R.copy()

    def keep(rows: Rows) -> None:
        others_R = np.ones_like(fitting_R)
        others_R[rows[rows < len(fitting_R)]] = False  # the catalogue may have grown since
        fitting_R[others_R] = False

    def drop(rows: Rows) -> None:
        fitting_R[rows[rows < len(fitting_R)]] = False

    if filters.tags_any:
        keep(np.concatenate([catalogue.topic_rows(f"{TAG}{tag}") for tag in filters.tags_any]))
    for tag in filters.tags_all:
        keep(catalogue.topic_rows(f"{TAG}{tag}"))
    for fact in filters.facts:
        keep(catalogue.topic_rows(f"{fact.relation}:{fact.entity}"))
    for tag in filters.tags_none:
        drop(catalogue.topic_rows(f"{TAG}{tag}"))
    if filters.attributes:  # not indexed: linear in what is left
        rows = np.flatnonzero(fitting_R)
        fits = [item is not None and _fits(item, filters.attributes) for item in catalogue.items_at(rows)]
        drop(rows[~np.array(fits, dtype=np.bool_)])
    return fitting_R


def _fits(item: Item, attributes: Mapping[str, Scalar | Range]) -> bool:
    for name, wanted in attributes.items():
        value = item.attributes.get(name)
        if isinstance(wanted, Range):
            if isinstance(value, bool) or not isinstance(value, int | float):
                return False
            if (wanted.min is not None and value < wanted.min) or (wanted.max is not None and value > wanted.max):
                return False
        elif value != wanted or isinstance(value, bool) != isinstance(wanted, bool):
            return False
    return True
