"""Edit the architecture of pretrained diffusion transformers: `model.set_graft({"self_attention[1::2]": "hyena_x"})`.

Importing gives every diffusers model the methods set_graft, unset_graft, enable_graft, disable_graft, save_graft and
load_graft, and the property graft.
"""
from . import operators
from ._version import __version__
from .analysis.planner import Survey
from .anatomy import find_sites
from .errors import GraftError
from .evaluation.benchmark import benchmark
from .evaluation.scores import Scores, evaluate
from .evaluation.survey import survey
from .graft import Graft, build_graft
from .hub.cards import card
from .hub.full import load_pretrained
from .hub.upstream import import_upstream
from .model import attach_verbs, set_graft
from .operators.conformance import check_operator
from .plan import GraftPlan, interleaved, plan_graft
from .site import Context, Grid, Site, Sites
from .training import datasets as data
from .training.closed_form import ClosedFormConfig, closed_form
from .training.distill import DistillConfig, distill
from .training.finetune import FinetuneConfig, finetune
from .training.trainer import GraftTrainer, GraftTrainingArguments

__all__ = [
    "ClosedFormConfig", "Context", "DistillConfig", "FinetuneConfig", "Graft", "GraftError", "GraftPlan", "GraftTrainer",
    "GraftTrainingArguments", "Grid", "Scores", "Site", "Sites", "Survey", "__version__", "benchmark", "build_graft", "card",
    "check_operator", "closed_form", "data", "distill", "evaluate", "find_sites", "finetune", "import_upstream", "interleaved",
    "load_pretrained", "operators", "plan_graft", "set_graft", "survey",
]  # fmt: skip

attach_verbs()


def __getattr__(name: str):
    """The models of diffusers too: `model_index.json` of a grafted pipeline asks for them here, so that grafts are known."""
    import diffusers

    found = getattr(diffusers, name, None) if name[:1].isupper() else None
    if isinstance(found, type) and issubclass(found, diffusers.ModelMixin):
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
