"""Put a smoothed tower into a host model in place of its own, and take it out again."""

from . import openflamingo, zero_shot
from .components import warn_of_another_base
from .host_kinds import HOSTS, OWN_CLASS_HOSTS, REFUSED, check_not_adapted, describing_configs, find_tower
from .idefics_vision import IdeficsVisionModel
from .modeling_fs_psm import SmoothedVisionTower
from .packed import is_packed


__all__ = ["HOSTS", "OWN_CLASS_HOSTS", "REFUSED", "attach", "detach"]


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

    The host's projector and language model are untouched. Where the host builds its tower with `AutoModel`
    (`HOSTS`), its configuration describes the new tower, so the whole model saves and reloads by its own class after
    `import fs_psm_hf`. A host that constructs a class of its own (`OWN_CLASS_HOSTS`) refuses to be saved until `detach`:
    save the host, and `tower.psm` or the tower, apart. The PSM is moved to the tower's device and dtype (a purifier of
    yours to the device only) and frozen; where another tower uses it in another dtype or place, a copy is. One that
    remembers another base model than this host or its tower is taken with a warning.

    Args:
        host (`PreTrainedModel`): a vision-language model of `HOSTS` or `OWN_CLASS_HOSTS`, with its language model head or
            without; an OpenFlamingo `Flamingo`; a CLIP-like classifier ([`attach_clip`]).
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
    settings = {"sigma": sigma, "num_samples": num_samples, "image_mean": image_mean, "image_std": image_std}
    settings |= {"processor": processor, "max_batch_size": max_batch_size, "aggregation": aggregation}
    check_not_adapted(host)
    if openflamingo.is_flamingo(host):
        return openflamingo.attach_flamingo(host, psm, feature_layer=feature_layer, **settings)
    if zero_shot.is_clip_host(host):
        return zero_shot.attach_clip(host, psm, feature_layer=feature_layer, **settings)
    kind, holder, attribute, tower = find_tower(host)
    configs = describing_configs(host, holder)
    if isinstance(tower, SmoothedVisionTower):
        raise ValueError(
            "`host` must have a plain vision tower, got one that is smoothed already: `detach(host)` first"
        )
    _check_whole(kind, host, holder)
    _check_described(tower, configs)
    own_layer, first_token = kind.feature_layer(host.config), kind.first_token(host.config)
    if feature_layer is not None and _as_list(feature_layer) != _as_list(own_layer):
        own = "its last output (None)" if own_layer is None else own_layer
        raise ValueError(f"`feature_layer` must be the one the host reads, {own}, got {feature_layer}")
    if first_token and is_packed(tower.config):
        raise ValueError(
            f"`{kind.strategy}` must be 'full' for a {tower.config.model_type} tower, which has no class token, got 'default'"
        )
    training, own_name = tower.training, tower.config.name_or_path
    smoothed = SmoothedVisionTower.from_components(
        IdeficsVisionModel.around(tower) if kind.wraps_bare_module else tower,
        psm,
        feature_layer=own_layer,
        first_token=first_token,
        **settings,
    )
    if not own_name:  # it came with the host
        warn_of_another_base(psm, host.config.name_or_path)
    smoothed.psm.requires_grad_(False)
    setattr(holder, attribute, smoothed)
    smoothed._tower_training = training
    smoothed._host_conversions = None
    smoothed._attached_whole = holder is not host
    for config in configs:
        if kind.unsavable is None:
            config.vision_config = smoothed.config
        else:
            _refuse_saving(config, kind.unsavable)
    if kind.unsavable is None:
        # Renamings remembered from an older checkpoint would be applied to the new tower's keys when the host is saved.
        smoothed._host_conversions = host.__dict__.pop("_weight_conversions", None)
    return smoothed


def detach(host):
    """Put the wrapped vision tower back, bit for bit, and describe it in the host's configuration again.

    Returns:
        `torch.nn.Module`: the plain vision tower, which is also in its place in the host.

    Raises:
        ValueError: an unsupported host, or one whose tower is not smoothed; the host is unchanged.
    """
    check_not_adapted(host)
    if openflamingo.is_flamingo(host):
        return openflamingo.detach_flamingo(host)
    if zero_shot.is_clip_host(host):
        return zero_shot.detach_clip(host)
    kind, holder, attribute, smoothed = find_tower(host)
    if not isinstance(smoothed, SmoothedVisionTower):
        raise ValueError(f"`host` must have a smoothed vision tower, got a {type(smoothed).__name__}")
    conversions = getattr(smoothed, "_host_conversions", None)
    if conversions is not None and holder is host and smoothed._attached_whole:
        raise ValueError(
            f"`host` must be the whole model that `attach` was given, got the {type(host).__name__} inside it: how its "
            "checkpoint named the weights is to be put back there"
        )
    tower = smoothed.vision_tower.train(getattr(smoothed, "_tower_training", False))
    tower = tower.model if kind.wraps_bare_module else tower
    setattr(holder, attribute, tower)
    for config in describing_configs(host, holder):
        if kind.unsavable is None:
            config.vision_config = smoothed.config.vision_config
        else:
            _allow_saving(config)
    if kind.unsavable is None:
        host.__dict__.pop("_weight_conversions", None)
    if conversions is not None:
        host._weight_conversions = conversions
    return tower


def _as_list(layers):
    return list(layers) if isinstance(layers, (list, tuple)) else [layers]


def _check_whole(kind, host, holder):
    """Refuse the inner part of a loaded host: the whole remembers renamings of keys that would spoil it when it is saved."""
    loaded = host.config.name_or_path and "_weight_conversions" not in host.__dict__
    if kind.unsavable is None and holder is host and loaded:
        raise ValueError(
            f"`host` must be the whole model that was loaded, got the {type(host).__name__} inside it, without which the "
            "smoothed tower would be saved under names that cannot be loaded"
        )


def _check_described(tower, configs):
    """Refuse a tower that was exchanged for one of another shape: the host's prompts and projector are made for the first."""
    fields = ("image_size", "patch_size", "hidden_size")

    def shape(config):
        values = (getattr(config, name, None) for name in fields)
        return [list(value) if isinstance(value, tuple) else value for value in values]

    found = shape(tower.config)
    for config in configs:
        expected = shape(config.vision_config)
        if found != expected:
            raise ValueError(
                f"`host` must have the vision tower that its configuration describes, of {', '.join(fields)} {expected}, got "
                f"{found}: the number and width of its image tokens would no longer fit"
            )


# A host that constructs its own vision class would be saved in a way that its class loads as a plain one with random weights.
# The refusal stands in the configuration, the one object that `host` and `host.model` share.


def _refuse_saving(config, reason):
    def refused(self, *args, **kwargs):
        raise ValueError(
            f"`host` ({self.model_type}) cannot be saved with its tower smoothed, because {reason}: save the tower, or "
            "`tower.psm`, by itself, and the host after `detach(host)`"
        )

    plain = type(config)
    fields = {
        "save_pretrained": refused,
        "push_to_hub": refused,
        "_plain_class": plain,
        "__module__": plain.__module__,
    }
    config.__class__ = type(plain.__name__, (plain,), fields)


def _allow_saving(config):
    config.__class__ = getattr(type(config), "_plain_class", type(config))
