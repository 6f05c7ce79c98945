"""Random numbers that depend on a key alone, and sums in 16 bits that lose nothing on average.

What the gradient methods share that update by themselves. A whole parameter of n elements is cut into pieces of `PIECE`
elements, each with a generator of its own, keyed by whatever the caller names and the piece's number: so a rank that
holds a share of the parameter makes the same numbers for it as one that holds the whole, and never all of them at once.

In 16 bits a weight w does not move by an update below half of its distance to the next number: bf16 has 8 significant
bits, so most updates of a fine-tuning at rates of 1e-6 would be lost. `add` rounds stochastically: up with the
probability that makes the sum right on average (as `mezo` and `lomo` need, which keep no fp32 copy of the weights).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

PIECE = 1 << 22
DROPPED_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of an fp32 number's 23, beyond those that are kept


@dataclass(frozen=True)
class Piece:
    """Some elements of a flat parameter: `size` elements in the whole piece, of which [first, last) are wanted.

    `first` and `last` count from the parameter's first element, `start` is the piece's own first.
    """

    number: int
    start: int
    size: int
    first: int
    last: int

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The wanted elements of a tensor of the piece's size."""
        return whole[self.first - self.start : self.last - self.start]


def pieces(numel: int, first: int = 0, count: int | None = None) -> Iterator[Piece]:
    """The pieces of a flat parameter that a share of it touches.

    Args:
        numel: Elements of the parameter.
        first: The share's first element.
        count: Elements of the share; None: all from `first` on.

    Yields:
        The pieces in order.
    """
    last = numel if count is None else first + count
    for start in range(first // PIECE * PIECE, last if first < last else 0, PIECE):
        size = min(PIECE, numel - start)
        yield Piece(start // PIECE, start, size, max(first, start), min(last, start + size))


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator whose numbers depend on the key and on the kind of device alone."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def normal(piece: Piece, source: torch.Generator) -> torch.Tensor:
    """The piece's wanted standard normal numbers, fp32."""
    return piece.cut(torch.randn(piece.size, generator=source, device=source.device))


@torch.no_grad()
def add(target: torch.Tensor, change: torch.Tensor, scale: float, piece: Piece, source: torch.Generator) -> None:
    """Add `scale * change` to a part of a weight, in place; in 16 bits stochastically rounded.

    With fp32's bits of the sum, a random number below the value of the lowest kept bit is added to those that are
    dropped: E[result] = sum, and a sum that can be kept is kept exactly.

    Args:
        target: Elements [first, last) of the piece, flat, of any floating dtype.
        change: As many, on the device of `source`.
        scale: What the change is multiplied with.
        piece: Where they belong; the random numbers are those of the whole piece.
        source: The piece's generator, after what else was drawn from it.
    """
    dropped = DROPPED_BITS.get(target.dtype)
    if dropped is None:
        target.add_(change.to(target), alpha=scale)
        return
    total = target.to(change.device, torch.float32, copy=True).add_(change, alpha=scale)
    noise = torch.randint(1 << dropped, (piece.size,), generator=source, device=source.device, dtype=torch.int32)
    noise = piece.cut(noise)
    if target.dtype == torch.float16:  # below its smallest normal number, the numbers it has are 2^-24 apart
        even = (total.abs() * 2.0**24 + noise / 2.0**dropped).floor_().mul_(2.0**-24).copysign_(total)
        tiny = total.abs() < torch.finfo(torch.float16).tiny
    bits = total.view(torch.int32)
    bits.add_(noise).bitwise_and_(-1 << dropped)
    target.copy_(torch.where(tiny, even, total) if target.dtype == torch.float16 else total)
