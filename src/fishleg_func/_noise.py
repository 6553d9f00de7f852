"""Random numbers that leave the caller's random stream alone.

:class:`Noise` makes them from tensor arithmetic on a counter, so they are the same in eager and compiled code, need no
``torch.Generator`` (which does not trace), and are resumed by restoring one integer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def _signed(x: int) -> int:
    """Read the low 64 bits of ``x`` as a signed integer, which is what int64 tensors hold."""
    x &= _MASK64
    return x - (1 << 64) if x >> 63 else x


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)
_SALT = _signed(0xD1B54A32D192ED03)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros (int64's own shift copies the sign bit)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


class Noise:
    """A counter-based source of independent draws: pure functions of the counter and a salt.

    The mixing function is the finalizer of SplitMix64 (Steele, Lea & Flood, 2014).

    Args:
        seed: Any integer; equal seeds give equal draws.
        device: Where the draws are made.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.counter = torch.full((), _signed(seed * _SALT), dtype=torch.int64, device=device)

    def fork(self, salt: int) -> Noise:
        """Return an independent source for one purpose, a pure function of the counter and ``salt``."""
        child = Noise(0, self.counter.device)
        child.counter = self._bits(self.counter, -salt - 2)
        return child

    def generator(self) -> torch.Generator | None:
        """Return a generator seeded from the counter, for draws made by others; in compiled code, ``None``."""
        if torch.compiler.is_compiling():
            return None
        return torch.Generator(self.counter.device).manual_seed(int(self.counter) & (2**62 - 1))

    def advance_(self) -> None:
        """Move to the next set of draws."""
        self.counter.add_(1)

    def _bits(self, like: Tensor, salt: int) -> Tensor:
        index = torch.arange(like.numel(), dtype=torch.int64, device=like.device).view(like.shape)
        x = index + self.counter * _GOLDEN + _signed((salt + 1) * _SALT)
        x = (x ^ _shift(x, 30)) * _MIX_1
        x = (x ^ _shift(x, 27)) * _MIX_2
        return x ^ _shift(x, 31)

    def _uniform(self, like: Tensor, salt: int) -> Tensor:
        """Draw float64 uniforms in (0, 1)."""
        return (_shift(self._bits(like, salt), 11).double() + 0.5) * 2.0**-53

    def rademacher(self, like: Tensor, salt: int = 0) -> Tensor:
        """Draw signs, -1 or +1, in the shape, dtype and device of ``like``."""
        return (1 - 2 * (self._bits(like, salt) & 1)).to(like.dtype)

    def normal(self, like: Tensor, salt: int = 0) -> Tensor:
        """Draw standard normals (Box-Muller) in the shape, dtype and device of ``like``."""
        radius = (-2 * self._uniform(like, 2 * salt).log()).sqrt()
        return (radius * (2 * math.pi * self._uniform(like, 2 * salt + 1)).cos()).to(like.dtype)


_generators: dict[torch.device, torch.Generator] = {}


def new_noise(device: torch.device, generator: torch.Generator | None = None) -> Noise:
    """Return a source of new draws on ``device``, apart from the caller's global stream.

    Args:
        device: Where the draws are made.
        generator: Gives the seed; by default one that belongs to this library. In compiled code, where generators do
            not trace, the seed is zero.
    """
    if torch.compiler.is_compiling():
        return Noise(0, device)
    if generator is None:
        generator = _generators.setdefault(device, torch.Generator(device).manual_seed(torch.initial_seed()))
    return Noise(int(torch.randint(2**62, (), generator=generator, device=generator.device)), device)
