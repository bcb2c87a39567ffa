"""Fifty spoiled challengers, and a few sound ones: none of the former comes to serve all users, and most of the latter.

`pytest -s` on this file prints who stopped how many of each.
"""

import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.recovery import poisons
from tests.recovery.poisons import Poison
from tests.recovery.trial import Trial

SOUND_SEEDS = range(900, 904)

# Who may stop it. The first words of what is said, as patterns.
GUARDS = {
    "fine-tuning: no epoch beats the parent": r"round: nothing was learned",
    "parity": r"round: the export strays: (onnx|int8)",
    "kinship": r"round: the export strays: (not shared|weights)",
    "files as judged are published": r"round: version .* is not what was judged|round: bundle: model\.json",
    "files as published are promoted": r"round: bundle .* has \d+ bytes, published with",
    "files as exported can be opened": r"round: .*\.onnx: ",
    "gate: an order at all": r"round: spread of scores in a slate",
    "gate: the log tells": r"round: AUC within slates of either model",
    "gate: better than the champion": r"round: NDCG@10",
    "replica: sums, and the watchdog": r"watchdog: refused: bundle .*(published with|does not have the sum)",
    "watchdog: clicks": r"watchdog: (loses|could not show)",
}
KINDS: dict[str, tuple[Poison, set[str]]] = {
    "NaN": (Poison(6, of_model=poisons.put_nan), {"parity", "kinship"}),
    "shuffled labels, since mended": (
        Poison(3, of_log=poisons.shuffle_what_was_learned),
        {"fine-tuning: no epoch beats the parent", "gate: better than the champion"},
    ),
    "shuffled labels, to this day": (
        Poison(3, of_log=poisons.shuffle_everything),
        {"fine-tuning: no epoch beats the parent", "gate: the log tells"},
    ),
    "constant scores": (Poison(5, of_model=poisons.make_constant), {"parity", "gate: an order at all"}),
    "popularity only": (Poison(5, of_model=poisons.rank_by_popularity), {"gate: better than the champion"}),
    "wrong tokenizer, before parity": (Poison(3, of_model=poisons.exchange_words), {"kinship"}),
    "tokenizer that normalizes otherwise": (Poison(1, of_model=poisons.forget_lower_case), {"kinship"}),
    "wrong tokenizer, before publishing": (
        Poison(2, of_files=poisons.exchange_tokenizer_file, at="publish"),
        {"files as judged are published"},
    ),
    "wrong tokenizer, published": (
        Poison(2, of_files=poisons.exchange_tokenizer_file),
        {"replica: sums, and the watchdog"},
    ),
    "truncated file, before judging": (
        Poison(2, of_files=poisons.truncate_a_graph, at="evaluate"),
        {"files as exported can be opened"},
    ),
    "truncated file, before publishing": (
        Poison(3, of_files=poisons.truncate_any_file, at="publish"),
        {"files as judged are published"},
    ),
    "truncated file, before promotion": (
        Poison(2, of_files=poisons.truncate_any_file, at="promote"),
        {"files as published are promoted"},
    ),
    "truncated file, announced": (
        Poison(2, of_files=poisons.truncate_any_file),
        {"replica: sums, and the watchdog"},
    ),
    "flipped bit, announced": (Poison(2, of_files=poisons.flip_a_bit), {"replica: sums, and the watchdog"}),
    "inverted scores": (Poison(2, of_model=poisons.invert), {"gate: better than the champion"}),
    "permuted features": (Poison(2, of_model=poisons.permute_features), {"gate: better than the champion"}),
    "one exploding weight": (Poison(3, of_model=poisons.explode_one_weight), {"kinship", "parity"}),
    "click farm in all of the log": (Poison(2, of_log=poisons.farm_clicks), {"watchdog: clicks"}),
}
STOPPED: dict[str, Counter[str]] = {}
assert sum(poison.count for poison, _ in KINDS.values()) >= 50


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """A champion that serves, and a replica that lives through all challengers of this module."""
    made = Trial(tmp_path_factory.mktemp("trial"))
    yield made
    made.close()
    print()
    for kind, by in STOPPED.items():
        print(f"{kind:<36}", ", ".join(f"{count} by {name or 'NOBODY'}" for name, count in by.items()))


def guard(said: str) -> str:
    """Returns who said it."""
    return next((name for name, pattern in GUARDS.items() if re.match(pattern, said, re.DOTALL)), said)


@pytest.mark.parametrize("kind", KINDS)
def test_poisoned_challenger_is_stopped_or_reverted_by_the_guard_made_for_it(trial: Trial, kind: str) -> None:
    poison, expected = KINDS[kind]
    first = 100 + 10 * list(KINDS).index(kind)
    stopped = Counter(guard(trial.challenge(poison, first + number)) for number in range(poison.count))
    STOPPED[kind] = stopped
    assert set(stopped) <= expected
    pointer = trial.registry.pointer()
    assert pointer is not None and (pointer.champion, pointer.canary) == (trial.champion, None)
    assert trial.serving() == {trial.champion}


def test_sound_challengers_are_let_through_to_all_users(trial: Trial) -> None:
    said = [trial.challenge(None, seed) for seed in SOUND_SEEDS]
    STOPPED["sound"] = Counter(said)
    assert said.count("") >= 3, said
