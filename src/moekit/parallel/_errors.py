"""What can go wrong between ranks."""

from moekit.errors import MoekitError


class ParallelError(MoekitError):
    """A lost peer, ranks that disagree, or a layout or plan that does not fit the ranks or the experts."""
