"""`python -m moekit.cli` is `moekit`."""

from moekit.cli._app import main

main()
