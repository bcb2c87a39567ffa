"""Which numbers a fine-tune works in: bf16 where that is faster, float32 elsewhere."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial

import torch

from tailrace.settings import TrainingSettings

Precision = Callable[[], AbstractContextManager[object]]

_TOKENS, _HIDDEN, _WIDE = 2048, 384, 1536  # a product of the smallest BERT, as a pass over some thirty texts has it
_TRIES = 3
_WORTH_IT = 0.8  # of the time in float32: a tie is decided the same way every time


def choose_precision(settings: TrainingSettings) -> tuple[str, Precision]:
    """Returns the precision to work in, bf16 or fp32, and what turns it on: automatic mixed precision, or nothing."""
    name = settings.precision
    if name == "auto":
        name = "bf16" if _bf16_pays(settings.device) else "fp32"
    if name == "fp32":
        return name, nullcontext
    return name, partial(torch.autocast, settings.device, dtype=torch.bfloat16)


@cache
def _bf16_pays(device: str) -> bool:
    """Whether products are faster in bf16. A processor's flags do not tell: a Xeon with AVX-512 BF16 but without AMX
    takes twice as long over them as in float32, one with AMX a fraction of it.
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
