"""What an evaluation is asked, as a YAML file: models, rows, attacks, task, judge. Anything unknown is refused by name."""

import dataclasses
from pathlib import Path

import yaml

from ..features import FEATURES
from ..inputs import DTYPES
from .cells import ATTACK_NAMES, GRADIENTS, ROWS, Cell
from .config_values import (
    check_list,
    check_mapping,
    check_one_of,
    check_whole,
    is_int,
    read_number,
    shorten,
    substitute,
)


HOST_TASKS = ("captioning", "classification", "vqa")
TASKS = (*HOST_TASKS, "head", "retrieval")
JUDGES = ("keyword", "embedding", "llm")
UNTARGETED = ("pgd", "apgd")
# Words for what purifies in a row; a PSM file does not tell a diffusion model from a small one of the same class.
PURIFIERS = ("none", "diffusion", "light", "own")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """The task and its images.

    Args:
        kind (`str`): `"captioning"`, `"classification"` or `"vqa"` of a host, `"head"` (a one-layer classifier on features) or
            `"retrieval"` (which image's feature is the nearest).
        images (`str`): folder of the clean images, or for `"vqa"` a data set with the columns of ScienceQA.
        targets (`str`, *optional*): folder of the target images, paired by file stem; what stands for it otherwise, the task
            knows: images of the target class, of another class, or a column `target_file`. Those of a data set come in turn.
        limit (`int`, *optional*): the first images only.
        head (`str`, *optional*): safetensors file of a classifier for all encoders.
        head_images (`str`, *optional*): folder with labels that a classifier is fitted on, plain features of each encoder.
        split (`str`): of a data set.
        options (`dict`): further arguments of the task, such as `prompt`, `class_names` or `target_label`.
    """

    kind: str
    images: str
    targets: str | None = None
    limit: int | None = None
    head: str | None = None
    head_images: str | None = None
    split: str = "test"
    options: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """A row of the table.

    Args:
        row (`str`): `Org`, `FS`, `FS+M`, `FS+P` or `FS+P+M`.
        psm (`str`, *optional*): folder or Hub id; `FS+M` and `FS+P` use that part of it alone.
        sigma (`float`): noise in [0, 1]-pixel units.
        num_samples (`int`): the paper's n₀.
        purifier (`str`): `"diffusion"`, `"light"`, or `"own"`, a word for the table; `"none"` without one.
        encoders (`list[str]`, *optional*): those it is for; all of the model where not given.
    """

    row: str
    psm: str | None = None
    sigma: float = 0.25
    num_samples: int = 4
    purifier: str = "none"
    encoders: tuple[str, ...] | None = None

    def __post_init__(self):
        if self.row == "Org":
            object.__setattr__(self, "sigma", 0.0)
            object.__setattr__(self, "num_samples", 1)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A host with its encoders, or encoders alone.

    Args:
        name (`str`): as the paper calls it, `LLaVA-1.5-7B`.
        rows (`list[RowConfig]`): what it is defended with.
        encoders (`dict[str, str | None]`): by name (`org`, `FARE`, `TeCoA`), folder or Hub id; `null` is the host's own.
        host (`str`, *optional*): folder or Hub id; an encoder alone without.
        host_kind (`str`): `"transformers"` or `"open_flamingo"`.
        processor (`str`, *optional*): where it is not beside the model.
        dtype (`str`): `"float32"`, `"bfloat16"` or `"float16"`.
        feature (`str`): what is attacked and what FCS compares: `"tokens"`, `"cls"` or `"pooled"`.
        layer (`int`, *optional*): hidden layer of it, of an encoder alone; a host knows the layer it reads.
        image_size (`int`, *optional*): what an encoder sees; from its configuration where not given.
        options (`dict`): further arguments of the host's loader, or of `SmoothedVisionTower.from_components`.
        vision_config (`dict`, *optional*): configuration of the encoder, for a dry run where it is not on this machine.
    """

    name: str
    rows: tuple[RowConfig, ...]
    encoders: dict = dataclasses.field(default_factory=lambda: {"org": None})
    host: str | None = None
    host_kind: str = "transformers"
    processor: str | None = None
    dtype: str = "bfloat16"
    feature: str = "tokens"
    layer: int | None = None
    image_size: int | None = None
    options: dict = dataclasses.field(default_factory=dict)
    vision_config: dict | None = None


@dataclasses.dataclass(frozen=True)
class AttackConfig:
    """An attack.

    Args:
        method (`str`): `"attackvlm"`, `"m_attack"`, `"m_attack_global"`, `"foa"`, or untargeted `"pgd"` or `"apgd"`.
        mode (`str`): `"transfer"`, made on the plain tower once and shown to every row; `"adaptive"`, made on each smoothed row.
        epsilon (`float`): strength, in [0, 1]-pixel units; `16/255` may be written so.
        norm (`str`): `"linf"` or `"l2"`.
        steps (`int`): gradient steps.
        step_size (`float`, *optional*): in [0, 1]-pixel units; the method's own where not given.
        draws (`int`): noise draws per step of an adaptive attack.
        gradients (`list[str]`): of an adaptive attack, `"end-to-end"` and `"straight-through"`; a row without purifier knows
            the first only.
        rows (`list[str]`, *optional*): rows it is for; all that fit where not given.
        sigmas (`list[float]`, *optional*): only rows with one of these σ.
        limit (`int`, *optional*): the first images only.
    """

    method: str
    mode: str = "transfer"
    epsilon: float = 16 / 255
    norm: str = "linf"
    steps: int = 300
    step_size: float | None = None
    draws: int = 8
    gradients: tuple[str, ...] = ("end-to-end",)
    rows: tuple[str, ...] | None = None
    sigmas: tuple[float, ...] | None = None
    limit: int | None = None


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """The whole file.

    Args:
        name (`str`): of the evaluation.
        task ([`TaskConfig`]), models, attacks: what is asked.
        judge (`dict`): `kind` (`"keyword"`, `"embedding"`, `"llm"`) and the arguments of that judge.
        seed (`int`): of crops and noise, 2023 as in the attacks' own code.
        batch_size (`int`): images per batch, fixed, so that the result does not depend on the number of processes.
        image_size (`int`): side of the attacks' frame in pixels.
    """

    name: str
    task: TaskConfig
    models: tuple[ModelConfig, ...]
    attacks: tuple[AttackConfig, ...]
    judge: dict | None = None
    seed: int = 2023
    batch_size: int = 4
    image_size: int = 224

    def settings(self):
        """JSON-safe, the same on every machine: folders by their last name."""
        return shorten(dataclasses.asdict(self))

    def cells(self):
        """`[(Cell, ModelConfig, encoder, RowConfig, AttackConfig)]` of everything that is asked, each cell once."""
        found = {}
        for model in self.models:
            for encoder in model.encoders:
                for row in model.rows:
                    for attack in self.attacks if row.encoders is None or encoder in row.encoders else ():
                        for cell in _cells_of(self.task, model, encoder, row, attack):
                            if cell.key in found:
                                raise ValueError(f"`attacks` must ask for each cell once, got {cell.key} twice")
                            found[cell.key] = cell, model, encoder, row, attack
        if not found:
            raise ValueError("`attacks` must fit at least one row of `models`, got none that does")
        return list(found.values())


def _cells_of(task, model, encoder, row, attack):
    wanted = attack.rows is None or row.row in attack.rows
    if not wanted or (attack.sigmas is not None and row.sigma not in attack.sigmas):
        return
    if attack.mode == "adaptive" and row.row == "Org":
        return
    shared = {
        "model": model.name, "encoder": encoder, "row": row.row, "attack": attack.method, "epsilon": attack.epsilon,
        "task": task.kind, "norm": attack.norm, "steps": attack.steps, "sigma": float(row.sigma),
        "num_samples": row.num_samples, "purifier": row.purifier,
    }  # fmt: skip
    if attack.mode == "transfer":
        yield Cell(mode="white-box" if row.row == "Org" else "transfer", **shared)
        return
    for gradient in attack.gradients:
        if gradient == GRADIENTS[0] or "P" in row.row:
            yield Cell(mode="adaptive", gradient=gradient, draws=attack.draws, **shared)


# Reading --------------------------------------------------------------------------------------------------------------


def read_config(path, variables=None, limit=None) -> RunConfig:
    """The configuration of a YAML file.

    Args:
        path (`str` or `os.PathLike`): the file.
        variables (`dict[str, str]`, *optional*): values of `${NAME}` in its texts.
        limit (`int`, *optional*): at most so many images, whatever the file says.

    Raises:
        ValueError: it is no YAML, or a key or a value is missing, unknown, of another kind or out of range; one sentence.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"`--config` {path.name} must be YAML, got a file that is not: {error}") from error
    return parse_config(values, variables, limit)


