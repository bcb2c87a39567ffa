"""Which feedback belongs to which shown item, and what it says of it. Pure.

Feedback that names its request belongs to that request's slate or to nothing; feedback that names none belongs to the
user's latest impression that showed the item, at most `attribution_s` before. Nothing is guessed beyond that: what
finds no slate is counted, never turned into a label.

Tables hold ids as 64-bit hashes, about 70 bytes a row, because the feedback of a whole partition is held at once: that
is what makes the result independent of the order in which a log tells things.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from tailrace.events import ACTIONS, Click, Impression, Rating
from tailrace.ids import UserId
from tailrace.settings import TrainingSettings

Hashes = NDArray[np.uint64]

RATED = len(ACTIONS)  # the kind of a rating; those of clicks are indices into ACTIONS
MIDDLE_STARS = 3.0

_DWELL_FLOOR_S = 10.0
_DWELL_DOUBLINGS = 3.0
_FEEDBACK = {
    "user": "uint64",
    "item": "uint64",
    "request": "uint64",
    "named": "bool",  # it names its request
    "event": "uint64",
    "at_ms": "int64",
    "kind": "int64",
    "gain": "float64",
    "dwell_gain": "float64",
    "stars": "float64",
}
_SHOWN = {
    "request": "uint64",
    "user": "uint64",
    "item": "uint64",
    "shown_ms": "int64",
    "known_ms": "int64",  # of when the newest event is that the impression was ranked on
    "index": "int64",
    "on_slate": "bool",
}


def hash_ids(ids: Sequence[str]) -> Hashes:
    """Returns uint64 [len(ids)], the same for the same id in every process."""
    return pd.util.hash_array(np.array(ids, dtype=object))


def feedback_table(events: Sequence[Click | Rating], settings: TrainingSettings) -> pd.DataFrame:
    """Returns a row per event: hashed ids, its kind, and its gain by the settings. `stars` are 1 to 5, or NaN."""
    gains = [getattr(settings, f"{action}_gain") for action in ACTIONS]
    rows = []
    for event in events:
        if isinstance(event, Rating):
            stars = 1.0 + 4.0 * event.share
            rows.append((event.at_ms, RATED, settings.rating_gain * (stars - MIDDLE_STARS), 0.0, stars))
        else:
            kind = ACTIONS.index(event.action)
            bonus = settings.dwell_gain * _doublings(event.dwell_s) if gains[kind] > 0 else 0.0
            rows.append((event.at_ms, kind, gains[kind], bonus, np.nan))
    table = pd.DataFrame(rows, columns=["at_ms", "kind", "gain", "dwell_gain", "stars"])
    table["user"] = hash_ids([event.user_id for event in events])
    table["item"] = hash_ids([event.item_id for event in events])
    table["request"] = hash_ids([event.request_id or "" for event in events])
    table["named"] = [event.request_id is not None for event in events]
    table["event"] = hash_ids([event.event_id for event in events])
    return table.astype(_FEEDBACK)[list(_FEEDBACK)]


def _doublings(dwell_s: float | None) -> float:
    if dwell_s is None or dwell_s <= _DWELL_FLOOR_S:
        return 0.0
    return min(float(np.log2(dwell_s / _DWELL_FLOOR_S)), _DWELL_DOUBLINGS)


class Relevant:
    """Which of the log's candidates some feedback may be about: the rest need not be kept."""

    def __init__(self, feedback: pd.DataFrame) -> None:
        named = feedback["named"].to_numpy()
        self._requests = np.unique(feedback["request"].to_numpy()[named])
        self._pairs = np.unique(_pairs(feedback["user"].to_numpy(), feedback["item"].to_numpy())[~named])

    def shown_rows(self, impressions: Sequence[Impression]) -> pd.DataFrame:
        """Returns a row per candidate of these impressions that some feedback may be about."""
        sizes = np.array([len(one.shown) + len(one.unshown) for one in impressions], dtype=np.int64)
        slates = np.array([len(one.shown) for one in impressions], dtype=np.int64)
        items = [ranked.item_id for one in impressions for ranked in (*one.shown, *one.unshown)]
        index = np.arange(len(items)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        columns = {
            "request": np.repeat(hash_ids([one.request_id for one in impressions]), sizes),
            "user": np.repeat(hash_ids([one.user_id for one in impressions]), sizes),
            "item": hash_ids(items),
            "shown_ms": np.repeat([one.at_ms for one in impressions], sizes),
            "known_ms": np.repeat([known_ms(one) for one in impressions], sizes),
            "index": index,
            "on_slate": index < np.repeat(slates, sizes),
        }
        asked_for = _contains(self._requests, columns["request"])
        asked_for |= columns["on_slate"] & _contains(self._pairs, _pairs(columns["user"], columns["item"]))
        return pd.DataFrame({name: column[asked_for] for name, column in columns.items()}).astype(_SHOWN)


def known_ms(impression: Impression) -> int:
    """Returns when the newest event happened that the impression's profile knew of; its own time where none did."""
    return impression.at_ms - (impression.profile_age_ms or 0)


def _pairs(users: Hashes, items: Hashes) -> Hashes:
    mixed: Hashes = users * np.uint64(0x9E3779B97F4A7C15) + items  # wraps around
    return mixed


def _contains(ordered: Hashes, values: Hashes) -> NDArray[np.bool_]:
    if not len(ordered):
        return np.zeros(len(values), dtype=np.bool_)
    at = np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)
    found: NDArray[np.bool_] = ordered[at] == values
    return found


