"""`rollstream data` and `rollstream model`: what a run needs before it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape

from rollstream.commands.help_pages import command_group
from rollstream.commands.options import AsJson, ConfigPath, Overrides, Seed

if TYPE_CHECKING:
    from rich.progress import Progress

data_app = command_group()
model_app = command_group()
Destination = Annotated[Path, typer.Argument(help="folder to write")]


Kind = Annotated[
    Literal["voc", "coco", "labelme", "yolo", "qwen"],
    typer.Argument(help="layout of SRC; qwen: JSON Lines of Qwen-VL grounding"),
]
Masks = Annotated[
    Literal["outline", "hull", "box"], typer.Option(help="what masks and objects of several parts become")
]
Simplify = Annotated[
    float, typer.Option(min=0, help="polygons lose vertices that move them by less, in bins; 0: none")
]
Base = Annotated[Literal["auto", "0", "1"], typer.Option(help="first pixel of VOC's coordinates")]
Coordinates = Annotated[
    Literal["auto", "pixels", "thousandths"], typer.Option(help="what the numbers of qwen lines are")
]
GroupBy = Annotated[Literal["file", "folder"], typer.Option(help="what the split keeps together")]


@data_app.command("import")
def import_data(
    kind: Kind,
    src: Annotated[Path, typer.Argument(help="folder of the data set; coco and qwen take a file too")],
    dst: Destination,
    strict: Annotated[bool, typer.Option(help="refuse the whole set for one broken annotation")] = False,
    val_share: Annotated[float, typer.Option(help="share for validation where SRC has no splits")] = 0.1,
    seed: Annotated[int, typer.Option(help="seed of that split")] = 0,
    resplit: Annotated[bool, typer.Option(help="split by share although SRC has splits")] = False,
    group_by: GroupBy = "file",
    masks: Masks = "outline",
    simplify: Simplify = 1.0,
    base: Base = "auto",
    coordinates: Coordinates = "auto",
    link: Annotated[bool, typer.Option(help="hard links to the pictures instead of copies")] = False,
    model: Annotated[
        Path | None, typer.Option(help="model folder; tells lengths in its tokens, and settings")
    ] = None,
) -> None:
    """Import a data set with boxes, polygons or masks; ends with a table of what was done."""
    from rollstream.commands.measuring_data import after_import
    from rollstream.datasets.importing import describe_summary, import_dataset

    with _progress() as progress:
        task = progress.add_task(escape(f"importing {src}"), total=None)
        summary = import_dataset(
            kind,
            src,
            dst,
            strict=strict,
            link_images=link,
            seed=seed,
            val_share=val_share,
            resplit=resplit,
            group_by=group_by,
            masks=masks,
            simplify_bins=simplify,
            base=None if base == "auto" else 0 if base == "0" else 1,
            coordinates=None if coordinates == "auto" else coordinates,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(describe_summary(summary), markup=False)
    for line in after_import(summary.folder, sorted(summary.splits), model):
        console.print(line, markup=False)


@data_app.command("check")
def check(
    config: ConfigPath,
    quick: Annotated[bool, typer.Option(help="look at headers of pictures only, as doctor does")] = False,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Find every sample that could not be trained or shown; the longest lengths with the values to set."""
    from rollstream.commands.checking_data import check_data, check_to_json, describe_check, refuse_problems
    from rollstream.commands.loading import load_run

    loaded = load_run(config, overrides)
    with Console(stderr=True).status("looking at every sample"):
        reports = check_data(loaded, is_thorough=not quick)
    console = Console(soft_wrap=True, highlight=False)
    if as_json:
        console.print_json(json.dumps(check_to_json(reports)))
    else:
        for text in describe_check(loaded, reports):
            console.print(text, markup=False)
    refuse_problems(reports)


@data_app.command("show")
def show(
    source: Annotated[Path, typer.Argument(help="JSONL file, or the folder of a data set")],
    out: Annotated[Path, typer.Option(help="folder for the pictures")] = Path("shown"),
    num_samples: Annotated[int, typer.Option(min=1, help="how many")] = 12,
    sample: Annotated[list[str] | None, typer.Option(help="id of a sample; may be given again")] = None,
    seed: Seed = 0,
) -> None:
    """Draw samples with their boxes and polygons, as they are trained."""
    from rollstream.commands.showing_data import show_samples

    drawn = show_samples(source, out, num_samples=num_samples, seed=seed, sample_ids=tuple(sample or ()))
    console = Console(soft_wrap=True, highlight=False)
    for path in drawn:
        console.print(str(path), markup=False)
    console.print(f"drew {len(drawn)} samples into {out}", markup=False)


def predict(
    model: Annotated[Path, typer.Argument(help="model folder, checkpoint, or run folder")],
    images: Annotated[list[Path], typer.Argument(help="pictures, or folders of them")],
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("predictions"),
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="longest answer; default: the run's")
    ] = None,
) -> None:
    """Write and draw what a model finds in pictures: JSON Lines, COCO results and PNG files."""
    from rollstream.commands.predicting import predict as write_predictions

    with _progress() as progress:
        task = progress.add_task(escape(f"loading {model}"), total=None)
        done = write_predictions(
            model,
            images,
            out,
            max_new_tokens=max_new_tokens,
            progress=lambda count, total: progress.update(task, completed=count, total=total),
        )
    console = Console(soft_wrap=True, highlight=False)
    for problem in done.unreadable:
        console.print(f"left out: {problem}", markup=False)
    console.print(f"{done.num_objects} objects in {done.num_images} pictures", markup=False)
    for path in done.files:
        console.print(f"wrote {path}", markup=False)