def parse_config(values, variables=None, limit=None) -> RunConfig:
    """As [`read_config`], from the values of the file."""
    values = substitute(values, variables or {})
    top = check_mapping(values, RunConfig, "the file")
    task = _task(top["task"], limit)
    models = tuple(_model(entry, f"models.{i}") for i, entry in enumerate(check_list(top["models"], "models")))
    attacks = tuple(_attack(entry, f"attacks.{i}") for i, entry in enumerate(check_list(top["attacks"], "attacks")))
    for i, model in enumerate(models):
        if task.kind in HOST_TASKS and model.host is None:
            raise ValueError(f"`models.{i}.host` must be given for the task {task.kind}, which asks a language model")
    judge = top.get("judge")
    if judge is not None and (not isinstance(judge, dict) or judge.get("kind") not in JUDGES):
        raise ValueError(f"`judge` must have a `kind` of {', '.join(JUDGES)}, got {judge!r}")
    if task.kind == "captioning" and judge is None:
        raise ValueError("`judge` must be given for captions: " + ", ".join(JUDGES))
    simple = {name: top[name] for name in ("seed", "batch_size", "image_size") if name in top}
    for name, value in simple.items():
        if not is_int(value) or value < (0 if name == "seed" else 1):
            raise ValueError(f"`{name}` must be an integer >= {0 if name == 'seed' else 1}, got {value!r}")
    return RunConfig(name=str(top["name"]), task=task, models=models, attacks=attacks, judge=judge, **simple)


