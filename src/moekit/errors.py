"""What can go wrong, each with one clear line: what was found, what was expected, what to do."""


class MoekitError(Exception):
    """Base of every error a user can cause. The command line prints its message and exits with code 2."""


class CheckpointError(MoekitError):
    """A path that is no model, a dense model, truncated, corrupt, missing or contradictory files."""


class UnsupportedModelError(MoekitError):
    """A Mixture-of-Experts model whose blocks moekit cannot read; the message says which and why."""


class TextError(MoekitError):
    """Calibration or held-out text that is empty, unreadable or not UTF-8."""


class ProfileError(MoekitError):
    """A profile of another model, of another version, or without the statistic a method needs."""


class PlanError(MoekitError):
    """A plan that is invalid, of another source, or that no output format can express."""


class BudgetError(MoekitError):
    """A size or memory budget no plan can meet; the message names the smallest possible."""


class OutputError(MoekitError):
    """An output that exists, cannot be written, or did not survive its verification."""


class VerificationError(OutputError):
    """An output that differs from what its source and plan produce."""


class OptionError(MoekitError):
    """An unknown method or option, or a value out of range; the message names the nearest valid one."""
