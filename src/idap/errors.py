"""Every error that idap raises on purpose.

    IdapError
    ├── TraceError                the model could not be run or exported on the example inputs
    │   └── UnknownOperatorError  an operator has no rule; names operator, module and source line
    ├── StructureError            the analysis found nothing to prune, or was asked for an unknown name
    ├── PlanError                 a plan does not fit the model, or contradicts itself
    ├── RewrittenModuleError      a module with rewritten code was called in another way than it was rewritten for
    ├── VerificationError         the pruned model does not equal the masked original
    ├── ExportError               a model can't be brought into another form, or differs in it
    ├── TaskError                 the data, the loss or the metric cannot be used
    │   └── DivergedError         a loss, gradient or metric is no finite number, or an output is NaN
    ├── ConfigError               a setting or a recipe is wrong
    │   └── BudgetError           the goals cannot be met by any compression
    ├── RunFolderError            a run folder cannot be read or written, or holds another run
    ├── InsufficientMemoryError   a piece of work would take more memory than may be taken
    ├── TrustError                a run folder from elsewhere names code, and nobody agreed to run it
    ├── ReportError               a report can't be printed
    └── CheckpointError           a saved file is broken or does not belong to this model

Every message names the culprit, what was found, what was expected and the way out.
"""


class IdapError(Exception):
    """The root of every error that idap raises on purpose."""


class TraceError(IdapError):
    """The model could not be run or exported on the example inputs."""


class UnknownOperatorError(TraceError):
    """An operator has no rule, so how channels pass through it is not known."""


class StructureError(IdapError):
    """The analysis found nothing to prune, or was asked for a name it does not know."""


class PlanError(IdapError):
    """A plan does not fit the model, or contradicts itself."""


class RewrittenModuleError(IdapError):
    """A module whose code was rewritten was called in another way than it was rewritten for."""


class VerificationError(IdapError):
    """The pruned model does not equal the masked original."""


class ExportError(IdapError):
    """The model cannot be brought into another form, or gives other outputs in it."""


class TaskError(IdapError):
    """The data, the loss or the metric of a task cannot be used."""


class DivergedError(TaskError):
    """A loss, a gradient or a metric is no finite number any more, or an output is NaN, in training or after a cut."""


class ConfigError(IdapError):
    """A setting or a recipe is wrong."""


class BudgetError(ConfigError):
    """The goals cannot be met by any compression."""


class RunFolderError(IdapError):
    """A run folder cannot be read or written, or holds another run."""


class InsufficientMemoryError(IdapError):
    """A piece of work would take more memory than may be taken."""


class TrustError(IdapError):
    """A run folder from elsewhere names code that nobody agreed to run."""


class ReportError(IdapError):
    """A report cannot be printed."""


class CheckpointError(IdapError):
    """A saved file is broken or does not belong to this model."""


class UncheckedFileWarning(UserWarning):
    """A saved file carries no checksum, so whether it was damaged is not known."""
