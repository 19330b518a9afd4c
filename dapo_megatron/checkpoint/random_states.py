"""The states of all random number generators of a rank, as tensors.

Nothing of the package draws from them in training: prompts, responses and packing have seeds of their own. A loss, a
reward or a model of the user's may.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

_TRACKER = "megatron."


def random_states() -> dict[str, Tensor]:
    """Return Python's, NumPy's, torch's (CPU and this rank's GPU) and Megatron's states."""
    version, words, gauss = random.getstate()
    name, keys, place, has_gauss, cached = np.random.get_state(legacy=True)
    assert version == 3 and name == "MT19937"
    states = {
        "python.words": torch.tensor(words, dtype=torch.int64),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy.words": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy.place": torch.tensor([place, has_gauss], dtype=torch.int64),
        "numpy.gauss": torch.tensor([cached], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states | {f"{_TRACKER}{name}": state for name, state in _tracker().get_states().items()}


def restore_random_states(states: dict[str, Tensor]) -> None:
    """Continue the generators where `random_states` found them."""
    gauss = states["python.gauss"].tolist()
    random.setstate((3, tuple(states["python.words"].tolist()), gauss[0] if gauss else None))
    place, has_gauss = states["numpy.place"].tolist()
    words = states["numpy.words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, place, has_gauss, float(states["numpy.gauss"])))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    tracked = {name.removeprefix(_TRACKER): state for name, state in states.items() if name.startswith(_TRACKER)}
    _tracker().set_states(tracked)


def _tracker() -> Any:
    return get_cuda_rng_tracker()
