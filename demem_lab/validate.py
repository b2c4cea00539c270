"""One place for the sentences that bad input ends in: each names the value, the allowed range and the fix.

>>> finite("noise_multiplier", -1.0, low=0)
Traceback (most recent call last):
    ...
ValueError: noise_multiplier must be finite and >= 0, got -1.0
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any


def finite(name: str, value: float, *, low: float | None = None, high: float | None = None, fix: str = "") -> float:
    """`value` as a float; ValueError unless it is a finite number with low <= value <= high. Text is no number, nor is True."""
    bounds = [f"{sign} {bound:g}" for sign, bound in ((">=", low), ("<=", high)) if bound is not None]
    wanted = " and ".join(["finite", *bounds])
    try:
        # callers go on with what they gave, so text must not pass because it could be converted
        number = float(None if isinstance(value, (str, bytes, bool)) else value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(_sentence(f"{name} must be a number, {wanted}, got {value!r}", fix)) from None
    outside = (low is not None and number < low) or (high is not None and number > high)
    if not math.isfinite(number) or outside:
        raise ValueError(_sentence(f"{name} must be {wanted}, got {value!r}", fix))
    return number


def integer(name: str, value: int, *, low: int | None = None, high: int | None = None, fix: str = "") -> int:
    """`value` as an int; ValueError unless it is a whole number with low <= value <= high. 10.0 is none: write 10."""
    number = finite(name, value, low=low, high=high, fix=fix)
    try:
        return operator.index(value)
    except TypeError:
        # callers go on with what they gave, and range(10.0) would be a sentence of Python's
        fix = f"write {int(number)}" if number == int(number) else fix
        raise ValueError(_sentence(f"{name} must be a whole number, got {value!r}", fix)) from None


def choice(name: str, value: Any, allowed: Iterable[Any], *, fix: str = "") -> Any:
    """`value`; ValueError unless it is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(_sentence(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}", fix))
    return value


def instance(name: str, value: Any, kind: type = object, *, having: str = "__class__", example: str) -> Any:
    """`value`; ValueError unless it is an object of that kind, with that method: its class or its name will not do."""
    if isinstance(value, type) or not isinstance(value, kind) or not hasattr(value, having):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        wanted = "an object" if kind is object else f"{article} {kind.__name__},"
        raise ValueError(f"{name} must be {wanted} such as {example}, got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """`value` for a sentence: classes and functions by their name, large things by what they are."""
    if callable(value) and hasattr(value, "__name__"):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    text = repr(value)
    return text if len(text) <= 100 and "\n" not in text else f"a {type(value).__name__}"


def images(x: Any) -> None:
    """ValueError unless `x` is a float tensor [N, C, H, W] with N >= 1 and every pixel in [0, 1] (NaN is not)."""
    if getattr(x, "ndim", None) != 4 or 0 in x.shape:
        raise ValueError(f"images must have shape [N, C, H, W] with no empty axis, got {_shape(x)}; add the missing axes")
    if not x.is_floating_point():
        raise ValueError(f"images must be floating point in [0, 1], got {x.dtype}; divide 8-bit pixels by 255")
    low, high = float(x.min()), float(x.max())  # NaN anywhere makes both NaN, so this one comparison sees it
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"pixels must lie in [0, 1], got values from {low:g} to {high:g}; rescale or remove them")


def labels(y: Any, *, n: int, classes: int) -> None:
    """ValueError unless `y` is an int64 tensor [n] of labels in 0..classes-1."""
    if getattr(y, "ndim", None) != 1 or len(y) != n:
        raise ValueError(f"labels must have shape [{n}], one for each image, got {_shape(y)}")
    if str(y.dtype).split(".")[-1] != "int64":
        raise ValueError(f"labels must be int64, got {y.dtype}; convert with .long()")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}, got values from {low} to {high}")


def member_mask(mask: Any, *, n: int, models: int | None = None) -> None:
    """ValueError unless `mask` is bool [models, n] and every model has at least one member."""
    if getattr(mask, "ndim", None) != 2 or mask.shape[1] != n or (models is not None and mask.shape[0] != models):
        wanted = f"[{'models' if models is None else models}, {n}]"
        raise ValueError(f"the membership mask must have shape {wanted}, one column for each sample, got {_shape(mask)}")
    if str(mask.dtype).split(".")[-1] != "bool":
        fix = "convert with .bool()" if hasattr(mask, "detach") else "compare it with a number, or convert with .astype(bool)"
        raise ValueError(f"the membership mask must be bool, got {mask.dtype}; {fix}")
    if not mask.shape[0]:
        raise ValueError("the membership mask has no rows; train at least one model")
    empty = [m for m in range(mask.shape[0]) if not bool(mask[m].any())]
    if empty:
        raise ValueError(f"every model needs at least one member, models {empty[:5]} have none")


def flags(name: str, mask: Any, *, n: int) -> None:
    """ValueError unless `mask` is a bool array [n] or [M, n]; nobody and everybody are legal."""
    if getattr(mask, "ndim", None) not in (1, 2) or mask.shape[-1] != n:
        raise ValueError(f"{name} must have one entry for each of the {n} samples, got shape {_shape(mask)}")
    if str(mask.dtype).split(".")[-1] != "bool":
        raise ValueError(f"{name} must be bool, got {mask.dtype}; compare the scores with a threshold first")


def _sentence(text: str, fix: str) -> str:
    return f"{text}; {fix}" if fix else text


def _shape(x: Any) -> str:
    return str(list(x.shape)) if hasattr(x, "shape") else type(x).__name__
