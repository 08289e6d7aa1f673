"""Functions named on the command line."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from greedy.errors import UserError


def is_function_name(name: str) -> bool:
    """Whether a name has the form ``module:function``."""
    return re.fullmatch(r"\w+(\.\w+)*:\w+", name) is not None


def call_function(name: str) -> Any:
    """What the function of ``module:function`` returns when called without arguments.

    The current directory is importable. Raises UserError where there is no such function.
    """
    if not is_function_name(name):
        raise UserError(f"{name!r} is not of the form module:function: name a function so")
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(f"cannot import the module of {name}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"{name} is not a function: define {function_name} in {module.__file__}")
    return function()
