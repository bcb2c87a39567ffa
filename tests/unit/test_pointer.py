"""Which version a user gets: a stable hash, in the stated share, of other users for every canary."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.ids import ModelVersion, UserId
from tailrace.pointer import Pointer, assigned_version

EXPECTED = ["v2", "v2", "v2", "v1", "v2", "v2", "v2", "v2"]
USERS = [UserId(f"user-{number}") for number in range(20_000)]


def pointer(canary: str | None = "v2", share: float = 0.2) -> Pointer:
    return Pointer(
        generation=2,
        champion=ModelVersion("v1"),
        history=[],
        reason="canary",
        updated_at=datetime(2026, 11, 23, tzinfo=UTC),
        canary=None if canary is None else ModelVersion(canary),
        canary_share=share,
    )


def taken(where: Pointer) -> set[UserId]:
    return {user_id for user_id in USERS if assigned_version(user_id, where) == where.canary}


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.99])
def test_the_canary_takes_its_share_of_the_users(share: float) -> None:
    # Four standard errors of a binomial share.
    tolerance = 4 * (share * (1 - share) / len(USERS)) ** 0.5
    assert abs(len(taken(pointer(share=share))) / len(USERS) - share) < tolerance


@given(st.text(min_size=1), st.floats(min_value=0.001, max_value=0.999))
def test_a_user_without_a_canary_has_the_champion_and_a_wider_canary_keeps_its_users(user: str, share: float) -> None:
    user_id = UserId(user)
    assert assigned_version(user_id, pointer(canary=None, share=0.0)) == "v1"
    if assigned_version(user_id, pointer(share=share)) == "v2":
        assert assigned_version(user_id, pointer(share=(1 + share) / 2)) == "v2"


def test_assignment_is_the_same_in_every_process_and_release() -> None:
    # Written down once: these must never change while a canary runs.
    assert [assigned_version(UserId(f"user-{number}"), pointer(share=0.5)) for number in range(8)] == EXPECTED


def test_another_canary_takes_other_users() -> None:
    first, second = taken(pointer("v2", 0.2)), taken(pointer("v3", 0.2))
    shared = len(first & second) / len(USERS)
    assert abs(shared - 0.04) < 0.01  # as if drawn independently
