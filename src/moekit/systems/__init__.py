"""The catalogue: every paper of the plan, where it lives in this package, and what has been shown about it."""

from moekit.systems._catalogue import OUTCOMES, Record, extras, find, records, search
from moekit.systems._header import FIELDS, Header, headers, parse
from moekit.systems._page import flat, page

__all__ = [
    "FIELDS",
    "OUTCOMES",
    "Header",
    "Record",
    "extras",
    "find",
    "flat",
    "headers",
    "page",
    "parse",
    "records",
    "search",
]
