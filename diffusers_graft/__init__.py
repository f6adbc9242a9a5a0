"""Edit the architecture of pretrained diffusion transformers: `model.set_graft({"self_attention[1::2]": "hyena_x"})`.

Importing gives every diffusers model the methods set_graft, unset_graft, enable_graft, disable_graft, save_graft and
load_graft, and the property graft.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import operators
from ._version import __version__
from .core.context import Context, Grid
from .core.sites import Site, Sites
from .errors import GraftError
from .injection.graft import Graft, build_graft
from .inspection import find_sites
from .model_mixin import GraftableModel, attach_verbs, set_graft
from .operators.registry import read_repositories_with
from .planning.plan import GraftPlan, plan_graft
from .planning.rules import deep, interleaved, low_local, top_local
from .serialization.load_model import load_pretrained

if TYPE_CHECKING:
    from . import data, hub
    from .evaluation import metrics
    from .evaluation.analysis import Analysis
    from .evaluation.analyze import analyze
    from .evaluation.benchmark import benchmark
    from .evaluation.evaluate import evaluate
    from .evaluation.sampling import Sampling
    from .evaluation.scores import Scores
    from .operators.conformance.suite import check_operator
    from .reporting.report import report
    from .samples import SampleConfig, Samples
    from .search.planner import Survey
    from .search.survey import survey
    from .serialization.model_card import card
    from .serialization.paper_checkpoints import import_upstream
    from .serialization.sparse_checkpoints import import_sparse
    from .trainer import GraftTrainer, GraftTrainingArguments
    from .training.distill.config import ClosedFormConfig, DistillConfig
    from .training.distill.distill import distill
    from .training.distill.ridge import closed_form
    from .training.finetune.config import FinetuneConfig
    from .training.finetune.finetune import finetune

# Imported when they are asked for, so that importing this library takes a tenth of the time of importing diffusers.
_LATER = {
    "Analysis": "evaluation.analysis",
    "ClosedFormConfig": "training.distill.config",
    "DistillConfig": "training.distill.config",
    "FinetuneConfig": "training.finetune.config",
    "GraftTrainer": "trainer",
    "GraftTrainingArguments": "trainer",
    "SampleConfig": "samples",
    "Samples": "samples",
    "Sampling": "evaluation.sampling",
    "Scores": "evaluation.scores",
    "Survey": "search.planner",
    "analyze": "evaluation.analyze",
    "benchmark": "evaluation.benchmark",
    "card": "serialization.model_card",
    "check_operator": "operators.conformance.suite",
    "closed_form": "training.distill.ridge",
    "data": "data",
    "distill": "training.distill.distill",
    "evaluate": "evaluation.evaluate",
    "finetune": "training.finetune.finetune",
    "hub": "hub",
    "import_sparse": "serialization.sparse_checkpoints",
    "import_upstream": "serialization.paper_checkpoints",
    "metrics": "evaluation.metrics",
    "report": "reporting.report",
    "survey": "search.survey",
}

__all__ = [
    "Analysis",
    "ClosedFormConfig",
    "Context",
    "DistillConfig",
    "FinetuneConfig",
    "Graft",
    "GraftError",
    "GraftPlan",
    "GraftTrainer",
    "GraftTrainingArguments",
    "GraftableModel",
    "Grid",
    "SampleConfig",
    "Samples",
    "Sampling",
    "Scores",
    "Site",
    "Sites",
    "Survey",
    "__version__",
    "analyze",
    "benchmark",
    "build_graft",
    "card",
    "check_operator",
    "closed_form",
    "data",
    "deep",
    "distill",
    "evaluate",
    "find_sites",
    "finetune",
    "hub",
    "import_sparse",
    "import_upstream",
    "interleaved",
    "load_pretrained",
    "metrics",
    "low_local",
    "operators",
    "plan_graft",
    "report",
    "set_graft",
    "survey",
    "top_local",
]


def _read_repository(source: str, **trust: Any) -> Any:
    return importlib.import_module(f"{__name__}.hub.operators").load_operator(source, **trust)


attach_verbs()
read_repositories_with(_read_repository)


def __getattr__(name: str) -> Any:
    """Return a public name that waited until now, or a model class of diffusers.

    `model_index.json` of a grafted pipeline asks for its models here, so that this library is imported and reads them.
    """
    if name in _LATER:
        module = importlib.import_module(f"{__name__}.{_LATER[name]}")
        # A name is that of a module, or of something in it.
        globals()[name] = getattr(module, name, module)
        return globals()[name]
    import diffusers
    from diffusers.models.modeling_utils import ModelMixin

    # Names of modules and functions are asked for as well, by tools that look around.
    found = getattr(diffusers, name, None) if name[:1].isupper() else None
    if isinstance(found, type) and issubclass(found, ModelMixin):
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
