"""Every error that a file or a user can cause.

FactorpackError
├── FormatError      the file is damaged, truncated or not a Factorpack file
├── MismatchError    a file and a model, or two shapes, do not belong together
├── BudgetError      the size or score asked for cannot be met
├── TaskError        a task cannot be loaded or lacks a function
├── UnsupportedError something that Factorpack does not do, with what to do instead
└── WorkerError      worker processes or a cluster cannot be had, or were lost
"""


class FactorpackError(Exception):
    """The root: catch it to catch everything that a file or a user can cause."""


class FormatError(FactorpackError):
    """The file is damaged, truncated or not a Factorpack file."""


class MismatchError(FactorpackError):
    """Two things that should belong together do not: a file and a model, a shape and a tensor."""


class BudgetError(FactorpackError):
    """The size asked for cannot be met; the message says what can."""


class TaskError(FactorpackError):
    """A task cannot be found or loaded, or lacks a function that is needed."""


class UnsupportedError(FactorpackError):
    """Something that Factorpack does not do; the message says what to do instead."""


class WorkerError(FactorpackError):
    """Worker processes or a cluster cannot be had, or were lost."""
