"""How a vector of numbers travels between workers: as it is, in bfloat16, or in 4-bit floats with a scale per block.

Only what travels is rounded. Whoever receives decodes to float32 and adds up in float32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from moekit.errors import OptionError


class Codec(ABC):
    """float32 [N] <-> uint8 [nbytes(N)]."""

    NAME: ClassVar[str]

    @abstractmethod
    def nbytes(self, count: int) -> int:
        """Bytes of ``count`` encoded numbers."""

    @abstractmethod
    def encode(self, x_N: Tensor) -> Tensor:
        """Raises :class:`OptionError` where a number is not finite and the code cannot say so."""

    @abstractmethod
    def decode(self, code: Tensor, count: int) -> Tensor: ...


class Float32(Codec):
    """The bits themselves."""

    NAME = "float32"

    def nbytes(self, count: int) -> int:
        return 4 * count

    def encode(self, x_N: Tensor) -> Tensor:
        return x_N.float().contiguous().view(torch.uint8)

    def decode(self, code: Tensor, count: int) -> Tensor:
        return code.view(torch.float32)


class BFloat16(Codec):
    """Rounded to 8 significant bits; a relative error of at most 2^-8."""

    NAME = "bfloat16"

    def nbytes(self, count: int) -> int:
        return 2 * count

    def encode(self, x_N: Tensor) -> Tensor:
        return x_N.to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, code: Tensor, count: int) -> Tensor:
        return code.view(torch.bfloat16).float()


class FP4(Codec):
    """E3M0: a sign and three bits of exponent, so 0 and the powers of two from 1/4 to 16, times a scale per block.

    A block is 128 numbers; its scale (float32) maps the largest to 16, without which the seven powers would miss what
    is sent. A number goes to the nearest value: |error| <= max(|x| / 3, largest of its block / 128).
    """

    NAME = "fp4"
    BLOCK = 128
    TOP, LOWEST = 4, -2
    """Exponents of the largest and of the smallest magnitude that is not zero."""

    def nbytes(self, count: int) -> int:
        return 4 * -(-count // self.BLOCK) + -(-count // 2)

    def encode(self, x_N: Tensor) -> Tensor:
        count = len(x_N)
        blocks = -(-count // self.BLOCK)
        x = x_N.new_zeros(blocks * self.BLOCK, dtype=torch.float32)
        x[:count] = x_N
        x = x.view(blocks, self.BLOCK)
        scale = x.abs().amax(1, keepdim=True) / 2**self.TOP
        if not bool(torch.isfinite(scale).all()):
            raise OptionError("a difference to be sent in 4 bits is not finite: lower the learning rate of the workers")
        size = torch.where(scale > 0, x.abs() / scale, 0.0)
        part, exponent = torch.frexp(size)  # size = part * 2^exponent with part in [1/2, 1)
        power = (exponent - 1 + (part >= 0.75)).clamp(self.LOWEST, self.TOP)
        code = torch.where(size < 2.0 ** (self.LOWEST - 1), 0, power - self.LOWEST + 1)
        nibble = (code + 8 * (x < 0)).to(torch.uint8).view(-1)
        packed = (nibble[0::2] | nibble[1::2] << 4)[: -(-count // 2)]
        return torch.cat([scale.view(-1).view(torch.uint8), packed])

    def decode(self, code: Tensor, count: int) -> Tensor:
        blocks = -(-count // self.BLOCK)
        scale = code[: 4 * blocks].clone().view(torch.float32)
        nibble = torch.stack([code[4 * blocks :] & 15, code[4 * blocks :] >> 4], dim=1).view(-1)[:count]
        at = torch.arange(8, dtype=torch.float32)
        magnitude = torch.where(at > 0, torch.exp2(at + self.LOWEST - 1), 0.0)
        values = torch.cat([magnitude, -magnitude])[nibble.long()]
        return values * scale.repeat_interleave(self.BLOCK)[:count]


CODECS: dict[str, Codec] = {codec.NAME: codec for codec in (Float32(), BFloat16(), FP4())}


def codec(name: str) -> Codec:
    """Raises :class:`OptionError` for a name that is none of :data:`CODECS`."""
    if name not in CODECS:
        raise OptionError(f"codec {name!r} is unknown: choose one of {', '.join(CODECS)}")
    return CODECS[name]