class Attribution(NamedTuple):
    """What became of the feedback.

    `labels` has a row per request and index that got any: `gain` (0 or more), `clicked`, `refused`, `stars` (NaN: not
    rated) and `delay_s`, the seconds from showing to the first positive (NaN: none). It is sorted by request. `counts`
    is named as in `training.examples.JoinCounts`.
    """

    labels: pd.DataFrame
    counts: dict[str, int]


def attribute(
    shown: pd.DataFrame,
    feedback: pd.DataFrame,
    forgotten: Mapping[UserId, int],
    *,
    cutoff_ms: int,
    attribution_ms: float,
) -> Attribution:
    """Returns the labels that `feedback` gives to what was `shown`.

    `forgotten` says up to when users asked to be forgotten. Times are event times. Feedback that names its request may
    be stamped before it, since clocks differ; what is stamped after `cutoff_ms` is left to the next round.
    """
    counts = {"feedback": len(feedback)}
    # 1. An event sent twice is one event; none counts that is not due yet, or whose user asked to be forgotten.
    feedback = feedback.sort_values(list(_FEEDBACK), ignore_index=True)
    again = feedback.assign(rated=feedback["kind"] == RATED).duplicated(["user", "rated", "event"])
    early = ~again & (feedback["at_ms"] > cutoff_ms)
    erased = ~again & ~early & (feedback["at_ms"] <= forgotten_ms(feedback["user"], forgotten))
    counts |= {"duplicate": int(again.sum()), "early": int(early.sum()), "forgotten": int(erased.sum())}
    feedback = feedback[~(again | early | erased)]
    shown = shown[shown["known_ms"] > forgotten_ms(shown["user"], forgotten)]
    shown = shown.drop_duplicates(["request", "item"])

    # 2. By request: its own slate or nothing.
    by_request = feedback[feedback["named"]].merge(shown, on=["request", "user", "item"], how="left")
    known = pd.MultiIndex.from_frame(by_request[["request", "user"]]).isin(
        pd.MultiIndex.from_frame(shown[["request", "user"]])
    )
    on_slate = by_request["on_slate"].eq(True).to_numpy()
    late = on_slate & (by_request["at_ms"] - by_request["shown_ms"] > attribution_ms).to_numpy()
    joined = by_request[on_slate & ~late]
    counts |= {"late": int(late.sum()), "unshown": int((known & ~on_slate).sum()), "by_request": len(joined)}

    # 3. Without one: the latest impression that showed the item to the user.
    unnamed = feedback[~feedback["named"]].drop(columns="request").sort_values("at_ms", kind="stable")
    slates = shown[shown["on_slate"]].sort_values(["shown_ms", "request"]).reset_index(drop=True)
    by_item = pd.merge_asof(
        unnamed,
        slates[["user", "item", "shown_ms"]].assign(row=slates.index),
        left_on="at_ms",
        right_on="shown_ms",
        by=["user", "item"],
        tolerance=int(attribution_ms),
    )
    found = by_item[by_item["row"].notna()]
    # By row, since 64-bit hashes would not survive the NaN of those not found.
    rows = found["row"].to_numpy(dtype=np.int64)
    found = found.assign(request=slates["request"].to_numpy()[rows], index=slates["index"].to_numpy()[rows])
    counts |= {"by_item": len(found), "orphans": int((~known).sum()) + len(by_item) - len(found)}

    # 4. What it all says of each shown item.
    columns = ["request", "index", "kind", "at_ms", "event", "gain", "dwell_gain", "stars", "shown_ms"]
    assigned = pd.concat([joined[columns], found[columns]]).astype({"request": "uint64", "index": "int64"})
    labels, actions = _labels(assigned)
    return Attribution(labels, counts | {"repeated_actions": len(assigned) - actions})


def forgotten_ms(users: pd.Series, forgotten: Mapping[UserId, int]) -> pd.Series:
    """Returns for each hashed user up to when they asked to be forgotten; before all time for who did not."""
    moments = pd.Series(list(forgotten.values()), index=hash_ids(list(forgotten)), dtype="int64")
    return users.map(moments).fillna(-1.0)


def _labels(assigned: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """Returns the labels, and how many events they rest on: an action counts once, and so does the last rating."""
    assigned = assigned.sort_values(["request", "index", "kind", "at_ms", "event"])
    once = assigned.drop_duplicates(["request", "index", "kind"], keep="last")
    where = ["request", "index"]
    labels = once.assign(clicked=once["gain"] > 0).groupby(where).agg({"gain": "sum", "clicked": "any", "stars": "max"})
    labels["gain"] += assigned.groupby(where)["dwell_gain"].max()
    labels["refused"] = ~labels["clicked"] & (labels["gain"] < 0)
    labels["gain"] = labels["gain"].clip(lower=0.0)
    # Clocks differ, so what happened before it could is taken to have happened at once.
    delay_s = ((assigned["at_ms"] - assigned["shown_ms"]) / 1000).clip(lower=0.0)
    labels["delay_s"] = assigned.assign(delay_s=delay_s)[assigned["gain"] > 0].groupby(where)["delay_s"].min()
    return labels.reset_index(), len(once)
