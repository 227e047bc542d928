"""One training stage from arguments to a saved PSM: paper Algorithm 1."""

import logging
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, GradientAccumulationPlugin
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import get_scheduler, set_seed
from transformers.utils import logging as transformers_logging

from ..certification.identity import model_hash
from ..hub import prepare_repo
from .cache import FeatureCache
from .checkpoints import find_checkpoint, list_checkpoints, save_checkpoint
from .data import PositionBatches, collate, load_images
from .record import write_record
from .saving import copy_psm, publish, save_psm
from .setup import Averaged, build_psm, decay_groups, weights_hash
from .stages import MapperStage, PurifierStage
from .tower import FrozenTower, load_plain_tower, patch_of, served_size
from .trackers import JSONLTracker, check_report_to, flat
from .validation import format_rows, sample_picture, save_picture, validate


logger = logging.getLogger(__name__)
# Arguments that a run must have in common with the one that made the checkpoint, to go on exactly.
_SAME = (
    "stage", "seed", "num_samples", "feature", "post_layernorm", "center_crop", "random_flip", "random_resize",
    "train_data_weights", "lambda_diff", "lambda_rb", "lambda_mse", "lambda_stats", "lambda_id", "learning_rate",
    "lr_scheduler", "lr_warmup_steps", "adam_beta1", "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "use_ema",
    "ema_max_decay",
)  # fmt: skip


class TrainingDiverged(RuntimeError):
    """The loss is NaN or infinite."""


def train(stages):
    """Train the stages in order.

    Args:
        stages (`list[PSMTrainingArguments]`): from `parse_arguments`. With two, the PSM of the last is also the result of
            their common parent folder.

    Returns:
        `Path`: folder of the trained [`PSMModel`].

    Raises:
        ValueError, OSError, ImportError: an argument, a file or a missing package, in one sentence.
        TrainingDiverged: the loss is NaN or infinite; the weights of the last checkpoint are untouched.
    """
    last = stages[-1]
    if last.push_to_hub and os.environ.get("RANK", "0") == "0":  # now rather than after hours
        name = last.hub_model_id or Path(last.output_dir).resolve().name
        last.hub_model_id = prepare_repo(name, last.hub_token, last.hub_private_repo or None)
    folder = None
    for arguments in stages:
        folder = Path(arguments.output_dir)
        going_on = len(stages) > 1 and arguments.resume_from_checkpoint is not None
        if going_on and arguments.stage == "purifier" and (folder / "config.json").exists():
            logger.warning("%s holds a trained purifier, which is taken as it is", folder)
            continue
        Trainer(arguments).run()
    processes = PartialState()
    if len(stages) > 1 and processes.is_main_process:
        copy_psm(folder, folder.parent)
    processes.wait_for_everyone()
    processes.destroy_process_group()
    return folder.parent if len(stages) > 1 else folder


