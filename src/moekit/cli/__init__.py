"""Commands: parse, call, show. Everything heavy is imported inside the command that needs it."""

from moekit.cli._app import main

__all__ = ["main"]
