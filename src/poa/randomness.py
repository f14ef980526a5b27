"""Counter-based randomness: every draw is a pure function of a seed, a purpose and a position.

Nothing here has a state that moves. That is why results do not depend on the number of workers, and why a
resumed run equals one that never stopped.
"""

from __future__ import annotations

import zlib

import numpy as np


def seed_sequence(seed: int, purpose: str, *position: int) -> np.random.SeedSequence:
    """The entropy of one draw.

    Args:
        seed: the seed of the run, ≥ 0.
        purpose: what is drawn ("augment", "mask", …); different purposes are independent streams.
        position: where in the stream, for example (epoch, sample); each ≥ 0.
    """
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), len(position), *position])


def generator(seed: int, purpose: str, *position: int) -> np.random.Generator:
    """A NumPy generator that is a pure function of its arguments (see `seed_sequence`)."""
    return np.random.Generator(np.random.Philox(seed_sequence(seed, purpose, *position)))


def derived_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed for a foreign generator (torch's, say), a pure function of its arguments."""
    return int(seed_sequence(seed, purpose, *position).generate_state(1, np.uint64)[0] >> 1)
