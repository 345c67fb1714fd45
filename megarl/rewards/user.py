"""A reward of the user's own: `reward.name: module:function`, called as function(response, answer) -> bool.

Workers import the module, with the folder that megarl was started in on the path; the trainer never does. The function
must depend on its two arguments only. An exception or another return value is the status `error`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from functools import cache
from importlib.machinery import PathFinder
from types import ModuleType

MAX_CHARACTERS = 1 << 20  # of a response


class Unusable(ValueError):
    """Why a function can't be a reward."""


@cache
def load(name: str) -> Callable[[str, str], bool]:
    """The function that `module:function` names. Raises Unusable where there is none that fits."""
    module_name, _, function_name = name.partition(":")
    try:
        module = _import(module_name)
    except MemoryError:
        raise Unusable(f"reward.name={name}: importing {module_name} needs more than reward.memory_mib") from None
    except (Exception, SystemExit) as error:  # whatever the user's module does
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise Unusable(f"reward.name={name}: module {module_name} can't be imported ({reason})") from None
    function = getattr(module, function_name, None)
    if not callable(function):
        file = getattr(module, "__file__", None) or "built into Python"
        raise Unusable(f"reward.name={name}: module {module_name} ({file}) has no function {function_name}")
    try:
        inspect.signature(function).bind("response", "answer")
    except TypeError as error:
        raise Unusable(
            f"reward.name={name}: the function must be callable as {function_name}(response, answer): {error}"
        ) from None
    except ValueError:  # a builtin without a signature
        pass
    if inspect.iscoroutinefunction(function):
        raise Unusable(f"reward.name={name}: the function must not be async")
    return function


def _import(module_name: str) -> ModuleType:
    """From the working folder where it is there; whatever it imports may be, but nothing there replaces a library."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    package = module_name.partition(".")[0]
    if package not in sys.modules and (spec := PathFinder.find_spec(package, [os.getcwd()])) and spec.loader:
        module = sys.modules[package] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[package]
            raise
    return importlib.import_module(module_name)


def verdict(name: str, response: str, answer: str) -> bool:
    """What the function says. Raises what it raises, and TypeError where it returns neither True nor False."""
    result = load(name)(response, answer)
    if isinstance(result, (str, bytes)) or result is None or result not in (0, 1):
        raise TypeError(f"the function returned {result!r:.60}, not True or False")
    return bool(result)


def guard(response: str) -> str | None:
    return f"longer than {MAX_CHARACTERS} characters" if len(response) > MAX_CHARACTERS else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
