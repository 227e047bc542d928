"""The PSM that a stage trains, and which of its weights decay."""

import hashlib

import torch

from ..configuration_fs_psm import PSMConfig
from ..modeling_psm import PSMModel
from ..purifier import DiffusionPurifier


def build_psm(args, tower):
    """The PSM of a stage, float32, its trained part ready and the rest frozen.

    Args:
        args ([`PSMTrainingArguments`]): of one stage.
        tower ([`FrozenTower`]): what the mapper is made for.

    Raises:
        ValueError: the PSM to start from lacks the part that is needed, or is of another width.
    """
    start = None
    if args.pretrained_psm_name_or_path is not None:
        start = PSMModel.from_pretrained(args.pretrained_psm_name_or_path, dtype=torch.float32)
    given = f"`--pretrained_psm_name_or_path` {args.pretrained_psm_name_or_path}"
    if start is not None and args.purifier not in (None, start.config.purifier):
        raise ValueError(f"`--purifier` must be {start.config.purifier}, the kind of {given}, got {args.purifier}")
    base = {
        "base_model_name_or_path": args.pretrained_model_name_or_path,
        "base_model_revision": args.revision,
    }
    if args.stage == "purifier":
        if start is not None and start.purifier is None:
            raise ValueError(f"{given} has no purifier to train")
        if start is None:
            config = PSMConfig(purifier=args.purifier, purifier_config=args.purifier_config, **base)
            psm = PSMModel(config)
        else:
            # A mapper would not fit the purifier that comes out.
            config = PSMConfig(purifier=start.config.purifier, purifier_config=start.config.purifier_config, **base)
            with torch.device("meta"):
                psm = PSMModel(config)
            psm.purifier = start.purifier
        psm.requires_grad_(True)
        if args.gradient_checkpointing:
            psm.purifier.unet.enable_gradient_checkpointing()
        return psm
    pooled = args.feature == "pooled"
    mapper_feature = "pooled" if pooled else "tokens"
    if start is not None and start.mapper is not None:
        config = start.config
        if config.mapper_feature != mapper_feature or start.mapper.hidden_size != tower.width:
            raise ValueError(
                f"{given} has a mapper of {config.mapper_feature} of width {start.mapper.hidden_size}, the tower's are "
                f"{mapper_feature} of width {tower.width}"
            )
        for name in ("num_blocks", "mapper_config"):
            if getattr(args, name) is not None:
                raise ValueError(f"`--{name}` must not be given with {given}, which has a mapper")
        psm = start
        for name, value in base.items():
            setattr(psm.config, name, value)
    else:
        mapper_config = {"hidden_size": tower.width, "num_blocks": args.num_blocks or 3}
        # Pooled features have no neighbours; without a class token every token has.
        mapper_config |= {"kernel_size": 0} if pooled else {"num_prefix_tokens": tower.num_prefix_tokens}
        mapper_config |= args.mapper_config or {}
        if mapper_config["hidden_size"] != tower.width:
            raise ValueError(
                f"`--mapper_config` must have hidden_size {tower.width}, the tower's, got {mapper_config['hidden_size']}"
            )
        kind = "none" if start is None else start.config.purifier
        unet = None if start is None else start.config.purifier_config
        config = PSMConfig(
            purifier=kind, purifier_config=unet, mapper_config=mapper_config, mapper_feature=mapper_feature, **base
        )
        psm = PSMModel(config)
        if start is not None:
            psm.purifier = start.purifier
    psm.requires_grad_(False)
    psm.mapper.requires_grad_(True)
    return psm


def decay_groups(part, weight_decay):
    """Parameter groups of AdamW: matrices and kernels decay, biases and norms do not.

    The last convolution of a diffusion purifier does not decay either: it holds the channels of the learned variance,
    which no loss reaches and which stay as they are.
    """
    kept = set()
    if isinstance(part, DiffusionPurifier):
        kept = {id(p) for p in part.unet.conv_out.parameters()}
    groups = {True: [], False: []}
    for parameter in part.parameters():
        groups[parameter.ndim > 1 and id(parameter) not in kept].append(parameter)
    return [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}]


def weights_hash(part):
    """SHA-256 over all weights of a part, or of nothing."""
    digest = hashlib.sha256()
    for name, tensor in sorted([] if part is None else part.state_dict().items()):
        values = tensor.detach().contiguous().cpu().flatten().view(torch.uint8)
        digest.update(name.encode())
        digest.update(memoryview(values.numpy()))
    return digest.hexdigest()


class Averaged:
    """The averaged weights of `EMAModel` in a module, for a while."""

    def __init__(self, ema, module):
        self.ema, self.module = ema, module

    def __enter__(self):
        if self.ema is not None:
            self.ema.store(self.module.parameters())
            self.ema.copy_to(self.module.parameters())

    def __exit__(self, *_):
        if self.ema is not None:
            self.ema.restore(self.module.parameters())
