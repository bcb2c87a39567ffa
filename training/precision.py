"""Which numbers a fine-tune works in: bf16 where that is faster, float32 elsewhere."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Literal

import torch

from tailrace.settings import TrainingSettings
from training.team import ALONE, Team

Precision = Callable[[], AbstractContextManager[object]]

_TOKENS, _HIDDEN, _WIDE = 2048, 384, 1536  # a product of the smallest BERT, as a pass over some thirty texts has it
_TRIES = 3
_WORTH_IT = 0.8  # of the time in float32: a tie is decided the same way every time


def choose_precision(settings: TrainingSettings, team: Team = ALONE) -> Literal["bf16", "fp32"]:
    """Returns the precision to work in; of a team all get what the first would choose."""
    if settings.precision != "auto":
        return settings.precision
    pays = torch.tensor(float(_bf16_pays(settings.device)), device=settings.device)
    return "bf16" if team.as_leader(pays) else "fp32"


def precision_of(name: Literal["bf16", "fp32"], device: str) -> Precision:
    """Returns what turns a precision on: automatic mixed precision, or nothing."""
    return nullcontext if name == "fp32" else partial(torch.autocast, device, dtype=torch.bfloat16)


@cache
def _bf16_pays(device: str) -> bool:
    """Whether products are faster in bf16, as they are on every card that has it.

    A processor's flags do not tell: a Xeon with AVX-512 BF16 but without AMX takes twice as long over them as in
    float32, one with AMX a third.
    """
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if not torch.cpu._is_avx512_bf16_supported():
        return False
    states, weights = torch.zeros(_TOKENS, _HIDDEN), torch.zeros(_WIDE, _HIDDEN)
    took_s: dict[bool, list[float]] = {False: [], True: []}
    with torch.no_grad():
        for _ in range(1 + _TRIES):  # the first warms up, and is the slowest
            for half in took_s:
                started = time.perf_counter()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
                    torch.nn.functional.linear(states, weights)
                took_s[half].append(time.perf_counter() - started)
    return min(took_s[True]) < _WORTH_IT * min(took_s[False])
