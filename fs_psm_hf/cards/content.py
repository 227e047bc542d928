"""What a card says of a model folder: read from its config, its weights' header and its results."""

import json
import math
import re
import struct
from collections import defaultdict
from pathlib import Path

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .records import Record, read_record, read_results_lines


FACTS = "results/card.json"
KINDS = {"fs_psm": "psm", "smoothed_vision_tower": "tower"}
FEATURES = {
    "tokens": "the patch tokens that the host reads, as one vector",
    "cls": "the class token",
    "pooled": "the pooled output",
}
# What `certify_scores` keeps where nothing else is said; tables made before they said it have no key of this name.
LEVEL = 0.5


class Card:
    """What template and metadata ask for; see [`render_card`] for the files and errors."""

    def __init__(self, folder):
        self.folder, self.name, self.facts_file = folder, folder.resolve().name, FACTS
        self.facts = read_record(folder, FACTS) if (folder / FACTS).exists() else Record({}, FACTS)
        names = sorted(path.name for path in (folder / "results").glob("*")) if (folder / "results").is_dir() else []
        self.config = read_record(folder, "config.json") if (folder / "config.json").exists() else None
        self.certified = self._certified([f"results/{n}" for n in names if n.endswith(".jsonl")])
        if self.config is None and not self.certified:
            raise ValueError(
                f"`folder` must hold config.json or results/*.jsonl of `fs-psm certify`, {self.name} has neither"
            )
        self.kind = "results" if self.config is None else KINDS.get(self.config["model_type"])
        if self.kind is None:
            raise ValueError(
                f"`model_type` in `config.json` must be one of {', '.join(KINDS)}, got {self.config['model_type']!r}"
            )
        self.psm = self._psm()
        self.table = self._read("table5.json")
        self.utilities = self._read_all("clean_utility", names)
        self.cost = self._read("cost.json")
        self.attacks = [found for _, found in self._read_all("attacks", names)]
        self.scores = sorted(path.name for path in (folder / "scores").glob("*/"))
        self.has_curve = (folder / "curve.png").exists()
        self.level = LEVEL if self.table is None else self.table.get("level", LEVEL)
        if self.table is not None and not any(self.table["rows"].values()):
            raise ValueError(f"`{self.table._file}` must have rows, it has none")

    def _read(self, name):
        return read_record(self.folder, f"results/{name}") if (self.folder / "results" / name).exists() else None

    def _read_all(self, kind, names):
        """`[(name without its ending, file)]` of one kind."""
        found = [n for n in names if n.startswith(kind) and n.endswith(".json")]
        return [(n.removesuffix(".json"), self._read(n)) for n in found]

    def show(self, form, record, *more):
        """A table of a results file; one of another form is named."""
        try:
            return form(record, *more)
        except (TypeError, AttributeError, LookupError) as error:
            raise ValueError(f"`{record._file}` has another form than a card reads: {error}") from error

    def _certified(self, names):
        """`[(header, summary)]` of the results of `fs-psm certify`, most draws first at each σ."""
        files = [read_results_lines(self.folder, name) for name in names]
        draws = [end["rows"][0]["mean_num_samples"] if end["rows"] else 0 for _, end in files]
        order = sorted(range(len(files)), key=lambda i: (files[i][0]["sigma"], -draws[i], names[i]))
        return [files[i] for i in order if files[i][1]["rows"]]

    def _psm(self):
        if self.kind == "results":
            return Record({}, "config.json")
        return self.config if self.kind == "psm" else self.config.get("psm_config") or Record({}, "config.json")

    @property
    def parts(self):
        """The letters of the purifier and the mapper that are there."""
        purifier = self.psm.get("purifier") not in (None, "none")
        return [letter for letter, there in (("P", purifier), ("M", bool(self.psm.get("mapper_config")))) if there]

    @property
    def row(self):
        """This model's row of a table."""
        return "+".join(["FS", *self.parts])

    @property
    def what(self):
        """Purifier, mapper or both, in words."""
        return {"P": "Purifier", "M": "Smoothness mapper", "": "Plain smoothing"}.get(
            "".join(self.parts), "Purifier and smoothness mapper"
        )

    @property
    def base_model(self):
        """Id of the tower on the Hub, or `None`. What config.json names may be a folder, and is then no such id."""
        if "base_model" in self.facts:
            return checked_id(self.facts["base_model"], "base_model")
        given = self.psm.get("base_model_name_or_path") or ""
        local = any((root / given).exists() for root in (Path(), self.folder.resolve().parent.parent))
        return given if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", given) and not local else None

    @property
    def tower_name(self):
        """What loads the tower: its id, or the last name of its folder."""
        named = self.facts["tower"]["name"] if "tower" in self.facts else None
        return self.base_model or named or Path(self.psm.get("base_model_name_or_path") or "TOWER").name

    @property
    def tower_text(self):
        """The tower in words."""
        if "tower" in self.facts:
            return self.facts["tower"]["text"]
        return f"a `{self.config['vision_config']['model_type']}`" if self.kind == "tower" else f"`{self.tower_name}`"

    @property
    def tower_class(self):
        """transformers class of the host or the tower."""
        return self.facts["tower"]["class"] if "tower" in self.facts else "AutoModel"

    @property
    def feature(self):
        """`tokens`, `cls` or `pooled`."""
        if "tower" not in self.facts:
            return self.psm.get("mapper_feature") or (self.certified[0][0]["feature"] if self.certified else "tokens")
        given = self.facts["tower"]["feature"]
        if given not in FEATURES:
            raise ValueError(f"`tower.feature` in `{FACTS}` must be one of {', '.join(FEATURES)}, got {given!r}")
        return given

    @property
    def feature_text(self):
        """The feature in words."""
        return FEATURES[self.feature]

    @property
    def output(self):
        """Where the feature is in the output of a tower."""
        pooled = ".image_embeds" if "Projection" in self.tower_class else ".pooler_output"
        return {"tokens": ".last_hidden_state", "cls": ".last_hidden_state[:, 0]", "pooled": pooled}[self.feature]

    @property
    def example(self):
        """Settings of the example; those of `attach` where none are given."""
        return self.facts.get("example") or {"sigma": 0.25, "num_samples": 4}

    @property
    def passes(self):
        """What one draw runs."""
        before, after = ("the purifier",) * ("P" in self.parts), ("the mapper",) * ("M" in self.parts)
        *first, last = (*before, "the tower", *after)
        return " and ".join([", ".join(first), last] if first else [last])

    @property
    def legend(self):
        """What the letters in the names of the rows of Table 5 are."""
        words = {
            "FS": "the tower smoothed as it is",
            "P": "the purifier of this model",
            "M": "its mapper",
            "FFDNet": "FFDNet",
        }
        words |= self.facts.get("rows") or {}
        rows = dict.fromkeys(row for rows in self.table["rows"].values() for row in rows)
        names = dict.fromkeys([*(part for row in rows for part in row.split("+")), *rows])
        return "; ".join(f"{name}: {text}" for name, text in words.items() if name in names) + "."

    @property
    def levels(self):
        """The cosines that the radii of `fs-psm certify` keep."""
        return " or ".join(dict.fromkeys(f"{header['level']:g}" for header, _ in self.certified))

    def data(self, file):
        """The images of a results file in words, in brackets; nothing where they have none."""
        text = (self.evaluation(file) or {}).get("text")
        return f" ({text})" if text else ""

    def evaluation(self, file):
        """The data set of a results file, or `None` where `results/card.json` names none."""
        return (self.facts.get("evaluation") or {}).get(file)

    @property
    def first(self):
        """One row of Table 5, for what is the same in all."""
        return next(row for rows in self.table["rows"].values() for row in rows.values())

    @property
    def certified_draws(self):
        """Draws behind the certificates of Table 5, or `None` where it has none."""
        found = [
            row["cdf"]["num_samples"] for rows in self.table["rows"].values() for row in rows.values() if "cdf" in row
        ]
        return found[0] if found else None

    @property
    def weights(self):
        """Bytes and values of each part: `{"bytes": …, "parts": {name: …}}`, or `None` where there are no weights."""
        files = sorted(self.folder.glob("*.safetensors"))
        parts = defaultdict(int)
        for path in files:
            for name, tensor in _header(path).items():
                part = next((part for part in ("purifier", "mapper") if part in name.split(".")[:2]), "tower")
                parts[part] += math.prod(tensor["shape"])
        return {"bytes": sum(path.stat().st_size for path in files), "parts": dict(parts)} if files else None


def checked_id(name, key):
    """A name that the Hub would take as an id; `None` stays."""
    try:
        if name is not None:
            validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"`{key}` in `{FACTS}` must be an id of the Hub, got {name!r}") from error
    return name


def _header(path):
    """The tensors of a safetensors file, without its metadata."""
    try:
        with open(path, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            found = json.loads(stream.read(length))
        found.pop("__metadata__", None)
    except (struct.error, ValueError, AttributeError, OverflowError, MemoryError) as error:
        raise ValueError(f"`{path.name}` must be a safetensors file, got one with a damaged header") from error
    return found
