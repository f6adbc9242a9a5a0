"""Keys of a recipe, a dataclass a section; `reading.py` makes them of YAML and of options."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import GraftError
from ..search.planner import check_budget
from ..training.distill.config import DistillConfig
from ..training.finetune.config import FinetuneConfig

# Those that every device of training knows; eight bits are for what is not trained.
Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model to graft.

    Attributes:
        name: `testbed:letters`, `testbed:scenes`, or a pipeline or a transformer of diffusers: a folder, or a Hub
            repository.
        revision: branch, tag or commit of a repository.
        subfolder: of a transformer that is loaded without its pipeline.
        dtype: of the weights; float32 unless given.
        scheduler: folder or repository with the noise scheduler, where a transformer comes without its pipeline.
        config: JSON file with the configuration of the transformer, which a dry run reads in place of the model's.
    """

    name: str
    revision: str | None = None
    subfolder: str | None = None
    dtype: Dtype | None = None
    scheduler: str | None = None
    config: str | None = None


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """A survey of candidates, and the budget of the plan that it gives.

    Attributes:
        candidates: a list of operators by rule key.
        latency, flops, parameters: the budget, one of them: 0.8 leaves 80 % of the original's.
        samples: of the data that are judged on.
        distill: stage one of the candidates before they are judged; null judges them as they start.
        rounds: timed runs of each candidate.
        trials: plans that are measured before one is chosen; 0 chooses by what the survey predicts.
    """

    candidates: Mapping[str, list[Any]]
    latency: float | None = None
    flops: float | None = None
    parameters: float | None = None
    samples: int = 64
    distill: DistillConfig | None = None
    rounds: int = 7
    trials: int = 16

    def __post_init__(self):
        # Here, and not when the survey is solved, which comes after hours of measuring.
        if len(self.budget) != 1:
            raise GraftError(
                f"A search has one budget, search.latency, search.flops or search.parameters; got {self.budget}."
            )
        check_budget(self.budget)
        if type(self.trials) is not int or self.trials < 0:
            raise GraftError(f"search.trials counts plans from 0; got {self.trials!r}.")

    @property
    def budget(self) -> dict[str, float]:
        """The budget that is given, by its measure."""
        budgets = {"latency": self.latency, "flops": self.flops, "parameters": self.parameters}
        return {measure: share for measure, share in budgets.items() if share is not None}


