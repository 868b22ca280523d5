"""Sections that say what is run, on which data and with which model: `run`, `data`, `model`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.section import Count, CountOrZero, GpuSet, Section, Text

Slug = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?$")]


class RunSection(Section):
    """What the run is called and where it writes."""

    name: Slug
    """Name of the run, of its folder and of its broker keys: a-z, 0-9 and inner hyphens, at most 64."""
    output_dir: Text = "runs"
    """Folder that holds one folder per run; relative to the working directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of data order, augmentation, sampling and initial weights."""


class AugmentSection(Section):
    """Augmentation of channel A; rollouts always see the image as it is."""

    jitter_px: Annotated[float, Field(ge=0, le=64)] = 0.5
    """Largest shift of each box edge or vertex before binning, in pixels; 0 = none."""
    crop: bool = False
    """Crop images at random, keeping whole objects."""
    scale: bool = False
    """Scale images at random."""
    flip: bool = False
    """Mirror images at random; leave off where left and right mean something."""


class DataSection(Section):
    """Data sets in the JSONL form of ROLLOUT_MATCHING.md section 2."""

    train_jsonl: Text
    """Training set; relative to the working directory."""
    val_jsonl: Text | None = None
    """Validation set; null = no evaluation."""
    object_ordering: Literal["sorted", "dataset", "random"] = "sorted"
    """Order of the objects in a payload: top-left first, as in the file, or shuffled by the seed."""
    root: Text | None = None
    """Folder that image paths must not leave; null = the folder of each JSONL file."""
    skip_untrainable: bool = False
    """Leave out samples that cannot be trained or shown, and count them; off = refuse to start on them."""
    augment: AugmentSection = Field(default_factory=AugmentSection)


class ImageSection(Section):
    """Bounds within which the processor resizes an image, keeping its shape."""

    min_pixels: Count | None = None
    """Fewest pixels (width x height) after resizing; null = as the checkpoint's processor says."""
    max_pixels: Count | None = None
    """Most pixels (width x height) after resizing; null = as the checkpoint's processor says."""


class TinyModelSection(Section):
    """Sizes of a tiny Qwen3-VL with new weights; the defaults suit 128 x 128 scenes."""

    text_hidden: Count = 192
    """Width of the text model."""
    text_intermediate: Count = 512
    """Width of the text model's feed-forward layers."""
    text_layers: Count = 4
    """Layers of the text model."""
    text_heads: Count = 6
    """Attention heads of the text model."""
    text_key_value_heads: Count = 6
    """Key and value heads of the text model; divides `text_heads`."""
    vision_hidden: Count = 128
    """Width of the vision model."""
    vision_intermediate: Count = 512
    """Width of the vision model's feed-forward layers."""
    vision_layers: Count = 3
    """Layers of the vision model."""
    vision_heads: Count = 4
    """Attention heads of the vision model."""
    deepstack_layers: Annotated[tuple[CountOrZero, ...], Field(strict=False)] = (1,)
    """Vision layers whose output also enters the text model, counted from 0."""
    position_grid_side: Count = 8
    """Edge of the learned grid of patch positions."""
    patch_size: Count = 16
    """Edge of an image patch, in pixels."""
    merge_size: Count = 2
    """Edge of the square of patches that becomes one token."""


class ModelSection(Section):
    """The model: an existing checkpoint, or a tiny one made from an inline config."""

    name_or_path: Text | None = None
    """Hugging Face folder (relative to the working directory) or hub name; null = use `config`."""
    config: TinyModelSection | None = None
    """A tiny model with new weights, made for this run; null = use `name_or_path`."""
    image: ImageSection = Field(default_factory=ImageSection)
    dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of published weights and of rollouts; null = that of `training.precision`."""
    attention: Literal["auto", "flash", "segments"] = "auto"
    """Attention of packed rows: variable-length kernels (flash), segment by segment, or what runs here."""
    system_prompt: str = "You list the objects in an image as one line of JSON."
    """System turn of every prompt; empty = no system turn."""
    instruction: Text = "List every object with its box or polygon."
    """User text after the image, in training, rollouts and evaluation alike."""


class ArchiveSection(Section):
    """Copy of events and payloads in the run folder, from which audit and replay read."""

    enabled: bool = True
    """Keep the archive; off = `rollstream replay` cannot train this run again."""


class MetricsSection(Section):
    """Prometheus endpoints of the roles."""

    host: Text = "127.0.0.1"
    """Address that the endpoints listen on."""
    base_port: Annotated[int, Field(ge=0, le=64_000)] = 0
    """First port, each process takes one from there on; 0 = no endpoints."""


class TrackingSection(Section):
    """Trackers that receive the numbers of steps, evaluations and queue; none of them can hold up a run."""

    to: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...], Field(strict=False)] = ()
    """Trackers, each an extra of the package: tensorboard, wandb, mlflow; empty = none."""
    project: Text = "rollstream"
    """Project (wandb) or experiment (mlflow) that the run appears in."""


class ProducersSection(Section):
    """Rollout workers and their jobs."""

    num_workers: Count = 1
    """Worker processes that `rollstream up` starts."""
    request_size: Count | None = None
    """Rollouts in one RQ job; unset: 4, and with vLLM servers the chunk that they give one learner rank."""
    lease_s: Annotated[float, Field(gt=0, le=3600)] = 30.0
    """Seconds without a sign of life of its worker after which a job counts as abandoned and runs again."""
    max_attempts: Annotated[int, Field(ge=1, le=1000)] = 5
    """Workers that may take a request and abandon it before its rollouts are given up."""
    job_timeout_s: Annotated[int, Field(ge=1, le=86_400)] = 900
    """Seconds that one job may take; a hung one is given to another worker then."""


class MatchersSection(Section):
    """Matcher processes."""

    num_workers: Count = 1
    """Matcher processes that `rollstream up` starts."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Segments read from the broker at a time."""


class DevicesSection(Section):
    """Who uses which GPU; the two sets must not meet."""

    rollout_gpus: GpuSet = ()
    """GPU numbers for rollouts, taken in turn by producers; empty = CPU, or servers that run elsewhere."""
    learner_gpus: GpuSet = ()
    """GPU numbers for the learner on each of its nodes, one rank each; empty = CPU."""
    learner_world_size: Count = 1
    """W, the number of learner ranks: the number of learner GPUs, where there are any, times the nodes."""
