"""Stands in for einops, jaxtyping and the compiled kernels in an exported folder, which has none of them."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor


class Float:
    """An annotation such as Float[Tensor, "B T"], without a check of the shape."""

    def __class_getitem__(cls, annotation: tuple[type, str]) -> type:
        return annotation[0]


Int = Bool = Shaped = Float


def rearrange(x: Tensor, pattern: str, **sizes: int) -> Tensor:
    """`einops.rearrange` for patterns that split, permute and join axes, and add axes of size 1."""
    before, after = parse(pattern)
    for dim, group in reversed(list(enumerate(before))):
        if len(group) > 1:
            x = x.unflatten(dim, [sizes.get(axis, -1) for axis in group])
    axes = [axis for group in before for axis in group]
    x = x.permute([axes.index(axis) for group in after for axis in group if axis != "1"])
    for dim, group in enumerate(after):
        if group == ("1",):
            x = x.unsqueeze(dim)
        elif len(group) > 1:
            x = x.flatten(dim, dim + len(group) - 1)
    return x


@cache
def parse(pattern: str) -> list[list[tuple[str, ...]]]:
    """The axes on both sides of a pattern, those in brackets together."""
    sides = (re.findall(r"\(([^)]*)\)|(\S+)", side) for side in pattern.split("->"))
    return [[tuple((group or name).split()) for group, name in side] for side in sides]


def __getattr__(name: str) -> Callable[..., Any]:
    """Stands for every function that finds or runs compiled kernels: it finds none."""
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: ()
