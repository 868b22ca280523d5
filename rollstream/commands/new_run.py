"""`rollstream new`: measures data and model and writes configurations whose values are their own."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker_schemas.errors import DataError
from broker_schemas.method.model_folder import resolve_model_dir
from configs import load_config
from rollstream.datasets.measuring import DataMeasure, measure_files
from rollstream.staged_folder import write_atomically

TINY_PARAMETERS: Final = 100_000_000
TARGET_BATCH: Final = 16
LARGEST_WARM_STEPS: Final = 4000
ADAPTER_RATE: Final = "2.0e-5  # adapters"


@dataclass(frozen=True, kw_only=True)
class NewRun:
    """What two configurations are written from: a warm start on the ground truth, then the run itself.

    ``model`` is the folder as given; ``num_gpus`` 0 means the CPU. ``is_warm``: the model writes the format
    already, so that no warm start is needed. ``is_lora``: adapters are trained in place of the weights.
    """

    name: str
    data: Path
    model: Path
    num_gpus: int
    is_warm: bool
    is_lora: bool
    measure: DataMeasure
    num_train: int
    has_val: bool
    num_parameters: int

    @property
    def is_tiny(self) -> bool:
        return self.num_parameters < TINY_PARAMETERS

    @property
    def rollout_gpus(self) -> list[int]:
        return list(range(self.num_gpus // 2))

    @property
    def world_size(self) -> int:
        return max(1, self.num_gpus - len(self.rollout_gpus))

    @property
    def batch(self) -> int:
        """Samples a step: about TARGET_BATCH, a whole number of micro-steps on every rank."""
        return self.world_size * max(1, TARGET_BATCH // self.world_size)

    @property
    def per_device(self) -> int:
        """Samples a rank and micro-step: as many of mean length as one packed row holds."""
        fitting = max(1, int(self.measure.global_max_length // self.measure.mean_length))
        own = self.batch // self.world_size
        return max(count for count in range(1, min(fitting, own) + 1) if own % count == 0)

    @property
    def accumulation(self) -> int:
        return self.batch // (self.world_size * self.per_device)

    @property
    def warm_model(self) -> str:
        """The model that the warm start leaves: its checkpoint, or what adapters were merged into."""
        if self.is_lora:
            return f"models/{self.name}-warm"
        return f"runs/{self.name}-warm/checkpoints/checkpoint-{self.warm_steps}"

    @property
    def warm_steps(self) -> int:
        epochs, fewest = (40, 1000) if self.is_tiny else (10, 200)
        return min(max(fewest, epochs * self.num_train // self.batch), LARGEST_WARM_STEPS)


def plan_run(
    name: str, data: Path, model: Path, *, num_gpus: int | None, is_warm: bool, is_lora: bool = False
) -> NewRun:
    """Measure ``data`` (a folder of `data import`) in the tokens of ``model``; raises DataError."""
    train, val = data / "train.jsonl", data / "val.jsonl"
    if not train.is_file():
        raise DataError(f"{train}: no such file, expected a folder that 'rollstream data import' wrote")
    folder = resolve_model_dir(model)
    files = [file for file in (train, val) if file.is_file()]
    return NewRun(
        name=name,
        data=data,
        model=model,
        num_gpus=_count_gpus() if num_gpus is None else num_gpus,
        is_warm=is_warm,
        is_lora=is_lora,
        measure=measure_files(files, folder),
        num_train=sum(1 for line in train.read_text(encoding="utf-8").split("\n") if line.strip()),
        has_val=val.is_file(),
        num_parameters=_count_parameters(folder),
    )


def write_run(run: NewRun, folder: Path) -> list[Path]:
    """Write the configurations into ``folder`` and return their files, the first one to run first.

    Raises DataError for a file that is there already; ConfigError would be a fault of ours.
    """
    wanted = [(folder / f"{run.name}.yaml", main_text(run))]
    if not run.is_warm:
        wanted.insert(0, (folder / f"{run.name}-warm.yaml", warm_text(run)))
    for path, _ in wanted:
        if path.exists():
            raise DataError(f"{path}: is there already; choose another name, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    for path, text in wanted:
        write_atomically(path, text)
        load_config(path)
    return [path for path, _ in wanted]


def describe_run(run: NewRun, files: list[Path]) -> Iterator[str]:
    """Yield what was measured, what was written, and the commands to run."""
    measure = run.measure
    yield (
        f"data: {measure.num_samples} images, {measure.num_objects} objects, at most {measure.most_objects} "
        f"an image; the longest sample takes {measure.longest.total} tokens ({measure.longest.sample_id})"
    )
    yield f"model: {run.model}, {run.num_parameters / 1e6:.0f} million parameters"
    yield f"devices: {run.num_gpus} GPUs, {run.world_size} learner ranks"
    yield from (f"wrote {path}" for path in files)
    if measure.too_wide:
        yield f"left out by data.skip_untrainable: {', '.join(measure.too_wide)}"
    yield f"next: rollstream doctor {files[0]}"
    if not run.is_warm:
        merged = f" && rollstream model export runs/{run.name}-warm {run.warm_model}" if run.is_lora else ""
        yield f"then: rollstream learn {files[0]}{merged} && rollstream up {files[1]}"
    else:
        yield f"then: rollstream up {files[0]}"


def warm_text(run: NewRun) -> str:
    """Return the warm start: channel A alone, which teaches the format and the classes."""
    epochs = run.warm_steps * run.batch / run.num_train
    rate = "1.0e-3  # a small model from new weights" if run.is_tiny else "1.0e-5  # a pretrained model"
    rate = ADAPTER_RATE if run.is_lora and not run.is_tiny else rate
    return f"""\