class Trainer:
    """Everything one stage needs, made from its arguments; `run` trains."""

    def __init__(self, arguments):
        self.args = args = arguments
        self.folder = Path(args.output_dir)
        report_to = check_report_to(args.report_to)
        checkpoint, facts = None, None
        if args.resume_from_checkpoint is not None:
            checkpoint, facts = find_checkpoint(self.folder, args.resume_from_checkpoint)
        elif list_checkpoints(self.folder):
            raise ValueError(
                f"`--output_dir` {self.folder} holds {list_checkpoints(self.folder)[-1][1].name} of another run: give "
                "--resume_from_checkpoint latest, or another folder"
            )
        self.first_step = facts["step"] if facts else 0
        set_seed(args.seed)

        stage_class = {"purifier": PurifierStage, "mapper": MapperStage}[args.stage]
        passes = args.gradient_accumulation_steps * stage_class.passes(args)
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            # Every pass counts; what the environment says of accumulation does not.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=passes, sync_with_dataloader=False),
            step_scheduler_with_optimizer=False,
            log_with=report_to or None,
            project_dir=str(self.folder / args.logging_dir) if report_to else None,
        )
        self.accelerator = accelerator
        if not accelerator.is_main_process:
            transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        if accelerator.is_main_process:
            self.folder.mkdir(parents=True, exist_ok=True)
        # The tower: frozen, in the dtype it computes in.
        dtype = {"bf16": "bfloat16", "fp16": "float16"}.get(accelerator.mixed_precision, "float32")
        tower, processor = load_plain_tower(args, dtype)
        recompute = args.gradient_checkpointing and args.stage == "purifier"  # no gradient passes it in the other
        self.tower = FrozenTower(tower.to(accelerator.device), args.feature, recompute, args.post_layernorm)
        # Not the tower's own `image_size`: DINOv2 was trained at 518 pixels and is given 224.
        self.resolution = args.resolution or served_size(processor)
        with accelerator.main_process_first() if args.dataset_name else nullcontext():
            self.images, held_out = load_images(args, self.resolution, patch_of(tower))
        self.held_out = held_out.to(accelerator.device)
        with torch.no_grad():
            tokens = self.tower.raw(self.held_out[:1])  # also an early word on a resolution that does not fit
        if args.first_token is not None and tokens.ndim == 3 and args.first_token >= tokens.shape[1]:
            raise ValueError(
                f"`--first_token` must be less than the tower's {tokens.shape[1]} tokens, got {args.first_token}"
            )

        psm = build_psm(args, self.tower)
        self.psm = psm.to(accelerator.device)
        if args.stage == "mapper" and self.psm.mapper.token_norm == 1:
            with torch.no_grad():
                self.psm.mapper.set_reference_norm(self.tower.raw(self.held_out[:16]).norm(dim=-1).mean())
        self.source = FeatureCache(args.feature_cache_dir, self.tower) if args.feature_cache_dir else self.tower
        self.stage = stage_class(args, self.psm, self.tower)
        part = self.stage.trained
        if args.torch_compile:
            # With its own choice of memory layouts, torch 2.13 gives wrong gradients of a U-Net on CPUs.
            part.compile(options={"layout_optimization": False})
            self.tower.compile()
        optimizer = torch.optim.AdamW(
            decay_groups(part, args.adam_weight_decay),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
        )
        self.global_batch = args.train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
        epochs = args.num_train_epochs
        self.steps = args.max_train_steps or math.ceil(epochs * len(self.images) / self.global_batch)
        if self.first_step > self.steps:
            raise ValueError(
                f"`--max_train_steps` must be >= {self.first_step}, where the checkpoint is, got {self.steps}"
            )
        self.scheduler = get_scheduler(
            args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=self.steps
        )
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            plugin = accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = args.train_batch_size
        sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        if args.use_ema and sharded:
            raise ValueError("`--use_ema` must be false under FSDP and DeepSpeed, whose weights are in pieces")
        self.model, self.optimizer = accelerator.prepare(part, optimizer)
        if accelerator.gradient_accumulation_steps != passes:
            raise ValueError(
                f"`gradient_accumulation_steps` of accelerate's configuration must be auto or {passes}, one per draw, "
                f"got {accelerator.gradient_accumulation_steps}"
            )
        accelerator.register_for_checkpointing(self.scheduler)
        self.ema = None
        if args.use_ema:
            self.ema = EMAModel(part.parameters(), decay=args.ema_max_decay)
            self.ema.to(accelerator.device)
            accelerator.register_for_checkpointing(self.ema)
        self.facts = {name: getattr(args, name) for name in _SAME} | {
            "sigma_range": list(args.sigma_range), "resolution": self.resolution, "global_batch_size": self.global_batch,
            "num_train_images": len(self.images), "train_images": self.images.mixture.names_hash(),
            "image_mean": tower.config.image_mean, "image_std": tower.config.image_std, "mixed_precision": accelerator.mixed_precision,
            "feature_layer": tower.config.feature_layer, "first_token": tower.config.first_token,
            "tower": model_hash(tower), "purifier_config": psm.config.purifier_config,
            "mapper_config": psm.config.mapper_config,
            "purifier": weights_hash(psm.purifier) if args.stage == "mapper" else None,
        }  # fmt: skip
        self.skipped = facts.get("skipped_images", 0) if facts else 0
        if checkpoint is not None:
            self._resume(checkpoint, facts)
        if accelerator.is_main_process:
            accelerator.log_with = [JSONLTracker(self.folder / "log.jsonl", self.first_step), *accelerator.log_with]
        accelerator.init_trackers(args.tracker_project_name, config=flat(args.to_dict()))

    # Made once ----------------------------------------------------------------------------------------------------------

    def _resume(self, checkpoint, facts):
        for name, value in self.facts.items():
            if name in facts and facts[name] != value:
                raise ValueError(
                    f"`--resume_from_checkpoint` {checkpoint.name} was made with {name} {facts[name]}, this run has {value}"
                )
        self.accelerator.load_state(str(checkpoint))
        self.accelerator.step = 0  # passes since the last step, which may be of another number now
        if self.ema is not None:
            self.ema.to(self.accelerator.device)

    # The loop -----------------------------------------------------------------------------------------------------------

    def run(self):
        """Train to the last step, validate, save."""
        args, accelerator = self.args, self.accelerator
        positions = PositionBatches(
            args.train_batch_size, accelerator.process_index, accelerator.num_processes,
            args.gradient_accumulation_steps, self.first_step, self.steps,
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(
            self.images,
            batch_sampler=positions,
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_num_workers > 0,
            pin_memory=accelerator.device.type == "cuda",
            generator=torch.Generator(),  # else the global one is used, and dropout differs after each start
        )
        step, micro, skipped, sums = self.first_step, 0, 0, {}
        self.stage.train()
        if step == 0:
            self._validate(0)
        with tqdm(
            total=self.steps, initial=step, desc=args.stage, unit="step", disable=not accelerator.is_local_main_process
        ) as bar:
            started = time.perf_counter()
            for batch in loader:
                for reason in batch["skipped"]:
                    skipped += 1
                    logger.warning("skipped: %s", reason)
                if batch["failed"]:
                    raise ValueError(
                        f"`--train_data_dir` gave {len(batch['failed'])} unusable images in a row: {batch['failed'][-1]}"
                    )
                images = batch["pixels"].to(accelerator.device, non_blocking=True)
                for name, value in self._backward(images, batch["positions"]).items():
                    sums[name] = sums.get(name, 0) + value / args.gradient_accumulation_steps
                micro += 1
                if micro % args.gradient_accumulation_steps:
                    continue
                step += 1
                counted = torch.tensor(skipped, device=accelerator.device)
                self.skipped += accelerator.reduce(counted, "sum").item()
                means = accelerator.reduce(torch.stack(list(sums.values())), "mean").tolist()
                losses = dict(zip(sums, means, strict=True))
                skipped, sums = 0, {}
                if not all(map(math.isfinite, means)):
                    raise self._diverged(f"the loss or its gradient is {losses['loss']} in step {step}")
                lr = self.scheduler.get_last_lr()[0]
                if not accelerator.optimizer_step_was_skipped:  # by fp16's scaler
                    if self.ema is not None:
                        self.ema.step(self.stage.trained.parameters())
                    self.scheduler.step()
                now = time.perf_counter()
                speed, started = self.global_batch / (now - started), now
                bar.update()
                bar.set_postfix(
                    loss=f"{losses['loss']:.4f}", lr=f"{lr:.1e}", img_s=f"{speed:.1f}", skipped=self.skipped
                )
                entry = losses | {"lr": lr, "images_per_second": speed, "skipped_images": self.skipped}
                accelerator.log(entry, step=step)
                last = step == self.steps
                # Before the checkpoint: what is logged up to a checkpoint is all there when a run goes on from it.
                if step % args.validation_steps == 0 or last:
                    self._validate(step)
                if step % args.checkpointing_steps == 0 or last:
                    facts = self.facts | {"skipped_images": self.skipped}
                    save_checkpoint(accelerator, self.folder, step, facts, args.checkpoints_total_limit)
                started = time.perf_counter()
        self._save()
        accelerator.wait_for_everyone()  # the next stage reads what the main process has saved
        for tracker in accelerator.trackers:
            tracker.finish()

    def _backward(self, images, positions):
        """All passes of one micro-batch; the optimiser steps in the last pass of a step."""
        accelerator = self.accelerator
        with torch.no_grad(), accelerator.autocast():
            clean = self.source.raw(images) if self.stage.needs_features else None
        found = {}
        for compute in self.stage.losses(self.model, images, positions, clean):
            with accelerator.accumulate(self.model):
                with accelerator.autocast():
                    loss, parts = compute()
                # Checked after the step of every process, by the sums; a step with NaN is never taken.
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm or math.inf)
                    if norm is None or torch.isfinite(torch.as_tensor(norm)):
                        self.optimizer.step()
                    elif accelerator.scaler is not None and accelerator.scaler.get_scale() > 1:
                        self.optimizer.step()  # fp16's own scaler skips it and scales down
                    else:
                        parts = parts | {"loss": parts["loss"] * float("nan")}
                    self.optimizer.zero_grad()
            for name, value in parts.items():
                found[name] = found.get(name, 0) + value.detach()
        return found

    def _diverged(self, what):
        before = [path.name for _, path in list_checkpoints(self.folder)]
        return TrainingDiverged(
            f"{what}; the last checkpoint is {before[-1] if before else 'none'}; start again in another --output_dir with "
            "a smaller --learning_rate, or --mixed_precision no"
        )

    def _averaged(self):
        """Context in which the trained part has its averaged weights, where there are any."""
        return Averaged(self.ema, self.stage.trained)

    def _validate(self, step):
        args, accelerator = self.args, self.accelerator
        purify, mapper = self.stage.networks(self.model)
        sigmas = args.validation_sigmas or sorted(set(args.sigma_range))
        self.stage.eval()
        with self._averaged(), accelerator.autocast():
            for sigma in sigmas:
                try:
                    found = validate(
                        self.tower, self.held_out, sigma, args.validation_samples, purify, mapper,
                        batch_size=min(8, args.train_batch_size),
                    )  # fmt: skip
                except FloatingPointError as error:
                    raise self._diverged(f"{error} after step {step}") from error
                entry = {
                    f"validation/{sigma:g}/{row}/{name}": value
                    for row, v in found.items()
                    for name, value in v.items()
                }
                accelerator.log(entry, step=step)
                if accelerator.is_main_process:
                    tqdm.write(f"step {step}, {len(self.held_out)} images held out, plug-in without confidence")
                    tqdm.write(format_rows(found, sigma))
            picture = sample_picture(self.held_out, sigmas[0], purify)  # by all: sharded weights are fetched together
        if accelerator.is_main_process:
            save_picture(picture, self.folder / "samples" / f"step-{step:06d}.png")
        self.stage.train()

    def _save(self):
        args, accelerator = self.args, self.accelerator
        with self._averaged():
            # Copies: what the state holds are the weights themselves, which are put back in a moment.
            trained = {name: tensor.clone() for name, tensor in accelerator.get_state_dict(self.model).items()}
        if not accelerator.is_main_process:
            return
        prefix = "purifier." if args.stage == "purifier" else "mapper."
        state = self.psm.state_dict() | {prefix + name: tensor for name, tensor in trained.items()}
        result = type(self.psm)(self.psm.config)
        result.load_state_dict(state)
        result = result.to(getattr(torch, args.weights_dtype))
        result.config.dtype = result.dtype
        try:
            save_psm(result, self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise OSError(f"`--output_dir` {self.folder}: the PSM cannot be written: {error}") from error
        write_record(args, self.tower.tower, self.steps)
        if args.push_to_hub:
            publish(
                self.folder,
                args.hub_model_id or self.folder.resolve().name,
                args.hub_token,
                args.hub_private_repo or None,
            )
