"""Packages that the work can do without."""

import importlib
import logging
from types import ModuleType

from engine.options import one_line

logger = logging.getLogger(__name__)
# What a package that is missing, or built for other versions, has been seen to raise when it is imported.
IMPORT_ERRORS = (ImportError, RuntimeError, OSError, AttributeError, ValueError, TypeError)


def import_optional(name: str, instead: str) -> ModuleType | None:
    """Import a module; where that fails, warn with what happens instead and return None."""
    try:
        return importlib.import_module(name)
    except IMPORT_ERRORS as error:
        logger.warning("%s: %s cannot be imported (%s)", instead, name, one_line(error))
        return None
