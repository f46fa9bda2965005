"""The exceptions a user may want to catch; each is also a builtin."""


class UnsupportedModelError(RuntimeError):
    """The model cannot be measured as asked, and the message says what would work."""


class MemoryBudgetError(MemoryError):
    """The smallest block of the computation does not fit into `memory_budget`."""


class ProbeError(ValueError):
    """A probe is empty, malformed, too large, or cannot be drawn from the data."""


class ProbeMismatchError(ValueError):
    """A kernel was to be compared with one measured on other inputs."""
