"""`rollstream data` and `rollstream model`: what a run needs before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.progress import Progress

data_app = typer.Typer(no_args_is_help=True)
model_app = typer.Typer(no_args_is_help=True)
Destination = Annotated[Path, typer.Argument(help="folder to write")]
Seed = Annotated[int, typer.Option(help="seed")]


@data_app.command("import")
def import_data(
    kind: Annotated[
        Literal["voc", "coco", "labelme", "yolo", "qwen"],
        typer.Argument(help="layout of SRC; qwen: JSON Lines of Qwen-VL grounding"),
    ],
    src: Annotated[Path, typer.Argument(help="folder of the data set; coco and qwen take a file too")],
    dst: Destination,
    strict: Annotated[bool, typer.Option(help="refuse the whole set for one broken annotation")] = False,
    val_share: Annotated[float, typer.Option(help="share for validation where SRC has no splits")] = 0.1,
    seed: Annotated[int, typer.Option(help="seed of that split")] = 0,
    resplit: Annotated[bool, typer.Option(help="split by share although SRC has splits")] = False,
    group_by: Annotated[
        Literal["file", "folder"], typer.Option(help="what the split keeps together")
    ] = "file",
    masks: Annotated[
        Literal["outline", "hull", "box"], typer.Option(help="what masks and objects of several parts become")
    ] = "outline",
    simplify: Annotated[
        float, typer.Option(min=0, help="polygons lose vertices that move them by less, in bins; 0: none")
    ] = 1.0,
    base: Annotated[
        Literal["auto", "0", "1"], typer.Option(help="first pixel of VOC's coordinates")
    ] = "auto",
    coordinates: Annotated[
        Literal["auto", "pixels", "thousandths"], typer.Option(help="what the numbers of qwen lines are")
    ] = "auto",
    link: Annotated[bool, typer.Option(help="hard links to the pictures instead of copies")] = False,
    model: Annotated[
        Path | None, typer.Option(help="model folder whose tokens the lengths are told in")
    ] = None,
) -> None:
    """Import a data set with boxes, polygons or masks; ends with a table of what was done."""
    from rollstream.datasets.importing import describe_summary, import_dataset

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(f"importing {src}", total=None)
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

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("drawing scenes", total=None)
        summary = make_scenes(
            dst,
            num_train=num_train,
            num_val=num_val,
            seed=seed,
            image_size=image_size,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    Console(soft_wrap=True, highlight=False).print(str(summary), markup=False)


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
    Console(soft_wrap=True, highlight=False).print(str(summary), markup=False)
