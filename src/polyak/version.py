"""The version of the package, apart so that nothing has to import its top."""

__version__ = "0.1.0"
