"""The types of the identifiers. All are strings on the wire; the type says which one is meant."""

from typing import Annotated, NewType

from msgspec import Meta

UserId = NewType("UserId", str)
ItemId = NewType("ItemId", str)
EventId = NewType("EventId", str)
RequestId = NewType("RequestId", str)
ModelVersion = NewType("ModelVersion", str)

_ID = Meta(min_length=1, max_length=256)

# The same types with the bounds that every decoder checks.
UserIdField = Annotated[UserId, _ID]
ItemIdField = Annotated[ItemId, _ID]
EventIdField = Annotated[EventId, _ID]
RequestIdField = Annotated[RequestId, _ID]
