"""The libraries that only some commands need, imported when they are needed."""

from __future__ import annotations

import importlib
from typing import Any

from flexlam_fast.errors import DataError


def need(module: str) -> Any:
    """Import and return a module of the ``demo`` extra.

    Raises:
        DataError: if it is not installed, saying what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f'{module}: expected it installed, got none; pip install "flexlam_fast[demo]"') from error
