"""When the next round is due. Pure."""

import re
from dataclasses import dataclass

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


@dataclass(frozen=True)
class Schedule:
    """Rounds every so often, after so many new impressions, or whichever comes first where both are stated."""

    every_s: float | None = None
    after_examples: int | None = None

    def is_due(self, since_s: float, new_impressions: int, *, canary_runs: bool) -> bool:
        """Whether a round is due, `since_s` after the last one began. Never while a canary is on trial: it is the
        next round's parent, or is about to be taken back.

        >>> Schedule(every_s=60).is_due(61, 0, canary_runs=False)
        True
        """
        if canary_runs:
            return False
        return (self.every_s is not None and since_s >= self.every_s) or (
            self.after_examples is not None and new_impressions >= self.after_examples
        )


def parse_duration(text: str) -> float:
    """Returns seconds. Raises ValueError for what is not a number above 0 with s, m, h or d.

    >>> parse_duration("15m")
    900.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if found is None or float(found[1]) == 0:
        raise ValueError(f"{text!r} is no duration: a number above 0 with s, m, h or d, such as 15m")
    return float(found[1]) * _UNITS[found[2]]
