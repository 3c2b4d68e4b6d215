"""The version of the library, written once: ``pyproject.toml`` and ``dear.__version__`` read it here."""

__version__ = "0.1.0"
