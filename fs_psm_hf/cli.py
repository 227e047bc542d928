"""`fs-psm`: the command line. Bodies are imported when their command runs."""

import inspect
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer

from .heap import keep_freed_memory


app = typer.Typer(
    help="Feature-space smoothing for vision-language models, with certificates.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def certify(
    output: Annotated[Path, typer.Option(help="JSON-lines file for the results.")],
    tower: Annotated[str | None, typer.Option(help="Folder or Hub id: smoothed tower, LLaVA, CLIP or vision model.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of images.")] = None,
    psm: Annotated[str | None, typer.Option(help="PSM for a plain tower; plain smoothing without.")] = None,
    processor: Annotated[str | None, typer.Option(help="Image processor, if it is not beside the tower.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the checkpoint's).")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="Run the passes under torch.compile.")] = False,
    sigma: Annotated[float | None, typer.Option(help="Noise, in [0, 1] pixels (default: 0.25, or the tower's).")] = None,
    num_samples: Annotated[int | None, typer.Option(help="Draws per image (default: 10000, or all saved ones).")] = None,
    target_radius: Annotated[float | None, typer.Option(help="Stop once this radius is certified or out of reach.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Stop once more draws would add less than this radius.")] = None,
    served_samples: Annotated[int | None, typer.Option(help="Draws the served model averages (default: 4, or the tower's).")] = None,
    method: Annotated[list[str], typer.Option(help="cdf, cdf_pilot, betting, bernstein, hoeffding, best or plugin.")] = (
        "cdf", "plugin",
    ),
    alpha: Annotated[float, typer.Option(help="Error probability of each certificate.")] = 1e-3,
    beta: Annotated[float, typer.Option(help="Failure probability of one query of the served model.")] = 0.05,
    epsilon: Annotated[list[float], typer.Option(help="ℓ₂ radius in [0, 1] pixels; may be repeated.")] = (
        0.125, 0.25, 0.375, 0.5, 0.75,
    ),
    level: Annotated[float, typer.Option(help="Cosine that the radius keeps.")] = 0.5,
    anchor: Annotated[str | None, typer.Option(help="clean or smoothed (default: clean).")] = None,
    feature: Annotated[str | None, typer.Option(help="tokens, cls or pooled (default: tokens).")] = None,
    per_token: Annotated[bool, typer.Option(help="Certify each token by itself.")] = False,
    center: Annotated[Path | None, typer.Option(help="Folder of images whose mean feature is subtracted.")] = None,
    labels: Annotated[Path | None, typer.Option(help="safetensors with text_embeds, or weight and bias: certify the label.")] = None,
    where: Annotated[str | None, typer.Option(help="COLUMN=VALUE of the folder's metadata.csv.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first images.")] = None,
    max_batch_size: Annotated[int | None, typer.Option(help="Noisy images per pass.")] = None,
    device: Annotated[str | None, typer.Option(help="torch device (default: cuda where there is one).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the noise (default: the operating system's).")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with an existing output.")] = False,
    save_scores: Annotated[Path | None, typer.Option(help="Folder for the scores of each image.")] = None,
    save_features: Annotated[bool, typer.Option(help="Save the features too, for later label questions.")] = False,
    from_scores: Annotated[Path | None, typer.Option(help="Answer from saved scores; choose method, alpha and draws before you look.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the certificates to write.")] = None,
):  # fmt: skip
    """Certify every image of a folder; plug-in estimates beside 1 - alpha certificates from the same draws."""
    given = dict(locals())
    from .certification import format_label_table, format_table
    from .certification.folder import certify_saved
    from .certification.question import Question
    from .inputs import load_classifier

    about_draws = (
        "tower", "images", "psm", "processor", "dtype", "compile", "sigma", "anchor", "feature", "per_token", "center", "where",
        "limit", "max_batch_size", "device", "seed", "resume", "save_scores", "save_features",
    )  # fmt: skip
    if from_scores is not None:
        wrong = [name.replace("_", "-") for name in about_draws if given[name] not in (None, False)]
        if wrong:
            raise ValueError(f"`--from-scores` takes the draws as they are, got --{wrong[0]} as well")
    elif tower is None or images is None:
        raise ValueError("`--tower` and `--images` must be given, or `--from-scores`")
    if plot is not None:
        from .plots import check_picture

        if per_token:
            raise ValueError("`--plot` draws certificates of whole features, not `--per-token`")
        check_picture(plot)
    if num_samples is None:
        num_samples = None if from_scores is not None else 10_000
    elif num_samples < 1:
        raise ValueError(f"`--num-samples` must be >= 1, got {num_samples}")
    question = Question(
        methods=tuple(method), epsilons=tuple(epsilon), num_samples=num_samples, alpha=alpha, level=level, beta=beta,
        target_radius=target_radius, tolerance=tolerance, curve=plot is not None,
        classifier=None if labels is None else load_classifier(labels),
    )  # fmt: skip
    command = _command("certify", certify, given)
    if from_scores is not None:
        results = certify_saved(from_scores, output, question, served_samples=served_samples, command=command)
        unreadable = []
    else:
        finished = _certify_images(question, command, given)
        if finished is None:
            return  # not the first process
        results, unreadable = finished
    certificates = results.certificates()
    if certificates:
        typer.echo(format_table(certificates, null_cosine=results.lines[-1]["null_cosine"]))
    if results.label_certificates():
        typer.echo(format_label_table(results.label_certificates()))
    if plot is not None and certificates:
        from .plots import plot_results

        plot_results(results.lines, plot)
    for name in unreadable:
        typer.echo(f"not certified: {name} is not a readable image", err=True)
    if unreadable:
        raise typer.Exit(1)


