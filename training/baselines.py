"""What Tailrace is measured against: decayed popularity, with and without age, newest first, chance, and LambdaRank.

The popularity rules keep their own counts, apart from `tailrace.counters`, so that an error there cannot flatter us.
LambdaRank (Burges 2010) is LightGBM's, on the very numbers that the model's head sees.

Shapes: R rows of the catalogue, N candidates, F features, S rows of all slates together.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from training.examples import Example

Rows = NDArray[np.int64]
Reals = NDArray[np.float64]
Floats = NDArray[np.float32]

POPULARITY_S = 6 * 3600.0
USERS_S = 2 * 3600.0
# Added to an age, so that an item of this very second is not infinitely popular. An hour is customary; a minute is the
# stronger rule where new items matter most.
_HOUR_S, _MINUTE_S = 3600.0, 60.0

# Small trees and slow steps: a few thousand slates tell no more. Truncation at 30 keeps the pairs that decide ranks.
_LAMBDARANK = {
    "objective": "lambdarank",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 50,
    "feature_fraction": 0.5,
    "bagging_fraction": 0.8,
    "bagging_freq": 1,
    "lambda_l2": 1.0,
    "lambdarank_truncation_level": 30,
    "max_bin": 127,
    "metric": "ndcg",
    "eval_at": [10],
    "verbosity": -1,
    "deterministic": True,
    "force_row_wise": True,
}


class DecayedCounts:
    """Counts by row that lose 1/e of themselves in every time constant; an infinite one keeps all."""

    def __init__(self, time_constant_s: float) -> None:
        self._constant_ms = time_constant_s * 1000
        self._sums_R = np.zeros(1024)
        self._held_ms_R = np.zeros(1024, dtype=np.int64)

    def add(self, row: int, at_ms: int) -> None:
        """Counts one event; events come in time order."""
        while row >= len(self._sums_R):
            self._sums_R = np.concatenate([self._sums_R, np.zeros_like(self._sums_R)])
            self._held_ms_R = np.concatenate([self._held_ms_R, np.zeros_like(self._held_ms_R)])
        kept = np.exp((self._held_ms_R[row] - at_ms) / self._constant_ms)
        self._sums_R[row] = self._sums_R[row] * kept + 1.0
        self._held_ms_R[row] = at_ms

    def at(self, rows_N: Rows, now_ms: int) -> Reals:
        """Returns float64 [N]: the rows' counts now; 0 for a row never counted."""
        known_N = rows_N < len(self._sums_R)
        rows_N = np.where(known_N, rows_N, 0)
        kept_N = np.exp(np.minimum(self._held_ms_R[rows_N] - now_ms, 0) / self._constant_ms)
        result: Reals = self._sums_R[rows_N] * kept_N * known_N
        return result


def by_root_of_age(popularity_N: Reals, age_s_N: Reals, softened_s: float) -> Reals:
    """Returns float64 [N]: popularity divided by the root of the age plus `softened_s`."""
    result: Reals = popularity_N / np.sqrt(age_s_N + softened_s)
    return result


class PopularityRules:
    """The rules that need no model, learning from every event in time order."""

    def __init__(self) -> None:
        self._all, self._events = DecayedCounts(np.inf), DecayedCounts(POPULARITY_S)
        self._users = DecayedCounts(USERS_S)
        self._born_ms: dict[int, int] = {}

    def learn(self, row: int, at_ms: int, *, first_touch: bool) -> None:
        """Counts one event on the item in `row`; `first_touch`: the user's first on that item."""
        self._born_ms.setdefault(row, at_ms)
        self._all.add(row, at_ms)
        self._events.add(row, at_ms)
        if first_touch:
            self._users.add(row, at_ms)

    def scores(self, rows_N: Rows, now_ms: int, rng: np.random.Generator) -> dict[str, Reals]:
        """Returns float64 [N] of every rule by its name."""
        age_s_N = np.array([now_ms - self._born_ms[row] for row in rows_N.tolist()], dtype=np.float64) / 1000
        popular_N = self._events.at(rows_N, now_ms)
        return {
            "random": rng.random(len(rows_N)),
            "all-time popularity": self._all.at(rows_N, now_ms),
            "newest first": -age_s_N,
            "popularity, 6 h": popular_N,
            "unique users, 2 h": self._users.at(rows_N, now_ms),
            "popularity, 6 h, by root of age": by_root_of_age(popular_N, age_s_N, _HOUR_S),
            "popularity, 6 h, by root of age to the minute": by_root_of_age(popular_N, age_s_N, _MINUTE_S),
        }


class LambdaRank:
    """A LightGBM LambdaRank over late features."""

    def __init__(self, *, rounds: int = 300, patience: int = 30, seed: int = 0, threads: int = 1) -> None:
        self._rounds = rounds
        self._patience = patience
        self._parameters = _LAMBDARANK | {"seed": seed, "num_threads": threads}
        self._booster: Any = None

    def fit(self, slates: Sequence[Example], stop_share: float = 0.1) -> Self:
        """Learns from the slates, in time order; the newest `stop_share` of them say how many trees are enough.

        Raises ValueError where there are too few for both.
        """
        import lightgbm

        cut = len(slates) - max(round(len(slates) * stop_share), 1)
        if cut < 1:
            raise ValueError(f"{len(slates)} slates are too few to learn from and to stop by")
        train, stop = _stack(slates[:cut], lightgbm), _stack(slates[cut:], lightgbm)
        self._booster = lightgbm.train(
            self._parameters,
            train,
            num_boost_round=self._rounds,
            valid_sets=[stop],
            callbacks=[lightgbm.early_stopping(self._patience, verbose=False)],
        )
        return self

    def scores(self, features_NF: Floats) -> Reals:
        """Returns float64 [N]. Raises ValueError before `fit`."""
        if self._booster is None:
            raise ValueError("LambdaRank has learned nothing yet")
        result: Reals = self._booster.predict(features_NF, num_threads=self._parameters["num_threads"])
        return result


class TfIdf:
    """Cosines of TF-IDF vectors of words, with document frequencies from the texts it is made with."""

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectors = TfidfVectorizer(stop_words="english", sublinear_tf=True).fit(sorted(set(texts)))

    def scores(self, history: Sequence[str], texts_N: Sequence[str]) -> Reals:
        """Returns float64 [N]: each text's cosine to the mean of the history's vectors."""
        mean_V = np.asarray(self._vectors.transform(history).mean(axis=0)).ravel()
        near_N = self._vectors.transform(texts_N) @ mean_V  # rows have unit length, and the mean's does not matter
        result: Reals = np.asarray(near_N, dtype=np.float64)
        return result


def _stack(slates: Sequence[Example], lightgbm: Any) -> Any:
    features_SF = np.concatenate([slate.features_NF for slate in slates])
    gains_S = np.concatenate([slate.gains_N for slate in slates])
    return lightgbm.Dataset(features_SF, (gains_S > 0).astype(np.int8), group=[len(one.gains_N) for one in slates])