@dataclass(frozen=True, kw_only=True)
class SyntheticData:
    """Samples that the model's own pipeline draws.

    Attributes:
        prompts: a list, or a file with one a line.
        labels: class labels, where the model takes no prompts; one number stands for all labels below it.
        samples: their number; conditions are taken over and over.
        arguments: of the pipeline's call, such as `num_inference_steps`, `guidance_scale`, `height` and `width`.
    """

    prompts: str | tuple[str, ...] | None = None
    labels: int | tuple[int, ...] | None = None
    samples: int = 4096
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PictureData:
    """A folder of pictures, each with a caption in a text file of its name, or in `metadata.jsonl`.

    Attributes:
        path: of the folder.
        size: height and width in pixels to which pictures are scaled and cropped.
    """

    path: str
    size: int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class HubData:
    """A data set of the `datasets` library.

    Attributes:
        name: of a repository or folder.
        split: of it.
        streaming: read it over the network, instead of downloading it first.
        size: height and width in pixels to which pictures are scaled and cropped.
        image, caption, label: columns; found by usual names unless given.
        arguments: of `datasets.load_dataset`, such as `revision` or `name` of a configuration.
    """

    name: str
    size: int | tuple[int, int]
    split: str = "train"
    streaming: bool = True
    image: str | None = None
    caption: str | None = None
    label: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ShardData:
    """WebDataset shards of pictures and captions.

    Attributes:
        urls: a pattern such as `folder/{000..009}.tar`, or a list.
        size: height and width in pixels to which pictures are scaled and cropped.
    """

    urls: str | tuple[str, ...]
    size: int | tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What is trained and evaluated on; a testbed has its own data unless one source is named.

    Attributes:
        synthetic, folder, dataset, webdataset: sources, at most one of them or of `latents`.
        latents: folder of encoded samples, as `dg.data.encode` writes it.
        batch_size: samples of a step on each process.
        held_out: samples that are set aside for evaluation; of a testbed, drawn for it.
        workers: processes that read the data.
    """

    synthetic: SyntheticData | None = None
    folder: PictureData | None = None
    dataset: HubData | None = None
    webdataset: ShardData | None = None
    latents: str | None = None
    batch_size: int = 32
    held_out: int = 256
    workers: int = 0

    def __post_init__(self):
        # None is right for a testbed, which only the model's name tells.
        if len(self.sources) > 1:
            raise GraftError(f"Data have one source; got data.{' and data.'.join(self.sources)}. Leave one.")
        if min(self.batch_size, self.held_out, self.workers + 1) < 1:
            raise GraftError(f"Batches and held-out data have one sample or more; got {self}.")

    @property
    def sources(self) -> list[str]:
        """Names of the sources that are given."""
        names = ("synthetic", "folder", "dataset", "webdataset", "latents")
        return [name for name in names if getattr(self, name) is not None]


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Measurements of the original and of the graft after each stage, beside the denoising loss.

    Attributes:
        metrics: settings by name of the metric: those of `dg.metrics`, and the testbeds' `SampleQuality` and
            `SceneScore`.
        prompts: what metrics of samples draw: a list, a file with one a line, or `geneval` for its own.
        labels: class labels to draw, where the model takes no prompts; one number stands for all labels below it.
        samples: number of samples; prompts or labels are taken over and over. One of each unless given.
        sampling: `steps`, `guidance` and the like, see `dg.Sampling`.
        seed: of noise and samples.
    """

    metrics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    prompts: str | tuple[str, ...] | None = None
    labels: int | tuple[int, ...] | None = None
    samples: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class BenchmarkSettings:
    """Time and memory of a forward, original and graft in turns.

    Attributes:
        sizes: height and width of the latents; the size that the model was made for unless given.
        rounds: measured runs of each.
    """

    sizes: tuple[int, ...] | None = None
    rounds: int = 7


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Pictures of the original and the graft side by side, drawn while it is trained.

    Attributes:
        prompts: a list, or a file with one a line.
        labels: class labels, where the model takes no prompts; one number stands for all labels below it.
        every: steps from one to the next.
        seed: of their noise.
        arguments: of the pipeline's call; for the testbeds those of `testbed.sample` and
            `testbed.scenes.draw_prompts`, such as `size` and `steps`.
    """

    prompts: str | tuple[str, ...] | None = None
    labels: int | tuple[int, ...] | None = None
    every: int = 500
    seed: int = 0
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ShareSettings:
    """The Hub repository that the finished graft is pushed to.

    Attributes:
        repository: `user/name`.
        private: whether others cannot see it.
        license: of the graft, an id of the Hub; that of the base unless given.
    """

    repository: str
    private: bool = False
    license: str | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A whole run: `diffusers-graft train recipe.yaml`.

    Attributes:
        model: to graft; its name alone will do.
        plan: rules by key, rules as text, or the path of a `plan.json`.
        search: candidates and a budget, in place of a plan.
        data: to train and evaluate on.
        distill: stage one, see `dg.DistillConfig`; null leaves it out.
        finetune: stage two, see `dg.FinetuneConfig`; null leaves it out.
        evaluate: measurements; null leaves them out.
        benchmark: time and memory; left out unless given.
        report: write `report.html`.
        samples: pictures on the way; none unless given.
        share: push the graft; not unless given.
        seed: of random starts, data and noise.
        output: folder for everything.
    """

    model: ModelSettings
    plan: Mapping[str, Any] | str | None = None
    search: SearchSettings | None = None
    data: DataSettings = field(default_factory=DataSettings)
    distill: DistillConfig | None = field(default_factory=DistillConfig)
    finetune: FinetuneConfig | None = field(default_factory=FinetuneConfig)
    evaluate: EvaluateSettings | None = field(default_factory=EvaluateSettings)
    benchmark: BenchmarkSettings | None = None
    report: bool = True
    samples: SampleSettings | None = None
    share: ShareSettings | None = None
    seed: int = 0
    output: str = "graft"

    def __post_init__(self):
        # Neither has a default that would suit a model that nobody named.
        if (self.plan is None) == (self.search is None):
            raise GraftError(
                "A recipe has a plan or a search: for example plan: {self_attention[50%]: hyena_x}; "
                f"this one has {'neither' if self.plan is None else 'both'}."
            )