def _certify_images(question, command, given):
    """The part of `certify` that needs a model; `None` in every process but the first."""
    from transformers.utils import logging

    from .certification.folder import certify_folder, mean_feature, one_of_several
    from .certification.identity import short_name
    from .configuration_fs_psm import check_smoothing
    from .inputs import check_device, list_images, load_tower

    sigma, served, limit, images = given["sigma"], given["served_samples"], given["limit"], given["images"]
    check_smoothing(0.25 if sigma is None else sigma, 4 if served is None else served, given["max_batch_size"])
    if limit is not None and limit < 1:
        raise ValueError(f"`--limit` must be >= 1, got {limit}")
    if given["seed"] is not None and given["seed"] < 0:
        raise ValueError(f"`--seed` must be >= 0, got {given['seed']}")
    feature, anchor = given["feature"] or "tokens", given["anchor"] or "clean"
    files = list_images(images, given["where"], limit)
    device = check_device(given["device"])
    one_of_several(device)  # under `accelerate launch`, "cuda" is from here on this process's own
    logging.disable_progress_bar()
    model, processor = load_tower(given["tower"], given["psm"], given["processor"], sigma, served, given["dtype"])
    model = model.to(device)
    model.config.max_batch_size = given["max_batch_size"] or model.config.max_batch_size
    if given["compile"]:
        model.compile()
    center = None
    if given["center"] is not None:
        references = list_images(given["center"], None, None, option="--center")
        center = mean_feature(model, processor, given["center"], references, feature, progress=True)
    settings = {"tower": short_name(given["tower"]), "images": images.resolve().name}
    options = ("per_token", "seed", "resume", "save_scores", "save_features")
    return certify_folder(
        model, processor, images, files, given["output"], question, center=center, command=command,
        feature=feature, anchor=anchor,
        settings=settings | {name: given[name] for name in ("where", "limit")},
        **{name: given[name] for name in options},
    )  # fmt: skip


def _command(name, function, given):
    """What was typed, as far as it differs from the defaults; folders by their last name, so that no machine is named."""
    words = [f"fs-psm {name}"]
    for option, parameter in inspect.signature(function).parameters.items():
        value, default = given[option], parameter.default
        several = isinstance(value, (list, tuple))
        if option in ("resume", "plot") or value == (list(default) if several else default):
            continue
        for part in value if several else [value]:
            shown = part.resolve().name if isinstance(part, Path) else part
            if option in ("tower", "psm", "processor"):
                shown = Path(shown).resolve().name if Path(shown).exists() else shown
            if option == "set_":
                variable, equals, path = part.partition("=")
                shown = variable + equals + (Path(path).resolve().name if Path(path).is_absolute() else path)
            words.append(f"--{option.strip('_').replace('_', '-')}" + ("" if part is True else f" {shown}"))
    return " ".join(words)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def train(context: typer.Context):
    """Train a PSM for a tower; --help lists the arguments, those of `accelerate launch -m fs_psm_hf.training`."""
    from .training.__main__ import main as run

    run(context.args)


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
def card(
    folder: Annotated[Path, typer.Argument(help="Model folder with config.json, or with results of `fs-psm certify`.")],
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit code 1 where the card would change.")] = False,
):  # fmt: skip
    """Write README.md from the folder's config and results; what a human wrote in it stays."""
    from .cards import write_card

    changes = write_card(folder, check=check)
    state = "would change" if check else "written"
    typer.echo(f"{folder / 'README.md'}: {state if changes else 'up to date'}")
    for change in changes:
        typer.echo(f"- {change}")
    if check and changes:
        raise typer.Exit(1)


