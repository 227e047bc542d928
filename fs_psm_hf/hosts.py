"""Put a smoothed tower into a host model in place of its own, and take it out again."""

from dataclasses import dataclass

from .components import warn_of_another_base
from .modeling_fs_psm import SmoothedVisionTower


@dataclass(frozen=True)
class HostKind:
    """Where a family of hosts keeps its tower and says which feature it reads.

    Args:
        holder (`str`): attribute that leads from the host to the module with `vision_tower`; empty where it is the host.
        layer_field (`str`): configuration field with the feature layer or layers.
        strategy_field (`str`): configuration field that is `"default"` where the class token is dropped.
    """

    holder: str
    layer_field: str
    strategy_field: str


HOSTS = {"llava": HostKind("model", "vision_feature_layer", "vision_feature_select_strategy")}


def _locate(host):
    """The kind of host, the module that holds the tower, and every configuration that describes the tower."""
    model_type = getattr(getattr(host, "config", None), "model_type", None)
    kind = HOSTS.get(model_type)
    if kind is None:
        given = type(host).__name__ if model_type is None else f"{type(host).__name__} (model_type {model_type!r})"
        raise ValueError(f"`host` must be a model of type {', '.join(sorted(HOSTS))}, got {given}")
    holder = host if hasattr(host, "vision_tower") else getattr(host, kind.holder, None)
    if not hasattr(holder, "vision_tower"):
        raise ValueError(f"`host` must have a vision tower, got {type(host).__name__} without one")
    configs = [host.config] if holder.config is host.config else [host.config, holder.config]
    return kind, holder, configs


def attach(
    host,
    psm=None,
    *,
    sigma=0.25,
    num_samples=4,
    feature_layer=None,
    image_mean=None,
    image_std=None,
    processor=None,
    max_batch_size=None,
    aggregation="unit",
):
    """Replace the vision tower of `host`, in place, by its smoothed version.

    The host's projector and language model are untouched; its configuration describes the new tower, so the whole
    model saves and reloads by its own class after `import fs_psm_hf`. The PSM is moved to the tower's device and
    dtype (a purifier of yours to the device only) and frozen. One that remembers another base model than this host or its
    tower is taken with a warning.

    Args:
        host (`PreTrainedModel`): a `LlavaForConditionalGeneration` or `LlavaModel`.
        psm ([`PSMModel`], `torch.nn.Module` or `None`): as in [`SmoothedVisionTower.from_components`].
        feature_layer (`int` or `list[int]`, *optional*): the layer or layers the host reads; its own configuration says
            which, so there is no need to give them.
        processor (*optional*): the host's processor, to take `image_mean` and `image_std` from.

    The other arguments are those of [`SmoothedVisionTowerConfig`].

    Returns:
        [`SmoothedVisionTower`]: the new tower, which is also in its place in the host.

    Raises:
        ValueError: an unsupported or already smoothed host, or a setting that does not fit; the host is unchanged.
    """
    kind, holder, configs = _locate(host)
    tower = holder.vision_tower
    if isinstance(tower, SmoothedVisionTower):
        raise ValueError(
            "`host` must have a plain vision tower, got one that is smoothed already: `detach(host)` first"
        )
    own_layer = getattr(host.config, kind.layer_field)
    if feature_layer is not None and feature_layer != own_layer:
        raise ValueError(f"`feature_layer` must be the one the host reads, {own_layer}, got {feature_layer}")
    training, own_name = tower.training, tower.config.name_or_path
    smoothed = SmoothedVisionTower.from_components(
        tower,
        psm,
        sigma=sigma,
        num_samples=num_samples,
        feature_layer=own_layer,
        first_token=int(getattr(host.config, kind.strategy_field) == "default"),
        image_mean=image_mean,
        image_std=image_std,
        processor=processor,
        max_batch_size=max_batch_size,
        aggregation=aggregation,
    )
    if not own_name:  # it came with the host
        warn_of_another_base(psm, host.config.name_or_path)
    smoothed.psm.requires_grad_(False)
    holder.vision_tower = smoothed
    for config in configs:
        config.vision_config = smoothed.config
    smoothed._tower_training = training
    # Renamings remembered from an older checkpoint would be applied to the new tower's keys when the host is saved.
    smoothed._host_conversions = host.__dict__.pop("_weight_conversions", None)
    return smoothed


def detach(host):
    """Put the wrapped vision tower back, bit for bit, and describe it in the host's configuration again.

    Returns:
        `PreTrainedModel`: the plain vision tower, which is also in its place in the host.

    Raises:
        ValueError: an unsupported host, or one whose tower is not smoothed.
    """
    _, holder, configs = _locate(host)
    smoothed = holder.vision_tower
    if not isinstance(smoothed, SmoothedVisionTower):
        raise ValueError(f"`host` must have a smoothed vision tower, got a {type(smoothed).__name__}")
    holder.vision_tower = smoothed.vision_tower.train(getattr(smoothed, "_tower_training", False))
    for config in configs:
        config.vision_config = smoothed.config.vision_config
    host.__dict__.pop("_weight_conversions", None)
    if getattr(smoothed, "_host_conversions", None) is not None:
        host._weight_conversions = smoothed._host_conversions
    return holder.vision_tower
