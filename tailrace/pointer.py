"""Which version serves whom: the pointer, the moves it can make, and the user's share in it. Pure.

A champion serves everyone but those the canary takes: a share of the users, picked by a hash of their id. A pinned
champion stays until it is unpinned: no promotion and no canary, only another pin or a rollback by hand.
"""

from collections.abc import Callable
from datetime import datetime
from hashlib import blake2b
from typing import Literal

import msgspec
from msgspec.structs import replace

from tailrace.errors import BundleError, Pinned
from tailrace.events import ModelAnnouncement
from tailrace.ids import ModelVersion, UserId

MAX_HISTORY = 100

Reason = Literal["promote", "rollback", "pin", "unpin", "canary"]


class Pointer(msgspec.Struct, frozen=True, kw_only=True):
    """Which version serves. `history` holds the champions before it, newest last; rollback takes the last.

    `canary` serves `canary_share` of the users, 0 to 1, beside the champion. `reason` is that of the last move.
    """

    generation: int
    champion: ModelVersion
    history: list[ModelVersion]
    reason: Reason
    updated_at: datetime
    canary: ModelVersion | None = None
    canary_share: float = 0.0
    pinned: bool = False


# Returns the pointer after the move, or the very same one where there is nothing to move. Raises BundleError.
Move = Callable[[Pointer | None, datetime], Pointer]


def assigned_version(user_id: UserId, pointer: Pointer) -> ModelVersion:
    """Returns the version that serves this user, the same in every process.

    The canary's name is part of the hash, so that each canary meets other users.
    """
    if pointer.canary is None:
        return pointer.champion
    digest = blake2b(f"{pointer.canary}\0{user_id}".encode(), digest_size=8).digest()
    return pointer.canary if int.from_bytes(digest) < pointer.canary_share * 2.0**64 else pointer.champion


def promoted(now: Pointer | None, version: ModelVersion, at: datetime) -> Pointer:
    """Returns the pointer with `version` as champion; a canary ends, or becomes the champion. Raises Pinned."""
    if now is None:
        return Pointer(generation=1, champion=version, history=[], reason="promote", updated_at=at)
    if now.champion == version:
        return now
    _refuse_if_pinned(now)
    return _after(now, "promote", at, version)


def with_canary(now: Pointer | None, version: ModelVersion, share: float, at: datetime) -> Pointer:
    """Returns the pointer with `version` for a share of the users, or with another share for the canary there is.

    Raises BundleError before the first promotion, for the champion, and while another canary runs; Pinned;
    ValueError for a share that is not above 0 and below 1.
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"a canary's share is above 0 and below 1, not {share:g}")
    if now is None:
        raise BundleError(f"{version} cannot be a canary: nothing was ever promoted, so there is no champion beside it")
    _refuse_if_pinned(now)
    if version == now.champion:
        raise BundleError(f"{version} is the champion: it serves everyone already")
    if now.canary not in (None, version):
        raise BundleError(f"{now.canary} is the canary: promote it or roll it back first")
    if (now.canary, now.canary_share) == (version, share):
        return now
    return replace(_after(now, "canary", at), canary=version, canary_share=share)


def rolled_back(now: Pointer | None, at: datetime) -> Pointer:
    """Returns the pointer without its canary; where none runs, with the champion before this one.

    What was pinned by hand stays pinned. Raises BundleError where there is nothing to go back to.
    """
    if now is None:
        raise BundleError("nothing was ever promoted: there is nothing to roll back")
    if now.canary is not None:
        return _after(now, "rollback", at)
    if not now.history:
        raise BundleError(f"{now.champion} is the first champion: there is none before it to roll back to")
    before = replace(_after(now, "rollback", at), champion=now.history[-1], history=now.history[:-1])
    return replace(before, pinned=now.pinned)


def pinned(now: Pointer | None, version: ModelVersion, at: datetime) -> Pointer:
    """Returns the pointer with `version` as champion until it is unpinned; a canary ends."""
    if now is None:
        return replace(promoted(None, version, at), reason="pin", pinned=True)
    if now.pinned and now.champion == version:
        return now
    return replace(_after(now, "pin", at, version), pinned=True)


def unpinned(now: Pointer | None, at: datetime) -> Pointer:
    """Returns the pointer free to move again. Raises BundleError where nothing is pinned."""
    if now is None or not now.pinned:
        raise BundleError("no version is pinned: there is nothing to unpin")
    return _after(now, "unpin", at)


def announcement(moved: Pointer, before: Pointer | None) -> ModelAnnouncement:
    """Returns what to announce. `previous` is the champion before this one."""
    if before is not None and before.champion != moved.champion:
        previous: ModelVersion | None = before.champion
    else:
        previous = moved.history[-1] if moved.history else None
    return ModelAnnouncement(
        version=moved.champion,
        previous=previous,
        reason=moved.reason,
        occurred_at=moved.updated_at,
        canary=moved.canary,
        canary_share=moved.canary_share,
    )


def _after(now: Pointer, reason: Reason, at: datetime, champion: ModelVersion | None = None) -> Pointer:
    """Returns the next generation without canary and pin, its history extended where the champion is another."""
    moves = champion is not None and champion != now.champion
    return Pointer(
        generation=now.generation + 1,
        champion=champion if champion is not None and moves else now.champion,
        history=[*now.history, now.champion][-MAX_HISTORY:] if moves else now.history,
        reason=reason,
        updated_at=at,
    )


def _refuse_if_pinned(now: Pointer) -> None:
    if now.pinned:
        raise Pinned(f"{now.champion} is pinned: it serves until `tailrace models unpin`")