@app.command()
def attack(
    tower: Annotated[str, typer.Option(help="Folder or Hub id: smoothed tower, LLaVA, CLIP or vision model.")],
    images: Annotated[Path, typer.Option(help="Folder of clean images.")],
    output: Annotated[Path, typer.Option(help="Folder for adversarial PNGs and attacks.jsonl; goes on with an earlier run.")],
    targets: Annotated[Path | None, typer.Option(help="Folder of target images, paired by file stem.")] = None,
    method: Annotated[str, typer.Option(help="attackvlm, m_attack, m_attack_global, foa, or untargeted pgd, apgd.")] = "foa",
    mode: Annotated[str, typer.Option(help="transfer (plain tower) or adaptive (through noise, purifier and mapper).")] = "transfer",
    epsilon: Annotated[str, typer.Option(help="Strength in [0, 1] pixels; fractions are fine.")] = "16/255",
    norm: Annotated[str, typer.Option(help="linf or l2.")] = "linf",
    steps: Annotated[int, typer.Option(help="Gradient steps.")] = 300,
    step_size: Annotated[str | None, typer.Option(help="Step in [0, 1] pixels (default: the method's).")] = None,
    psm: Annotated[str | None, typer.Option(help="PSM for a plain tower; plain smoothing without.")] = None,
    sigma: Annotated[float | None, typer.Option(help="Noise, in [0, 1] pixels (default: 0.25, or the tower's).")] = None,
    draws: Annotated[int, typer.Option(help="Noise draws per step of an adaptive attack.")] = 8,
    straight_through: Annotated[bool, typer.Option(help="Pass the purifier by on the way back.")] = False,
    feature: Annotated[str, typer.Option(help="tokens, cls or pooled.")] = "tokens",
    processor: Annotated[str | None, typer.Option(help="Image processor, if it is not beside the tower.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the checkpoint's).")] = None,
    image_size: Annotated[int, typer.Option(help="Side of the attacks' frame, in pixels.")] = 224,
    limit: Annotated[int | None, typer.Option(help="Only the first images.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 4,
    device: Annotated[str | None, typer.Option(help="torch device (default: cuda where there is one).")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of crops and noise (default: the operating system's).")] = None,
):  # fmt: skip
    """Attack the images of a folder; run the same command again to go on after a kill."""
    given = dict(locals())
    from .evaluation.commands import run_attack

    typer.echo(run_attack(given, _command("attack", attack, given)))


@app.command()
def evaluate(
    config: Annotated[Path, typer.Option(help="YAML file, such as examples/tables/table1.yaml.")],
    output: Annotated[Path | None, typer.Option(help="JSON-lines file, made or gone on with (default: NAME.jsonl).")] = None,
    set_: Annotated[list[str], typer.Option("--set", help="NAME=VALUE for ${NAME} of the file; may be repeated.")] = (),
    limit: Annotated[int | None, typer.Option(help="At most so many images.")] = None,
    device: Annotated[str | None, typer.Option(help="torch device (default: cuda where there is one).")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything without weights and say what would run.")] = False,
    rejudge: Annotated[Path | None, typer.Option(help="A finished run, to be scored by the judge of the file.")] = None,
    attacks: Annotated[Path | None, typer.Option(help="Also write the cells as results/attacks*.json of a model card.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture to write: clean, adversarial, change, purified, answers.")] = None,
):  # fmt: skip
    """Attack models with and without the defence, as a YAML file asks; run the same command again after a kill."""
    given = dict(locals())
    from .evaluation.commands import run_evaluate

    said = run_evaluate(given, _command("evaluate", evaluate, given))
    if said is not None:  # the first process
        typer.echo(said)


@app.command()
def tables(
    paper: Annotated[int | None, typer.Option(help="Table of the paper, 1 to 8; 6, 7, 8 are S.6, S.7, S.8. Without: ours alone.")] = None,
    results: Annotated[list[Path], typer.Option(help="Results of `fs-psm certify` or `fs-psm evaluate`; may be repeated.")] = (),
):  # fmt: skip
    """Print a table of the paper with rows of ours beside it, or the cells of `fs-psm evaluate` alone, as Markdown."""
    from .evaluation.attack_tables import format_results
    from .evaluation.tables import format_paper_table

    typer.echo(format_results(results) if paper is None else format_paper_table(paper, results))


convert_app = typer.Typer(help="Turn checkpoints of other code into model folders.", no_args_is_help=True)
app.add_typer(convert_app, name="convert")


@convert_app.command("guided-diffusion")
def convert_guided_diffusion(
    checkpoint: Annotated[Path, typer.Option(help="State dict, such as 256x256_diffusion_uncond.pt.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    output_format: Annotated[str, typer.Option("--format", help="psm (a purifier) or unet (diffusers' UNet2DModel).")] = "psm",
    num_head_channels: Annotated[int | None, typer.Option(help="Its flag of this name (default: 64).")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Its flag of this name, where it has no --num-head-channels.")] = None,
    new_attention_order: Annotated[bool, typer.Option(help="Its --use_new_attention_order was True.")] = False,
    image_size: Annotated[int | None, typer.Option(help="Its flag of this name (default: by the channels, if known).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the checkpoint's).")] = None,
):  # fmt: skip
    """Convert an OpenAI guided-diffusion U-Net; a purifier needs one trained to predict noise on the linear schedule."""
    import torch
    from transformers.utils import logging

    from .conversion import convert_guided_diffusion_checkpoint
    from .inputs import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(DTYPES)}, got {dtype}")
    logging.disable_progress_bar()
    folder = convert_guided_diffusion_checkpoint(
        checkpoint, output, output_format=output_format, dtype=None if dtype is None else getattr(torch, dtype),
        num_head_channels=num_head_channels, num_heads=num_heads, use_new_attention_order=new_attention_order,
        image_size=image_size,
    )  # fmt: skip
    typer.echo(f"wrote {folder}")


@convert_app.command("open-clip")
def convert_open_clip(
    checkpoint: Annotated[Path, typer.Option(help="State dict of a visual or a whole CLIP, such as fare_eps_4.pt.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    image_size: Annotated[int | None, typer.Option(help="Resample the position embeddings for images of this size (default: the checkpoint's).")] = None,
    num_heads: Annotated[int | None, typer.Option(help="Attention heads (default: width / 64; ViT-H, -g, -bigG and -e have 16).")] = None,
    hidden_act: Annotated[str, typer.Option(help="quick_gelu (OpenAI's weights, FARE and TeCoA from them) or gelu (most others).")] = "quick_gelu",
    projection: Annotated[bool | None, typer.Option(help="Keep the projection into the space shared with text (default: where there is one).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 (default: the checkpoint's).")] = None,
):  # fmt: skip
    """Convert the Vision Transformer of an open_clip or OpenAI CLIP, such as FARE or TeCoA, to a CLIP vision model."""
    import torch
    from transformers.utils import logging

    from .conversion_open_clip import convert_open_clip_checkpoint
    from .inputs import DTYPES

    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"`--dtype` must be one of {', '.join(DTYPES)}, got {dtype}")
    logging.disable_progress_bar()
    folder = convert_open_clip_checkpoint(
        checkpoint, output, dtype=None if dtype is None else getattr(torch, dtype), image_size=image_size,
        num_heads=num_heads, hidden_act=hidden_act, projection=projection,
    )  # fmt: skip
    typer.echo(f"wrote {folder}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Model folder, such as model_cards/NAME or the output of a training.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, OWNER/NAME.")],
    revision: Annotated[str | None, typer.Option(help="Branch (default: main).")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private; refuse a public one.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a draft pull request instead of a commit.")] = False,
    commit_message: Annotated[str | None, typer.Option(help="First line of the commit's message.")] = None,
    token: Annotated[str | None, typer.Option(help="Token (default: that of `hf auth login`, or HF_TOKEN).")] = None,
):  # fmt: skip
    """Upload a model folder to the Hub in one commit; what humans wrote into its card stays."""
    from transformers.utils import logging

    from .hub import push_folder

    logging.disable_progress_bar()
    typer.echo(
        push_folder(
            folder, repo_id, token=token, private=private or None, revision=revision, create_pr=create_pr,
            commit_message=commit_message,
        )
    )  # fmt: skip


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

    keep_freed_memory()
    try:
        app()
    except (StrictDataclassError, ValueError, TypeError, OSError, ImportError) as error:
        typer.echo(f"fs-psm: {' '.join(str(error).split())}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
