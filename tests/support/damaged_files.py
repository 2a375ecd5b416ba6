"""Files damaged at random places."""

from __future__ import annotations

import random


def damaged(data, seed):
    """`data` cut short, with a bit turned over, or with some bytes as nulls."""
    draw = random.Random(seed)
    place = draw.randrange(len(data) - 1)
    if seed % 3 == 0:
        return data[:place]
    new = bytearray(data)
    if seed % 3 == 1:
        new[place] ^= 1 << draw.randrange(8)
    else:
        count = min(draw.randrange(1, 600), len(data) - place)
        new[place : place + count] = bytes(count)
        if new == data:
            new[place] ^= 1
    return bytes(new)
