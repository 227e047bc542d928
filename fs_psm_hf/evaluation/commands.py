"""What `fs-psm attack` and `fs-psm evaluate` do, from their options to what they say."""

from pathlib import Path

from transformers.utils import logging

from ..certification.folder import one_of_several
from ..certification.identity import short_name
from ..inputs import check_device, load_tower
from .attack_folder import attack_folder, summary_line
from .attack_tables import format_results
from .cells import write_attacks
from .config_values import read_number
from .rows import seen_size
from .run_config import read_config


def _read_option(text, option):
    return None if text is None else read_number(text, f"--{option}")


def run_attack(given, command):
    """The body of `fs-psm attack`; returns what to tell a person."""
    epsilon, step_size = _read_option(given["epsilon"], "epsilon"), _read_option(given["step_size"], "step-size")
    for name in ("limit", "batch_size", "image_size"):
        if given[name] is not None and given[name] < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be >= 1, got {given[name]}")
    device = check_device(given["device"])
    logging.disable_progress_bar()
    tower, processor = load_tower(
        given["tower"], given["psm"], given["processor"], given["sigma"], dtype=given["dtype"]
    )
    size = seen_size(tower.config.vision_config, processor)
    options = (
        "targets", "method", "mode", "norm", "steps", "draws", "straight_through", "feature", "image_size", "limit",
        "batch_size", "seed",
    )  # fmt: skip
    records = attack_folder(
        tower.to(device).eval(), given["images"], given["output"], epsilon=epsilon, step_size=step_size, size=size,
        name=short_name(given["tower"]), command=command, **{name: given[name] for name in options},
    )  # fmt: skip
    return summary_line(records)


def run_evaluate(given, command):
    """The body of `fs-psm evaluate`; returns what to tell a person, `None` in every process but the first."""
    variables = {}
    for part in given["set_"]:
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise ValueError(f"`--set` must be NAME=VALUE, got {part}")
        variables[name] = value
    if given["limit"] is not None and given["limit"] < 1:
        raise ValueError(f"`--limit` must be >= 1, got {given['limit']}")
    config = read_config(given["config"], variables, given["limit"])
    if given["plot"] is not None:
        from ..plots import check_picture

        check_picture(given["plot"])
    if given["dry_run"]:
        from .dry_run import dry_run

        return dry_run(config)
    output = given["output"] or Path(f"{config.name}.jsonl")
    if given["rejudge"] is not None:
        if output.resolve() == given["rejudge"].resolve():
            raise ValueError(f"`--output` must be another file than `--rejudge`, got {output} for both")
        from .rejudge import rejudge

        results = rejudge(given["rejudge"], output, config, command=command)
    else:
        from .runner import evaluate

        device = check_device(given["device"])
        one_of_several(device)  # under `accelerate launch`, "cuda" is from here on this process's own
        logging.disable_progress_bar()
        results = evaluate(config, output, device=device, command=command)
        if results is None:
            return None
        if given["plot"] is not None:
            from .pictures import plot_run

            plot_run(config, output, given["plot"], device=device)
    if given["attacks"] is not None:
        write_attacks(given["attacks"], results, command, seed=config.seed, data=config.settings()["task"])
    return format_results([output])
