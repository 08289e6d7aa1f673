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
    """Calls ``module:function`` without arguments and returns its result.

    The current directory is importable. Raises ``UserError`` where the function does not exist,
    needs arguments, or fails.
    """
    if not is_function_name(name):
        raise UserError(f"{name!r} is not of the form module:function: name a function so")
    module_name, _, function_name = name.partition(":")
    current = str(Path.cwd())
    if current not in sys.path:
        sys.path.insert(0, current)
    with user_errors_explained(f"cannot import the module of {name}"):
        module = importlib.import_module(module_name)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{name} is not a function: define {function_name} in {module.__file__}")
    with suppress(ValueError):  # some built-in functions have no signature
        if any(_is_needed(parameter) for parameter in signature(function).parameters.values()):
            raise UserError(
                f"{name} needs arguments and is called without: give its parameters defaults"
            )
    with user_errors_explained(f"{name} fails"):
        return function()


@contextmanager
def user_errors_explained(failure: str) -> Iterator[None]:
    """Turns errors of a user's own code inside the block into a ``UserError`` that begins with
    ``failure`` and names the file and line."""
    try:
        yield
    except (UserError, TrainingError, MemoryError):
        raise
    except Exception as error:
        message = first_line(error)
        if not isinstance(error, ImportError | SyntaxError):  # whose messages name the place
            last = traceback.extract_tb(error.__traceback__)[-1]
            message = f"{type(error).__name__}: {message}, {last.filename}, line {last.lineno}"
        raise UserError(f"{failure} ({message}): mend it, --debug shows more") from error


def _is_needed(parameter: Parameter) -> bool:
    collects = parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    return parameter.default is Parameter.empty and not collects
