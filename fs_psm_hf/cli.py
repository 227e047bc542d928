"""`fs-psm`: the command line. Bodies are imported when their command runs."""

import csv
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer


app = typer.Typer(
    help="Feature-space smoothing for vision-language models, with certificates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def _list_images(folder, where, limit):
    """Relative paths of the images below `folder`; with `where` the rows of its metadata.csv that agree."""
    if not folder.is_dir():
        raise ValueError(f"`--images` must be a folder, got {folder}")
    if where is None:
        found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        names = sorted(path.relative_to(folder).as_posix() for path in found)
    else:
        column, equals, value = where.partition("=")
        table = folder / "metadata.csv"
        if not equals or not table.is_file():
            raise ValueError(f"`--where` must be COLUMN=VALUE of {table}, got {where!r}")
        with open(table, newline="") as stream:
            rows = list(csv.DictReader(stream))
        if not rows or column not in rows[0] or "file_name" not in rows[0]:
            raise ValueError(f"`--where` must name a column of {table} beside file_name, got {column!r}")
        names = sorted({row["file_name"] for row in rows if row[column] == value})
    if not names:
        raise ValueError(f"`--images` {folder} holds no image" + (f" with {where}" if where else ""))
    return names[:limit]


def _load_tower(name, psm_name, processor_name, sigma, num_samples):
    """A smoothed tower and its image processor from whatever `name` holds: tower, host, CLIP or vision model."""
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoModel
    from transformers.utils import logging

    from . import PSMModel, SmoothedVisionTower, SmoothedVisionTowerConfig, attach
    from .hosts import HOSTS
    from .loading import load_strictly

    try:
        config = AutoConfig.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"`--tower` must be a model folder or a Hub id, got {name}: {error}") from error
    try:
        processor = AutoImageProcessor.from_pretrained(processor_name or name)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--processor` is needed: {processor_name or name} holds no image processor") from error
    psm = None if psm_name is None else PSMModel.from_pretrained(psm_name)

    def load(model_class, leftover=()):
        # What is left over is judged there, in a sentence; transformers' own report would be a page.
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            return load_strictly(model_class.from_pretrained, model_class, name, leftover=leftover)[0]
        finally:
            logging.set_verbosity(verbosity)

    host = None
    if config.model_type == SmoothedVisionTowerConfig.model_type:
        tower = SmoothedVisionTower.from_pretrained(name)
    elif config.model_type in HOSTS:
        host = load(transformers.AutoModelForImageTextToText)
        tower = host.model.vision_tower
    elif config.model_type == "siglip":
        tower = load(transformers.SiglipVisionModel, ("text_model.", "logit_"))
    elif config.model_type == "clip" or "CLIPVisionModelWithProjection" in (config.architectures or ()):
        tower = load(transformers.CLIPVisionModelWithProjection, ("text_model.", "text_projection.", "logit_scale"))
    else:
        tower = load(AutoModel)
    if isinstance(tower, SmoothedVisionTower):
        if psm is not None:
            raise ValueError(f"`--psm` must not be given for a tower that is smoothed already, got {psm_name}")
        tower.config.sigma = tower.config.sigma if sigma is None else sigma
        tower.config.num_samples = num_samples or tower.config.num_samples
        return tower, processor
    settings = {"sigma": 0.25 if sigma is None else sigma, "num_samples": num_samples or 4, "processor": processor}
    if host is not None:
        return attach(host, psm, **settings), processor
    return SmoothedVisionTower.from_components(tower, psm, **settings), processor


@app.command()
def certify(
    tower: Annotated[str, typer.Option(help="Folder or Hub id: smoothed tower, LLaVA, CLIP or vision model.")],
    images: Annotated[Path, typer.Option(help="Folder of images.")],
    output: Annotated[Path, typer.Option(help="JSON-lines file for the results.")],
    psm: Annotated[str | None, typer.Option(help="PSM for a plain tower; plain smoothing without.")] = None,
    processor: Annotated[str | None, typer.Option(help="Image processor, if it is not beside the tower.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise, in [0, 1] pixels [0.25, or the tower's].")] = None,
    num_samples: Annotated[int, typer.Option(help="Draws per image.")] = 10_000,
    served_samples: Annotated[int | None, typer.Option(help="Draws the served model averages [4, or the tower's].")] = None,
    alpha: Annotated[float, typer.Option(help="Error probability of each certificate.")] = 1e-3,
    epsilon: Annotated[list[float], typer.Option(help="ℓ₂ radius in [0, 1] pixels; may be repeated.")] = (
        0.125, 0.25, 0.375, 0.5, 0.75,
    ),
    level: Annotated[float, typer.Option(help="Cosine that the radius keeps.")] = 0.5,
    anchor: Annotated[str, typer.Option(help="clean or smoothed.")] = "clean",
    feature: Annotated[str, typer.Option(help="tokens, cls or pooled.")] = "tokens",
    where: Annotated[str | None, typer.Option(help="COLUMN=VALUE of the folder's metadata.csv.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first images.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="Noisy images per pass.")] = None,
    device: Annotated[str | None, typer.Option(help="torch device [cuda where there is one].")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise [the operating system's].")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an existing output.")] = False,
    save_scores: Annotated[Path | None, typer.Option(help="Folder for the scores of each image.")] = None,
):  # fmt: skip
    """Certify every image of a folder; plug-in estimates beside 1 - alpha certificates from the same draws."""
    import torch
    from transformers.utils import logging

    from .certification import format_table
    from .certification.certify import short_name
    from .certification.folder import certify_folder
    from .configuration_fs_psm import check_smoothing

    check_smoothing(0.25 if sigma is None else sigma, 4 if served_samples is None else served_samples, max_batch_size)
    if limit is not None and limit < 1:
        raise ValueError(f"`--limit` must be >= 1, got {limit}")
    files = _list_images(images, where, limit)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device` must be one torch can use here, got {device}: {error}") from error
    logging.disable_progress_bar()
    model, image_processor = _load_tower(tower, psm, processor, sigma, served_samples)
    model = model.to(device)
    model.config.max_batch_size = max_batch_size or model.config.max_batch_size
    settings = {"tower": short_name(tower), "images": images.resolve().name, "where": where, "limit": limit}
    command = f"fs-psm certify --tower {short_name(tower)} --images {settings['images']} --output {output.name}"
    for name, value in (
        ("psm", psm and short_name(psm)), ("sigma", sigma), ("num-samples", num_samples),
        ("served-samples", served_samples), ("alpha", alpha), *(("epsilon", value) for value in epsilon),
        ("level", level), ("anchor", anchor), ("feature", feature), ("where", where), ("limit", limit),
        ("max-batch-size", max_batch_size), ("seed", seed),
    ):  # fmt: skip
        command += "" if value is None else f" --{name} {value}"
    certificates, unreadable = certify_folder(
        model, image_processor, images, files, output, settings=settings, command=command,
        methods=["cdf", "plugin"], epsilons=tuple(epsilon), alpha=alpha, level=level, num_samples=num_samples,
        anchor=anchor, feature=feature, seed=seed, resume=resume, save_scores=save_scores,
    )  # fmt: skip
    if certificates:
        typer.echo(format_table(certificates))
    for name in unreadable:
        typer.echo(f"not certified: {name} is not a readable image", err=True)
    if unreadable:
        raise typer.Exit(1)


@app.command()
def demo(
    models: Annotated[Path, typer.Option(help="Folder with the embedded models.")] = Path("model_cards"),
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("demo.png"),
):
    """Caption and certify photographs with the embedded LLaVA, plain and smoothed; writes a picture."""
    from transformers.utils import logging

    from .demo import run

    logging.disable_progress_bar()
    typer.echo(run(models=models, output=output, progress=True))


@app.command()
def env():
    """Print the versions a bug report needs."""
    import torch

    from . import __version__

    names = ("transformers", "diffusers", "accelerate", "safetensors", "huggingface_hub", "numpy", "scipy")
    typer.echo(f"fs_psm_hf: {__version__}")
    typer.echo(f"python: {platform.python_version()} on {platform.platform()}")
    typer.echo(f"torch: {torch.__version__}, cuda {torch.version.cuda}, available {torch.cuda.is_available()}")
    for name in names:
        typer.echo(f"{name}: {metadata.version(name)}")


def main():
    """Run the command line; a user's mistake is one line and exit code 2."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        app()
    except (StrictDataclassError, ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"fs-psm: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
