"""Functions named on the command line."""

import importlib
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from greedy.base.errors import TrainingError, UserError, first_line


def is_function_name(name: str) -> bool:
    """Returns whether a name has the form ``module:function``."""
    return re.fullmatch(r"\w+(\.\w+)*:\w+", name) is not None


def call_function(name: str) -> Any:
    """Calls the function of ``module:function`` without arguments and returns what it returns.

    The current directory is importable. Raises UserError where there is no such function, or it
    needs arguments, or its code fails.
    """
    if not is_function_name(name):
        raise UserError(f"{name!r} is not of the form module:function: name a function so")
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with telling(f"cannot import the module of {name}"):
        module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{name} is not a function: define {function_name} in {module.__file__}")
    with suppress(ValueError):  # some built-in ones do not tell
        if any(_is_needed(parameter) for parameter in signature(function).parameters.values()):
            raise UserError(
                f"{name} needs arguments and is called without: give its parameters defaults"
            )
    with telling(f"{name} fails"):
        return function()


@contextmanager
def telling(what: str) -> Iterator[None]:
    """Inside, errors of a user's own code are one sentence that says where they come from."""
    try:
        yield
    except (UserError, TrainingError, MemoryError):
        raise
    except Exception as error:
        said = first_line(error)
        if not isinstance(error, ImportError | SyntaxError):  # which say it themselves
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {said}, {last.filename}, line {last.lineno}"
        raise UserError(f"{what} ({said}): mend it, --debug shows more") from error


def _is_needed(parameter: Parameter) -> bool:
    collects = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return parameter.default is Parameter.empty and not collects
