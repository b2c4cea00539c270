"""What classes that are not of this package do, as a digest: who edits a class asks for other results.

Sources would not do: a notebook's classes have none that Python can find.
"""

from __future__ import annotations

import dis
import hashlib
import json
import sys
from types import CodeType, FunctionType
from typing import Any

PACKAGES = {"demem_lab", "torch", "numpy", *sys.stdlib_module_names}  # known by their version, or by `store.code_version`


def code_of(*kinds: type) -> str:
    """Digest of the methods and plain attributes of classes and their bases; "" where all of them are of known packages.

    Read are the methods' bytecode and constants, and the functions and plain values that they name in their own module
    or around them; nothing that these take from known packages, and no arrays.
    """
    found: dict[str, Any] = {}
    for base in (base for kind in kinds for base in kind.__mro__ if _foreign(base)):
        for name, value in vars(base).items():
            parts = (value.fget, value.fset, value.fdel) if isinstance(value, property) else (getattr(value, "__func__", value),)
            for part in parts:
                if part is None and len(parts) > 1:
                    continue
                if isinstance(part, FunctionType):
                    _read(part, found, f"{base.__qualname__}.{name} {parts.index(part)}")
                elif _plain(part) and not name.startswith("__"):
                    found[f"{base.__qualname__}.{name}"] = repr(part)
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16] if found else ""


def _foreign(thing: type | FunctionType) -> bool:
    return (thing.__module__ or "").partition(".")[0] not in PACKAGES


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes))


def _read(function: FunctionType, found: dict[str, Any], name: str) -> None:
    if name in found:
        return
    code = function.__code__
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    found[name] = [_spelled(code), [repr(value) for value in defaults if _plain(value)]]
    names = {word: function.__globals__[word] for word in _words(code) if word in function.__globals__}
    for word, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            names[word] = cell.cell_contents
        except ValueError:  # not filled yet
            continue
    for word, value in names.items():
        if isinstance(value, FunctionType) and _foreign(value):
            _read(value, found, f"{value.__module__}.{value.__qualname__}")
        elif _plain(value) and not word.startswith("__"):
            found[f"{name}: {word}"] = repr(value)


def _words(code: CodeType) -> set[str]:
    """The names looked up outside; an attribute's name may be that of something else there."""
    inner = [_words(part) for part in code.co_consts if isinstance(part, CodeType)]
    return {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}.union(*inner)


def _spelled(code: CodeType) -> list:
    """Instructions, names and constants; neither file nor lines, which say nothing about what is done."""
    constants = [_spelled(c) if isinstance(c, CodeType) else _constant(c) for c in code.co_consts]
    return [code.co_code.hex(), list(code.co_names), list(code.co_varnames), constants]


def _constant(value: Any) -> Any:
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)  # sets have no order of their own