def new(
    name: Annotated[str, typer.Argument(help="name of the run: a-z, 0-9 and hyphens")],
    data: Annotated[Path, typer.Option(help="folder that data import wrote")],
    model: Annotated[Path, typer.Option(help="model folder with coordinate tokens")],
    folder: Annotated[Path, typer.Option(help="where the configurations go")] = Path(),
    gpus: Annotated[
        int | None, typer.Option(min=0, help="GPUs to use; default: those of this machine")
    ] = None,
    warm: Annotated[bool, typer.Option(help="the model writes the format already; no warm start")] = False,
    lora: Annotated[bool, typer.Option("--lora", help="train adapters in place of the weights")] = False,
) -> None:
    """Measure data and model, and write configurations with values of their own, explained."""
    from rollstream.commands.new_run import describe_run, plan_run, write_run

    run = plan_run(name, data, model, num_gpus=gpus, is_warm=warm, is_lora=lora)
    console = Console(soft_wrap=True, highlight=False)
    for line in describe_run(run, write_run(run, folder)):
        console.print(line, markup=False)


@data_app.command()
def scenes(
    dst: Destination,
    num_train: Annotated[int, typer.Option(help="training scenes")] = 2000,
    num_val: Annotated[int, typer.Option(help="validation scenes")] = 128,
    seed: Seed = 0,
    image_size: Annotated[int, typer.Option(help="pixels a side")] = 128,
) -> None:
    """Generate scenes of scanned handwritten digits, with boxes and polygons."""
    from rollstream.datasets.scenes import make_scenes

    with _progress() as progress:
        task = progress.add_task("drawing scenes", total=None)
        summary = make_scenes(
            dst,
            num_train=num_train,
            num_val=num_val,
            seed=seed,
            image_size=image_size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(str(summary), markup=False)
    console.print("next: rollstream up configs/demo.yaml", markup=False)


@model_app.command()
def tiny(
    dst: Destination,
    preset: Annotated[Literal["scenes", "photos"], typer.Option(help="image size it suits")] = "scenes",
    seed: Seed = 0,
) -> None:
    """Make a tiny Qwen3-VL with random weights, as an ordinary Hugging Face folder."""
    from rollstream.models.tiny_model import make_tiny_model

    console = Console(stderr=True)
    with console.status("making a tiny model"):
        summary = make_tiny_model(dst, preset=preset, seed=seed)
    console = Console(soft_wrap=True, highlight=False)
    console.print(str(summary), markup=False)
    console.print(f"next: rollstream new NAME --data FOLDER --model {dst}", markup=False)


@model_app.command()
def adapt(
    src: Annotated[str, typer.Argument(help="stock Qwen checkpoint: a folder, or a hub name in the cache")],
    dst: Destination,
) -> None:
    """Make a stock Qwen2-VL, Qwen2.5-VL or Qwen3-VL usable: coordinate tokens, and rows for them."""
    from rollstream.models.adapting import adapt_model

    with _progress() as progress:
        task = progress.add_task("copying weights", total=None)
        summary = adapt_model(
            src, dst, progress=lambda done, total: progress.update(task, completed=done, total=total)
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(str(summary), markup=False)
    console.print(f"next: rollstream new NAME --data FOLDER --model {dst}", markup=False)


@model_app.command()
def export(
    src: Annotated[Path, typer.Argument(help="a run's folder, or one of its checkpoints")],
    dst: Destination,
    step: Annotated[int | None, typer.Option(help="checkpoint of a run; the latest by default")] = None,
    apart: Annotated[bool, typer.Option("--apart", help="an adapter beside its base, not merged")] = False,
    dtype: Annotated[Literal["bfloat16", "float32"], typer.Option(help="format of the weights")] = "bfloat16",
) -> None:
    """Write what a run trained as an ordinary folder for transformers and vLLM, adapters merged or apart."""
    from rollstream.models.exporting import export_model

    with Console(stderr=True).status("writing the model"):
        summary = export_model(src, dst, step=step, is_apart=apart, dtype=dtype)
    console = Console(soft_wrap=True, highlight=False)
    console.print(str(summary), markup=False)
    console.print(
        f"next: rollstream predict {dst} IMAGE, or rollstream model push {dst} OWNER/NAME", markup=False
    )


@model_app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="folder that model export wrote, or any model folder")],
    name: Annotated[str, typer.Argument(help="repository on the hub: owner/model")],
    public: Annotated[
        bool, typer.Option("--public", help="for everybody; a new one is private else")
    ] = False,
    message: Annotated[str | None, typer.Option(help="commit message")] = None,
) -> None:
    """Put a model on the Hugging Face hub, or the one that HF_ENDPOINT names, in one commit."""
    from rollstream.models.pushing import push_model

    with Console(stderr=True).status("sending the model"):
        summary = push_model(folder, name, is_private=not public, message=message)
    Console(soft_wrap=True, highlight=False).print(str(summary), markup=False)


def _progress() -> Progress:
    from rich.progress import Progress

    return Progress(console=Console(stderr=True), transient=True)
