"""The arm that knows the world's laws infers tastes from slates and clicks, and from nothing else."""

import numpy as np
import pytest

from deploy.demo import load_books
from deploy.informed import Informed
from tailrace.world import Moment, World

NOON = Moment(hours=12.0, device="desktop")


@pytest.fixture(scope="module")
def world() -> World:
    return World(load_books(), seed=1)


def live(world: World, visits: int) -> tuple[float, float, float, float]:
    """Clicks expected of what a stranger gets, of the last slate, of random ones and of the best, over 12 readers."""
    informed, rng = Informed(world), np.random.default_rng(5)
    worth = np.zeros((12, 4))
    for number in range(12):
        reader = world.reader(number)
        for visit in range(visits):
            slate = informed.slate(reader.user_id, NOON, 8, world.item_ids)
            if visit == 0:
                worth[number, 0] = world.expected_clicks(reader, slate, NOON)
            shown = [world.item_ids[row] for row in rng.permutation(len(world.item_ids))[:8]] if visit % 2 else slate
            clicked = {one.item_id for one in world.react(reader, shown, NOON, rng) if one.action == "click"}
            reader.read.clear()  # joys that last: what is inferred is all that changes
            informed.learn(reader.user_id, shown, clicked)
        last = informed.slate(reader.user_id, NOON, 8, world.item_ids)
        worth[number, 1] = world.expected_clicks(reader, last, NOON)
        worth[number, 2] = 8 * world.attraction(reader, NOON).mean() * world.examination(reader, 8).mean()
        worth[number, 3] = world.expected_clicks(reader, world.best_slate(reader, 8, NOON), NOON)
    stranger, known, chance, best = worth.mean(0)
    return float(stranger), float(known), float(chance), float(best)


def test_it_learns_most_of_what_there_is_to_know_and_never_beats_the_oracle(world: World) -> None:
    stranger, known, chance, best = live(world, visits=60)
    assert known < best
    assert (known - chance) / (best - chance) > 0.75
    assert stranger < 0.5 * known


def test_slate_holds_only_what_may_be_shown(world: World) -> None:
    among = world.item_ids[:20]
    slate = Informed(world).slate(world.reader(3).user_id, NOON, 8, among)
    assert len(set(slate)) == 8 and set(slate) <= set(among)
