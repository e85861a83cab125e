"""Packages that the work can do without."""

# What a package that is missing, or built for other versions, has been seen to raise when it is imported.
IMPORT_ERRORS = (ImportError, RuntimeError, OSError, AttributeError, ValueError, TypeError)
