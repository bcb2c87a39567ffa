"""Which loaded models serve whom: a champion, and a canary where the pointer has one. Replaced, never changed."""

from collections.abc import Iterable
from dataclasses import dataclass

from services.loaded_model import LoadedModel
from tailrace.ids import ModelVersion, UserId
from tailrace.pointer import Pointer, assigned_version


@dataclass(frozen=True)
class Arrangement:
    """The pointer that was followed and the models that follow it; the canary is None until it is loaded."""

    pointer: Pointer
    champion: LoadedModel
    canary: LoadedModel | None

    def model_for(self, user_id: UserId | None) -> LoadedModel:
        """Returns the user's model; without a user, or before the canary is loaded, the champion."""
        if self.canary is None or user_id is None:
            return self.champion
        return self.canary if assigned_version(user_id, self.pointer) == self.canary.version else self.champion

    def models(self) -> tuple[LoadedModel, ...]:
        """Returns all models that serve, the champion first."""
        return (self.champion,) if self.canary is None else (self.champion, self.canary)


def arrange(pointer: Pointer, now: Arrangement | None, loaded: Iterable[LoadedModel]) -> Arrangement | None:
    """Returns how the loaded models serve under the pointer; None where none can.

    Until the pointer's champion is loaded the present one serves on, and no canary: it has nothing to be compared with.
    """
    held = {model.version: model for model in loaded}
    champion = held.get(pointer.champion, None if now is None else now.champion)
    if champion is None:
        return None
    follows = champion.version == pointer.champion and pointer.canary is not None
    return Arrangement(pointer, champion, held.get(pointer.canary) if follows and pointer.canary else None)


def missing_version(pointer: Pointer, now: Arrangement | None) -> ModelVersion | None:
    """Returns the version to load next, the champion first; None when the arrangement is as the pointer says."""
    if now is None or now.champion.version != pointer.champion:
        return pointer.champion
    return pointer.canary if now.canary is None else None
