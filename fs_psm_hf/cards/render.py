"""A new card of a model folder, from its config, its weights' header and its results; no number is typed by hand."""

from pathlib import Path

import jinja2

from . import tables
from .content import Card
from .merge import known_line, parse_blocks, split_card
from .metadata import card_data


TEMPLATE = Path(__file__).parents[1] / "templates" / "model_card.md"


def render_card(folder):
    """The text of a new card, from these files of `folder` and nothing else:

    - `config.json` of a PSM or of a smoothed tower, and the header of `*.safetensors`; a folder of results has neither;
    - `results/card.json`, what no result says; each of its keys may be absent: `license`, `base_model` (an id of the Hub, or
      null), `tower` (`name`, `class`, `feature`, `text`), `datasets`, `tags`, `example` (`sigma`, `num_samples`), `training`
      (`text`, `data`, `sigma_min`, `sigma_max`, `steps`, `hardware`, `command`) or `measuring` (`text`, `command`),
      `evaluation` (per results file without its ending, one for all of `attacks*`: `type`, `name`, `split`, `text` of its images), `rows` (words for names), `limits`;
    - `results/table5.json`, `clean_utility*.json`, `attacks*.json`, `cost.json`, and `*.jsonl` of `fs-psm certify`.

    Args:
        folder (`str` or `os.PathLike`): its last name is the name of the model.

    Returns:
        `str`: metadata and text. What was not measured is said to be not measured.

    Raises:
        ValueError: there is neither a config nor a result, or a file lacks a key, has another form or holds a token.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"`folder` must be a folder with config.json or results, got {folder.name or folder}")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    try:
        card = Card(folder)
        template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
        body = template.render(card=card, facts=card.facts, tables=tables)
        data = card_data(card)
    except (TypeError, AttributeError, LookupError, jinja2.UndefinedError) as error:
        raise ValueError(
            f"config.json or `results` of {folder.name} has another form than a card reads: {error}"
        ) from error
    names = [name for name, _ in parse_blocks(body, "new")[0] if name]
    text = f"---\n{data.to_yaml()}\n---\n\n{body}\n{known_line(names)}\n"
    parse_blocks(split_card(text)[3], "new")
    return text