# Warm start of {run.name}: ground truth alone, until the model writes the format.
# rollstream learn {run.name}-warm.yaml
# Written by rollstream new from what it measured; change what you like.
run:
  name: {run.name}-warm
{_data_text(run)}
{_model_text(run, str(run.model))}
custom:
  trainer_variant: stage2_ab_training
{_method_text(run)}
stage2_ab:
  schedule: {{b_ratio: 0}}  # no rollouts yet
training:
{_batch_text(run)}
  max_steps: {run.warm_steps}  # {epochs:.0f} times over {run.num_train} images
  learning_rate: {rate}
  warmup_steps: {max(10, run.warm_steps // 20)}
  lr_scheduler: cosine
{_evaluation_text(run, run.warm_steps)}
{_devices_text(run, with_rollouts=False)}"""


def main_text(run: NewRun) -> str:
    """Return the run itself: asynchronous, half of its steps on rollouts of the current model."""
    steps = max(100, run.warm_steps // 2)
    rate = "3.0e-4  # a third of the warm start's" if run.is_tiny else "5.0e-6  # half of the warm start's"
    rate = ADAPTER_RATE if run.is_lora and not run.is_tiny else rate
    return f"""\
# {run.name}: trained on its own rollouts, from a queue. rollstream up {run.name}.yaml
# Written by rollstream new from what it measured; change what you like.
run:
  name: {run.name}
{_data_text(run)}
{_model_text(run, str(run.model) if run.is_warm else run.warm_model)}
custom:
  trainer_variant: stage2_async
{_method_text(run)}
stage2_ab:
  schedule: {{b_ratio: 0.5}}  # every other step learns rollouts, the others ground truth
stage2_async:
  queue_limit: {4 * run.accumulation}  # packs a rank that may wait; four steps' worth
  prefetch_target_packs: {2 * run.accumulation}  # packs a rank that producers aim at; two steps' worth
  sync_every_steps: 4  # steps between publications of the weights
  version_window: 2  # publications that a rollout may lag behind
training:
{_batch_text(run)}
  max_steps: {steps}
  learning_rate: {rate}
{_evaluation_text(run, steps)}
{_devices_text(run, with_rollouts=True)}"""


def _data_text(run: NewRun) -> str:
    val = (
        f"\n  val_jsonl: {_quoted(run.data / 'val.jsonl')}"
        if run.has_val
        else "\n  val_jsonl: null  # no evaluation"
    )
    skip = "\n  skip_untrainable: true  # a shape that no processor takes" if run.measure.too_wide else ""
    return f"data:\n  train_jsonl: {_quoted(run.data / 'train.jsonl')}{val}{skip}"


def _model_text(run: NewRun, name: str) -> str:
    measure = run.measure
    return f"""\
model:
  name_or_path: {_quoted(name)}
  image:  # the largest picture has {measure.largest_picture_pixels} pixels; more pixels, more tokens and time
    min_pixels: {measure.min_pixels}
    max_pixels: {measure.max_pixels}"""


def _method_text(run: NewRun) -> str:
    measure = run.measure
    sigma = "\n      target_sigma: 4.0  # bins; wide targets guide new weights" if run.is_tiny else ""
    weight = "\n      w1_weight: 5.0  # pulls far-off coordinates of new weights" if run.is_tiny else ""
    return f"""\
  extra:
    rollout_matching:
      max_new_tokens: {measure.max_new_tokens}  # the longest list of objects takes {measure.longest_payload}
      decode_batch_size: 4{sigma}{weight}"""


def _batch_text(run: NewRun) -> str:
    measure = run.measure
    parts = (
        f"prompt {measure.longest_prompt}, rollout {measure.max_new_tokens}, then {measure.longest_payload}"
    )
    return f"""\
  effective_batch_size: {run.batch}  # samples a step, over all ranks
  per_device_train_batch_size: {run.per_device}  # what a row holds: {run.accumulation} rows a step
  global_max_length: {measure.global_max_length}  # {parts} to append{_adapter_text(run)}"""


def _adapter_text(run: NewRun) -> str:
    if not run.is_lora:
        return ""
    return "\n  lora: {rank: 16}  # adapters in place of the weights, coordinate rows trained beside them"


def _evaluation_text(run: NewRun, steps: int) -> str:
    every = max(10, steps // 10)
    lines = [f"  save_every_steps: {every}"]
    if run.has_val:
        lines.append(f"  eval_every_steps: {every}")
    if not run.is_tiny:
        lines.append("  activation_checkpointing: true  # less memory, a third more time")
    if run.has_val:
        lines += ["", "evaluation:", "  num_samples: 64  # the first ones of the validation set"]
    return "\n".join(lines)


def _devices_text(run: NewRun, *, with_rollouts: bool) -> str:
    if run.num_gpus == 0:
        return "devices:\n  learner_world_size: 1  # no GPU was found\n"
    learner = list(range(len(run.rollout_gpus), run.num_gpus))
    rollouts = f"  rollout_gpus: {run.rollout_gpus}\n" if with_rollouts and run.rollout_gpus else ""
    alone = "  # one GPU: rollouts run on the CPU\n" if with_rollouts and not run.rollout_gpus else ""
    return f"devices:\n{alone}{rollouts}  learner_gpus: {learner}\n  learner_world_size: {run.world_size}\n"


def _quoted(value: Path | str) -> str:
    """Return a YAML scalar; JSON text is one."""
    return json.dumps(str(value), ensure_ascii=False)


def _count_gpus() -> int:
    return sum(1 for path in Path("/dev").glob("nvidia*") if path.name[len("nvidia") :].isdigit())


def _count_parameters(folder: Path) -> int:
    """Return the numbers in all weight files of ``folder``, from their headers; raises DataError."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length)) if length < 1 << 28 else {}
        except (OSError, ValueError, RecursionError, struct.error) as exc:
            raise DataError(f"{file}: not a weight file ({exc}); download it again") from exc
        for name, entry in header.items():
            if name != "__metadata__":
                count = 1
                for side in entry["shape"]:
                    count *= int(side)
                total += count
    if not total:
        raise DataError(f"{folder}: no *.safetensors with weights; give the folder of a whole checkpoint")
    return total
