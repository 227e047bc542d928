"""The arguments of a training run: diffusers' names, the paper's values, checked before anything is loaded."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from transformers import HfArgumentParser

from ..configuration_fs_psm import PURIFIERS
from ..features import FEATURES
from .presets import PRESETS, STAGE_DEFAULTS


STAGES = ("purifier", "mapper", "both")
PRECISIONS = ("no", "fp16", "bf16")
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
# Those of transformers that need the number of steps and of warm-up steps only.
SCHEDULERS = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
)  # fmt: skip


def _option(default, text):
    return field(default=default, metadata={"help": text})


def _several(text):
    return field(default=None, metadata={"help": text, "nargs": "+"})


@dataclass
class PSMTrainingArguments:
    """Arguments of one stage. What is `None` here has a value of its own for each stage or preset; see `presets`."""

    stage: str = _option("both", "purifier, mapper, or both one after the other")
    output_dir: str | None = _option(None, "folder for the trained PSM, checkpoints, log and sample pictures")
    # The tower
    preset: str | None = _option(None, f"a tower of the paper: {', '.join(PRESETS)}")
    pretrained_model_name_or_path: str | None = _option(None, "the tower: CLIP, LLaVA or another vision model")
    revision: str | None = _option(None, "revision of the tower on the Hub")
    processor_name_or_path: str | None = _option(None, "image processor, if it is not beside the tower")
    feature: str | None = _option(None, "feature whose cosine is trained: tokens (default), cls or pooled")
    feature_layer: int | None = _option(None, "hidden state the host reads (default: the last output, or the LLaVA's)")
    first_token: int | None = _option(None, "first token the host reads (default: 0, or the LLaVA's)")
    post_layernorm: bool | None = _option(
        None, "the host reads patch tokens after the tower's last LayerNorm, as OpenFlamingo does (default: no)"
    )
    # The PSM
    pretrained_psm_name_or_path: str | None = _option(None, "PSM to start from; stage mapper: its purifier")
    purifier: str | None = _option(None, "kind of a new purifier: unet (default), diffusion, or none (stage mapper)")
    purifier_config: str | None = _option(None, "JSON, or file of it: arguments of the purifier's UNet2DModel")
    mapper_config: str | None = _option(None, "JSON, or file of it: arguments of the SmoothnessMapper")
    num_blocks: int | None = _option(None, "blocks of a new mapper, k (default: 3)")
    # The data
    train_data_dir: list[str] | None = _several("folders of images, searched in depth")
    dataset_name: str | None = _option(None, "data set for datasets.load_dataset, in place of folders")
    dataset_config_name: str | None = _option(None, "its configuration")
    dataset_split: str = _option("train", "its split")
    image_column: str = _option("image", "its column of images")
    train_data_weights: list[float] | None = _several("probability of each folder (default: every image is equal)")
    validation_data_dir: str | None = _option(None, "folder of images to validate on (default: some are held out)")
    num_validation_images: int = _option(16, "images to validate on")
    max_train_samples: int | None = _option(None, "use only so many images of each set")
    resolution: int | None = _option(None, "height and width in pixels (default: the tower's)")
    center_crop: bool = _option(False, "crop the middle, not a random square")
    random_flip: bool = _option(False, "flip half of the images")
    random_resize: bool = _option(False, "crop from images of any size between the resolution and their own")
    feature_cache_dir: str | None = _option(None, "keep clean features on disk; needs --center_crop")
    cache_dir: str | None = _option(None, "where datasets keeps downloads")
    dataloader_num_workers: int = _option(0, "processes that read images")
    # The losses
    sigma: float = _option(0.25, "noise in [0, 1] pixels")
    sigma_min: float | None = _option(None, "with --sigma_max: a noise level is drawn for each image")
    sigma_max: float | None = _option(None, "see --sigma_min")
    num_samples: int = _option(8, "noisy draws of each image in a step, n0")
    lambda_diff: float = _option(1.0, "weight of the diffusion loss (purifier)")
    lambda_rb: float | None = _option(None, "weight of 1 - cosine (purifier: 0.25, mapper: 1)")
    lambda_mse: float = _option(0.25, "weight of the reconstruction (purifier)")
    lambda_stats: float = _option(100.0, "weight of the statistics (mapper)")
    lambda_id: float = _option(0.25, "weight of the identity loss (mapper)")
    # The optimiser
    seed: int = _option(0, "of order, crops, noise and weights")
    train_batch_size: int = _option(16, "images per process and micro-batch")
    num_train_epochs: int | None = _option(None, "epochs (mapper: 8)")
    max_train_steps: int | None = _option(None, "steps, in place of epochs (purifier: 12000)")
    gradient_accumulation_steps: int = _option(1, "micro-batches per step")
    gradient_checkpointing: bool = _option(False, "recompute activations: less memory, more time (purifier)")
    learning_rate: float | None = _option(None, "purifier: 5e-5, mapper: 2e-4")
    lr_scheduler: str | None = _option(None, "schedule of transformers (purifier: constant, mapper: cosine)")
    lr_warmup_steps: int = _option(0, "steps until the learning rate is reached")
    adam_beta1: float = _option(0.9, "AdamW")
    adam_beta2: float = _option(0.999, "AdamW")
    adam_weight_decay: float = _option(1e-2, "AdamW, on matrices and kernels only")
    adam_epsilon: float = _option(1e-8, "AdamW")
    max_grad_norm: float = _option(1.0, "clip the gradient to this length; 0: do not")
    use_ema: bool | None = _option(None, "average the weights (purifier: yes, mapper: no)")
    ema_max_decay: float = _option(0.99, "decay of that average")
    mixed_precision: str | None = _option(None, "no, fp16 or bf16 (default: accelerate's configuration)")
    torch_compile: bool = _option(False, "compile what is trained, and the tower")
    # What is written
    checkpointing_steps: int = _option(500, "steps between checkpoints")
    checkpoints_total_limit: int | None = _option(None, "checkpoints to keep")
    resume_from_checkpoint: str | None = _option(None, "latest, or the name of a checkpoint")
    validation_steps: int = _option(500, "steps between validations; also at the end")
    validation_sigmas: list[float] | None = _several("noise levels to validate at (default: those of training)")
    validation_samples: int = _option(8, "noisy draws of each image in a validation")
    weights_dtype: str = _option("float32", "of the saved PSM: float32, bfloat16 or float16")
    report_to: str | None = _option(None, "tensorboard, wandb or all, beside log.jsonl")
    logging_dir: str = _option("logs", "folder of those, in the output folder")
    tracker_project_name: str = _option("fs-psm", "project name for those")
    push_to_hub: bool = _option(False, "upload the trained PSM")
    hub_model_id: str | None = _option(None, "repository for that (default: the output folder's name)")
    hub_token: str | None = _option(None, "token for that")
    hub_private_repo: bool = _option(False, "make it private")

    def __post_init__(self):
        for name, allowed in (
            ("stage", STAGES),
            ("preset", (None, *PRESETS)),
            ("feature", (None, *FEATURES)),
            ("purifier", (None, *PURIFIERS)),
            ("lr_scheduler", (None, *SCHEDULERS)),
            ("mixed_precision", (None, *PRECISIONS)),
            ("weights_dtype", WEIGHT_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                names = ", ".join(value for value in allowed if value is not None)
                raise ValueError(f"`--{name}` must be one of {names}, got {getattr(self, name)}")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (least <= value < math.inf):
                raise ValueError(f"`--{name}` must be >= {least}, got {value}")
        for name in ("adam_beta1", "adam_beta2"):
            if not getattr(self, name) < 1:
                raise ValueError(f"`--{name}` must be < 1, got {getattr(self, name)}")
        if self.ema_max_decay > 1:
            raise ValueError(f"`--ema_max_decay` must be <= 1, got {self.ema_max_decay}")
        for name in ("sigma", "sigma_min", "sigma_max"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`--{name}` must be > 0 in [0, 1] pixel units, got {value}")
        for value in self.validation_sigmas or ():
            if not 0 < value < math.inf:
                raise ValueError(f"`--validation_sigmas` must be > 0 in [0, 1] pixel units, got {value}")
        if (self.sigma_min is None) != (self.sigma_max is None) or (self.sigma_min or 0) > (self.sigma_max or 0):
            raise ValueError(
                "`--sigma_min` and `--sigma_max` must be given together, the smaller first, "
                f"got {self.sigma_min} and {self.sigma_max}"
            )
        if self.output_dir is None:
            raise ValueError("`--output_dir` must be given: the folder for the trained PSM")
        if (self.train_data_dir is None) == (self.dataset_name is None):
            raise ValueError("one of `--train_data_dir` and `--dataset_name` must be given")
        self.purifier_config = _read_json("purifier_config", self.purifier_config)
        self.mapper_config = _read_json("mapper_config", self.mapper_config)
        if self.feature_cache_dir is not None and (not self.center_crop or self.random_flip):
            raise ValueError(
                "`--feature_cache_dir` needs `--center_crop` and no `--random_flip`: random crops never repeat"
            )
        if self.random_resize and self.center_crop:
            raise ValueError("`--random_resize` must not be given with `--center_crop`, which crops the whole image")
        self._fill(PRESETS[self.preset] if self.preset else {})
        self._fill({"feature": "tokens", "post_layernorm": False})
        if self.post_layernorm and (self.feature, self.feature_layer, self.first_token) != ("tokens", None, None):
            raise ValueError(
                "`--post_layernorm` must be given with `--feature` tokens and no `--feature_layer` or `--first_token`: it "
                "is about the patch tokens of the last layer"
            )
        if self.pretrained_model_name_or_path is None:
            raise ValueError("`--pretrained_model_name_or_path` or `--preset` must be given: the tower")
        if self.stage != "both":
            self._finish()

    def _finish(self):
        defaults = dict(STAGE_DEFAULTS[self.stage])
        if self.max_train_steps is not None or self.num_train_epochs is not None:
            for length in ("max_train_steps", "num_train_epochs"):
                defaults.pop(length, None)
        if self.pretrained_psm_name_or_path is not None:
            defaults.pop("purifier", None)  # its own kind
        self._fill(defaults)
        if self.stage == "purifier":
            if self.pretrained_psm_name_or_path is not None and self.purifier_config is not None:
                raise ValueError(
                    "`--purifier_config` must not be given with `--pretrained_psm_name_or_path`, which has one"
                )
            if self.purifier == "none" or not (self.lambda_diff > 0 or self.lambda_rb > 0 or self.lambda_mse > 0):
                raise ValueError("stage purifier must have a `--purifier` and a loss with a weight > 0")
            if self.purifier == "diffusion" and self.pretrained_psm_name_or_path is None:
                raise ValueError(
                    "`--purifier` diffusion must start from a trained network: make one with `fs-psm convert "
                    "guided-diffusion` and give it as `--pretrained_psm_name_or_path`"
                )
        elif self.purifier != "none" and self.pretrained_psm_name_or_path is None:
            raise ValueError(
                "stage mapper must have the trained purifier as `--pretrained_psm_name_or_path`, or `--purifier` none"
            )
        elif not (self.lambda_rb > 0 or self.lambda_stats > 0):  # the identity loss is zero by construction
            raise ValueError("stage mapper must have a loss with a weight > 0: `--lambda_rb` or `--lambda_stats`")

    def _fill(self, values):
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    @property
    def sigma_range(self):
        """Smallest and largest noise level trained for, in [0, 1] pixels."""
        return (self.sigma, self.sigma) if self.sigma_min is None else (self.sigma_min, self.sigma_max)

    def to_dict(self):
        """All arguments but the token."""
        return asdict(self) | {"hub_token": None}


_LEAST = dict.fromkeys(
    (
        "num_blocks", "num_samples", "train_batch_size", "num_train_epochs", "max_train_steps", "max_train_samples",
        "gradient_accumulation_steps", "checkpointing_steps", "checkpoints_total_limit", "validation_steps",
        "validation_samples", "num_validation_images", "resolution",
    ),
    1,
) | dict.fromkeys(
    (
        "lambda_diff", "lambda_rb", "lambda_mse", "lambda_stats", "lambda_id", "learning_rate", "lr_warmup_steps",
        "seed", "first_token", "max_grad_norm", "adam_weight_decay", "adam_epsilon", "dataloader_num_workers",
        "adam_beta1", "adam_beta2", "ema_max_decay",
    ),
    0,
)  # fmt: skip


class _Parser(HfArgumentParser):
    def error(self, message):
        raise ValueError(f"{message}; see --help")


def make_parser():
    """The parser of the command line."""
    parser = _Parser(PSMTrainingArguments, prog="fs-psm train", allow_abbrev=False)
    parser.add_argument(
        "--config",
        help="YAML or JSON file with these arguments; `purifier:` and `mapper:` may hold arguments of one stage. "
        "What is typed counts more.",
    )
    return parser


def parse_arguments(argv):
    """Arguments of each stage to run, in order.

    Args:
        argv (`list[str]`): the command line, without the program.

    Returns:
        `list[PSMTrainingArguments]`: one, or two where the stage is both.

    Raises:
        ValueError: an unknown argument, or a value that is not allowed.
    """
    parser = make_parser()
    path, typed = _take_config(list(argv))
    common, sections = _read_config(path)
    whole = _parse(parser, common + typed)
    if whole.stage != "both":
        return [_parse(parser, common + sections[whole.stage] + typed)]
    stages = []
    for stage in STAGES[:2]:
        where = Path(whole.output_dir) / stage
        tail = ["--stage", stage, "--output_dir", str(where)]
        if stage == "mapper":
            tail += ["--pretrained_psm_name_or_path", str(Path(whole.output_dir) / "purifier")]
        stages.append(_parse(parser, common + sections[stage] + typed + tail))
    purifier, mapper = stages
    if purifier.mixed_precision != mapper.mixed_precision:
        raise ValueError(
            "`--mixed_precision` must be the same for both stages of one run, "
            f"got {purifier.mixed_precision} and {mapper.mixed_precision}"
        )
    # What is published is the result of both.
    purifier.push_to_hub = False
    if mapper.hub_model_id is None:
        mapper.hub_model_id = Path(whole.output_dir).resolve().name
    return stages


def _parse(parser, argv):
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        raise ValueError(f"`{unknown[0]}` is no argument of the training; see --help")
    values = vars(known)
    values.pop("config")
    return PSMTrainingArguments(**values)


def _take_config(argv):
    """The file of `--config`, and the rest of the command line."""
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise ValueError("`--config` must be followed by a file")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if word.startswith("--config="):
            return word.partition("=")[2], argv[:i] + argv[i + 1 :]
    return None, argv


def _read_config(path):
    """The arguments of a file as words of a command line: those of every stage, and those of each."""
    if path is None:
        return [], {stage: [] for stage in STAGES[:2]}
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text())  # JSON is YAML
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"`--config` must be a YAML or JSON file, got {path}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"`--config` {path} must hold names and values, got {type(values).__name__}")
    # `purifier:` is a section where it holds names, and the kind of the purifier where it holds one word.
    sections = {stage: values.pop(stage) for stage in STAGES[:2] if isinstance(values.get(stage), dict)}
    words = {stage: _words(path, sections.get(stage, {})) for stage in STAGES[:2]}
    return _words(path, values), words


def _words(path, values):
    known = {f.name: f for f in fields(PSMTrainingArguments)}
    words = []
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"`--config` {path} has an unknown argument {name!r}")
        if value is None:
            continue
        if isinstance(value, list) and "nargs" not in known[name].metadata:
            raise ValueError(f"`--config` {path} must have one value for {name}, got {value}")
        words.append(f"--{name}")
        if isinstance(value, dict):
            words.append(json.dumps(value))
        else:
            # YAML reads `no` as false.
            value = "no" if name == "mixed_precision" and value is False else value
            words += [str(part) for part in (value if isinstance(value, list) else [value])]
    return words


def _read_json(name, value):
    if value is None or isinstance(value, dict):
        return value
    text, path = value, Path(value)
    try:
        if not value.lstrip().startswith("{"):
            text = path.read_text()
        found = json.loads(text)
    except (OSError, ValueError) as error:
        raise ValueError(f"`--{name}` must be JSON or a file of it, got {value}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"`--{name}` must hold names and values, got {value}")
    return found
