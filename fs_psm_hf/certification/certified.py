"""What every certificate says of its subject, how it is written down, and how a tower is held against it."""

import dataclasses
import math

import torch

from .identity import describe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Certified:
    """The subject of a certificate: a smoothed tower, a feature of it and an image.

    Args:
        model, psm (`str`): where the wrapped tower, and purifier and mapper, came from.
        model_hash (`str`): SHA-256 of all weights and of every setting that shapes the function; see `model_hash`.
        dtype, attention (`str`): precision of the weights, attention kernel.
        compiled (`str`): backend and options of `torch.compile`, under which all draws were made; `None` for eager ones.
        quantization (`str`): classes of quantised weights and where they are, `None` without.
        image_size (`tuple[int, int]`): height and width.
        image_mean, image_std (`tuple[float, ...]`): normalisation of the pixels.
        feature (`str`): `"tokens"`, `"cls"` or `"pooled"`.
        feature_layer (`int` or `tuple[int, ...]`): layer or layers of the feature; `None` for the last output.
        first_token (`int`): first token of the feature that counts.
        aggregation (`str`): how draws are averaged.
        center (`str`): SHA-256 of the fixed vector that was subtracted before normalising, `None` where none was.
        image_id (`int`): name of the image in the noise.
        seed (`int`): seed of the noise.
        seed_source (`str`): `"os"`, drawn from the operating system, so that nobody could choose the image by it; or
            `"given"`, to reproduce a result: then the confidence holds for an image that does not depend on the seed.
        num_looks (`int`): how often the draws may have been looked at before they ended; `alpha` covers all looks.
    """

    model: str | None = None
    model_hash: str | None = None
    psm: str | None = None
    dtype: str | None = None
    attention: str | None = None
    compiled: str | None = None
    quantization: str | None = None
    image_size: tuple[int, int] | None = None
    image_mean: tuple[float, ...] | None = None
    image_std: tuple[float, ...] | None = None
    feature: str | None = None
    feature_layer: int | tuple[int, ...] | None = None
    first_token: int = 0
    aggregation: str | None = None
    center: str | None = None
    image_id: int | None = None
    seed: int | None = None
    seed_source: str | None = None
    num_looks: int = 1

    # Class of the `deployed` part.
    deployed_class = None

    @property
    def is_certificate(self) -> bool:
        """Whether the numbers carry a confidence; `False` for `"plugin"`."""
        return self.method != "plugin"

    @property
    def confidence(self) -> str:
        """The confidence in words, never rounded up."""
        return "not a certificate (no confidence)" if self.alpha is None else f"confidence {confidence(self.alpha)}"

    def verify(self, tower, pixel_values=None) -> None:
        """Refuse a tower that is not the one that was certified, setting for setting and weight for weight.

        The served number of draws is compared where the certificate speaks of it (`deployed`). A tower that is to be compiled
        counts as compiled until a pass of it has failed to. What neither weights nor configuration show, such as a hook on
        a module, is not seen.

        Args:
            tower ([`SmoothedVisionTower`]): the tower that is served.
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`, *optional*): what it is served, to
                compare the size of the image as well.

        Raises:
            ValueError: something differs; names the first such thing, what was certified and what the tower has. Also
                where the certificate does not say what it is about.
        """
        if any(module.training for module in tower.modules()):
            raise ValueError("`tower` must be in evaluation mode, as it was certified: call `tower.eval()`")
        if self.model_hash is None:
            raise ValueError("`certificate` does not record the model it is about: it was made from scores alone")
        found = describe(tower)
        expected = {name: getattr(self, name) for name in found}
        if pixel_values is not None:
            if pixel_values.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"`pixel_values` must be float32, as they were certified, got {pixel_values.dtype}")
            found["image_size"], expected["image_size"] = tuple(pixel_values.shape[-2:]), self.image_size
        deployed = getattr(self, "deployed", None)
        if deployed is not None:
            found["num_samples"], expected["num_samples"] = tower.config.num_samples, deployed.num_samples
        found["sigma"], expected["sigma"] = float(tower.config.sigma), self.sigma
        # The hash differs with almost everything else: it is named last.
        for name in sorted(found, key=lambda name: name == "model_hash"):
            if found[name] != expected[name]:
                raise ValueError(
                    f"`tower` is not the certified one: `{name}` was {expected[name]!r}, this tower has {found[name]!r}"
                )

    def to_dict(self) -> dict:
        """Plain values for JSON, with `is_certificate` beside them. An infinite radius is the string `"inf"`."""

        def plain(value):
            if isinstance(value, dict):
                return {name: plain(inner) for name, inner in value.items()}
            if isinstance(value, (tuple, list)):
                return [plain(inner) for inner in value]
            return "inf" if isinstance(value, float) and math.isinf(value) else value

        return plain(dataclasses.asdict(self)) | {"is_certificate": self.is_certificate}

    @classmethod
    def from_dict(cls, values: dict):
        """Rebuild what `to_dict` wrote.

        Raises:
            ValueError: a field is missing or unknown, or `is_certificate` contradicts `method`.
        """
        values = dict(values)
        marked = values.pop("is_certificate", None)
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in values]
        if unknown or missing:
            raise ValueError(
                f"a `{cls.__name__}` needs exactly its own fields, got unknown {unknown}, missing {missing}"
            )
        values = {name: _unplain(value) for name, value in values.items()}
        if isinstance(values.get("deployed"), dict):
            try:
                values["deployed"] = cls.deployed_class(**{k: _unplain(v) for k, v in values["deployed"].items()})
            except TypeError as error:
                raise ValueError(
                    f"`deployed` must have the fields of {cls.deployed_class.__name__}: {error}"
                ) from error
        certificate = cls(**values)
        if marked not in (None, certificate.is_certificate):
            raise ValueError(f"`is_certificate` is {marked}, which contradicts `method` {certificate.method!r}")
        return certificate


def confidence(alpha) -> str:
    """`1 - alpha` in words, never rounded up to a certainty."""
    return f"1 - {alpha:.2g}" if alpha < 1e-5 else f"{1.0 - alpha:.6g}"


def round_down(value, digits) -> float:
    """A bound as it may be printed: never more than it is."""
    return value if math.isinf(value) else math.floor(value * 10**digits) / 10**digits


def _unplain(value):
    """Undo `to_dict` for one value: tuples and infinities are themselves again."""
    if isinstance(value, list):
        return tuple(_unplain(inner) for inner in value)
    return math.inf if value == "inf" else value