def _task(values, limit):
    values = check_mapping(values, TaskConfig, "task")
    check_one_of(values["kind"], TASKS, "task.kind")
    check_whole(values.get("limit"), "task.limit", 1)
    if (values["kind"] == "head") != bool(values.get("head") or values.get("head_images")):
        raise ValueError("`task.head_images` or `task.head` must be given for the task head and for no other")
    if values["kind"] == "retrieval" and values.get("targets") is None:
        raise ValueError("`task.targets` must be given for the task retrieval")
    if limit is not None:
        values["limit"] = min(limit, values.get("limit") or limit)
    return TaskConfig(**values)


def _model(values, where):
    values = check_mapping(values, ModelConfig, where)
    rows = [_row(entry, f"{where}.rows.{i}") for i, entry in enumerate(check_list(values["rows"], f"{where}.rows"))]
    check_one_of(values.get("dtype", "bfloat16"), DTYPES, f"{where}.dtype")
    check_one_of(values.get("feature", "tokens"), FEATURES, f"{where}.feature")
    check_one_of(values.get("host_kind", "transformers"), ("transformers", "open_flamingo"), f"{where}.host_kind")
    encoders = values.get("encoders", {"org": None})
    if not isinstance(encoders, dict) or not encoders:
        raise ValueError(f"`{where}.encoders` must be names with a folder or Hub id each, got {encoders!r}")
    if values.get("host") is None and any(path is None for path in encoders.values()):
        raise ValueError(f"`{where}.encoders` must name a folder or Hub id each where there is no `host`")
    for row in rows:
        unknown = set(row.encoders or ()) - set(encoders)
        if unknown:
            raise ValueError(
                f"`{where}.rows` names the encoder {sorted(unknown)[0]!r}, not one of {', '.join(encoders)}"
            )
    return ModelConfig(**values | {"rows": tuple(rows), "encoders": dict(encoders)})


def _row(values, where):
    values = check_mapping(values, RowConfig, where)
    check_one_of(values["row"], ROWS, f"{where}.row")
    name = values["row"]
    sigma = read_number(values.get("sigma", 0.25), f"{where}.sigma")
    if sigma < 0:
        raise ValueError(f"`{where}.sigma` must be >= 0, got {sigma:g}")
    check_whole(values.get("num_samples", 4), f"{where}.num_samples", 1)
    if (values.get("psm") is None) != (name in ("Org", "FS")):
        raise ValueError(f"`{where}.psm` must be given for FS+M, FS+P and FS+P+M and for no other row, got {name}")
    purifier = values.get("purifier", "none" if "P" not in name else "own")
    check_one_of(purifier, PURIFIERS, f"{where}.purifier")
    if (purifier == "none") != ("P" not in name):
        raise ValueError(f"`{where}.purifier` must be 'none' for rows without P and for no other, got {purifier!r}")
    encoders = values.get("encoders")
    return RowConfig(
        **values | {"sigma": sigma, "purifier": purifier, "encoders": None if encoders is None else tuple(encoders)}
    )


def _attack(values, where):
    values = check_mapping(values, AttackConfig, where)
    check_one_of(values["method"], tuple(ATTACK_NAMES), f"{where}.method")
    check_one_of(values.get("mode", "transfer"), ("transfer", "adaptive"), f"{where}.mode")
    norm = values.get("norm", "linf")
    check_one_of(norm, ("linf", "l2"), f"{where}.norm")
    epsilon = read_number(values.get("epsilon", 16 / 255), f"{where}.epsilon")
    if epsilon <= 0 or (norm == "linf" and epsilon > 1):
        raise ValueError(f"`{where}.epsilon` must be in (0, 1], the range of a pixel, got {epsilon:g}")
    for name, least in (("steps", 1), ("draws", 1), ("limit", 1)):
        check_whole(values.get(name, least), f"{where}.{name}", least)
    gradients = values.get("gradients", [GRADIENTS[0]])
    gradients = [gradients] if isinstance(gradients, str) else list(gradients)
    for gradient in gradients:
        check_one_of(gradient, GRADIENTS, f"{where}.gradients")
    for row in values.get("rows") or ():
        check_one_of(row, ROWS, f"{where}.rows")
    numbers = {"epsilon": epsilon, "gradients": tuple(gradients)}
    if values.get("step_size") is not None:
        numbers["step_size"] = read_number(values["step_size"], f"{where}.step_size")
    for name in ("rows", "sigmas"):
        if values.get(name) is not None:
            convert = float if name == "sigmas" else str
            numbers[name] = tuple(convert(value) for value in check_list(values[name], f"{where}.{name}"))
    return AttackConfig(**values | numbers)
