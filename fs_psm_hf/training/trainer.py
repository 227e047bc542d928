"""One training stage from arguments to a saved PSM: paper Algorithm 1."""

import logging
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm
from transformers import get_scheduler, set_seed
from transformers.utils import logging as transformers_logging

from ..inputs import load_tower
from .cache import FeatureCache
from .checkpoints import find_checkpoint, list_checkpoints, save_checkpoint
from .data import Mixture, PositionBatches, TrainingImages, collate, fit_image, folder_source, hub_source
from .setup import build_psm, decay_groups
from .stages import MapperStage, PurifierStage
from .tower import FrozenTower
from .trackers import JSONLTracker, check_report_to
from .validation import format_rows, save_samples, validate


logger = logging.getLogger(__name__)
# What a run that goes on must have in common with the one that made the checkpoint, to go on exactly.
_SAME = (
    "stage", "seed", "global_batch_size", "num_train_images", "num_samples", "sigma_range", "feature", "resolution",
    "lambda_diff", "lambda_rb", "lambda_mse", "lambda_stats", "lambda_id", "use_ema",
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
    folder = None
    for arguments in stages:
        folder = Path(arguments.output_dir)
        going_on = len(stages) > 1 and arguments.resume_from_checkpoint == "latest"
        if going_on and arguments.stage == "purifier" and (folder / "config.json").exists():
            logger.info("%s holds a trained purifier: stage purifier is done", folder)
            continue
        Trainer(arguments).run()
    if len(stages) > 1:
        parent = folder.parent
        for name in ("model.safetensors", "config.json"):  # the file that makes it loadable comes last
            if Path(folder / name).exists():
                unfinished = parent / f".unfinished-{name}"
                shutil.copyfile(folder / name, unfinished)
                os.replace(unfinished, parent / name)
        return parent
    return folder


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
        accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps * stage_class.passes(args),
            step_scheduler_with_optimizer=False,
            log_with=report_to,
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
        tower, processor = load_tower(
            args.pretrained_model_name_or_path, None, args.processor_name_or_path, dtype=dtype, revision=args.revision
        )
        for name in ("feature_layer", "first_token"):
            if getattr(args, name) is not None:
                setattr(tower.config, name, getattr(args, name))
        self.tower = FrozenTower(tower.to(accelerator.device), args.feature, args.gradient_checkpointing)
        self.resolution = args.resolution or self.tower.image_size
        self._load_data(processor)

        psm = build_psm(args, self.tower)
        self.psm = psm.to(accelerator.device)
        if args.stage == "mapper" and self.psm.mapper.token_norm == 1:
            with torch.no_grad():
                self.psm.mapper.set_reference_norm(self.tower.raw(self.held_out).norm(dim=-1).mean())
        self.source = FeatureCache(args.feature_cache_dir, self.tower) if args.feature_cache_dir else self.tower
        self.stage = stage_class(args, self.psm, self.tower)
        part = self.stage.trained
        if args.torch_compile:
            part.compile()
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
        accelerator.register_for_checkpointing(self.scheduler)
        self.ema = None
        if args.use_ema:
            self.ema = EMAModel(part.parameters(), decay=args.ema_max_decay)
            self.ema.to(accelerator.device)
            accelerator.register_for_checkpointing(self.ema)
        self.facts = {
            "stage": args.stage, "seed": args.seed, "global_batch_size": self.global_batch,
            "num_train_images": self.mixture.size, "num_samples": args.num_samples, "sigma_range": list(args.sigma_range),
            "feature": args.feature, "resolution": self.resolution, "use_ema": bool(args.use_ema),
            **{name: getattr(args, name) for name in _SAME if name.startswith("lambda_")},
        }  # fmt: skip
        if checkpoint is not None:
            self._resume(checkpoint, facts)
        if accelerator.is_main_process:
            accelerator.log_with = [JSONLTracker(self.folder / "log.jsonl", self.first_step), *accelerator.log_with]
        accelerator.init_trackers(args.tracker_project_name, config=_flat(args.to_dict()))

    # Made once ----------------------------------------------------------------------------------------------------------

    def _load_data(self, processor):
        args = self.args
        if args.train_data_dir is not None:
            sources = [folder_source(folder) for folder in args.train_data_dir]
        else:
            with self.accelerator.main_process_first():
                sources = [
                    hub_source(
                        args.dataset_name, args.dataset_config_name, args.dataset_split, args.image_column,
                        cache_dir=args.cache_dir,
                    )
                ]  # fmt: skip
        rng = np.random.default_rng([args.seed, 5])
        if args.max_train_samples is not None:
            for source in sources:
                source.keep(sorted(rng.permutation(len(source))[: args.max_train_samples].tolist()))
        everything = [(s, i) for s, source in enumerate(sources) for i in range(len(source))]
        held_out = set()
        if args.validation_data_dir is not None:
            validation = folder_source(args.validation_data_dir)
            chosen = [(validation, i) for i in range(min(args.num_validation_images, len(validation)))]
        else:
            # Never more than a tenth of the images.
            count = min(args.num_validation_images, max(1, len(everything) // 10))
            picked = [everything[i] for i in rng.permutation(len(everything))[:count].tolist()]
            held_out = set(picked)
            chosen = [(sources[s], i) for s, i in sorted(picked)]
        self.mixture = Mixture(sources, args.train_data_weights, args.seed, frozenset(held_out))
        patch = getattr(self.tower.tower.config, "patch_size", None) or 1
        self.images = TrainingImages(
            self.mixture,
            self.resolution,
            args.center_crop,
            args.random_flip,
            patch if isinstance(patch, int) else patch[0],
        )
        held = []
        for source, index in chosen:
            try:
                held.append(fit_image(source[index], self.resolution))
            except OSError as error:
                logger.warning("not validated on: %s", error)
        if not held:
            raise ValueError("`--validation_data_dir` must hold a readable image, got none")
        self.held_out = torch.stack(held).to(self.accelerator.device)

    def _resume(self, checkpoint, facts):
        for name in _SAME:
            if facts.get(name) != self.facts[name]:
                raise ValueError(
                    f"`--resume_from_checkpoint` {checkpoint.name} was made with {name} {facts.get(name)}, "
                    f"this run has {self.facts[name]}"
                )
        self.accelerator.load_state(str(checkpoint))
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
        )
        step, micro, skipped, sums = self.first_step, 0, 0, {}
        self.stage.train()
        if step == 0:
            self._validate(0)
        with tqdm(
            total=self.steps, initial=step, desc=args.stage, unit="step", disable=not accelerator.is_local_main_process
        ) as bar:
            self._bar, started = bar, time.perf_counter()
            for batch in loader:
                for reason in batch["skipped"]:
                    skipped += 1
                    logger.warning("skipped: %s", reason)
                images = batch["pixels"].to(accelerator.device, non_blocking=True)
                for name, value in self._backward(images, batch["positions"]).items():
                    sums[name] = sums.get(name, 0) + value / args.gradient_accumulation_steps
                micro += 1
                if micro % args.gradient_accumulation_steps:
                    continue
                step += 1
                losses = {
                    name: accelerator.reduce(torch.as_tensor(value), "mean").item() for name, value in sums.items()
                }
                sums = {}
                if not all(map(math.isfinite, losses.values())):
                    before = [path.name for _, path in list_checkpoints(self.folder)]
                    raise TrainingDiverged(
                        f"the loss is {losses['loss']} in step {step}; the last checkpoint is "
                        f"{before[-1] if before else 'none'}; try a smaller --learning_rate or --mixed_precision no"
                    )
                if self.ema is not None:
                    self.ema.step(self.stage.trained.parameters())
                lr = self.scheduler.get_last_lr()[0]
                self.scheduler.step()
                now = time.perf_counter()
                speed, started = self.global_batch / (now - started), now
                bar.update()
                bar.set_postfix(loss=f"{losses['loss']:.4f}", lr=f"{lr:.1e}", img_s=f"{speed:.1f}", skipped=skipped)
                entry = losses | {"lr": lr, "images_per_second": speed, "skipped_images": skipped}
                accelerator.log(entry, step=step)
                last = step == self.steps
                if step % args.checkpointing_steps == 0 or last:
                    save_checkpoint(accelerator, self.folder, step, self.facts, args.checkpoints_total_limit)
                if step % args.validation_steps == 0 or last:
                    self._validate(step)
                    started = time.perf_counter()
        self._save()
        accelerator.end_training()

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
                    norm = accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
                    if norm is None or torch.isfinite(torch.as_tensor(norm)):
                        self.optimizer.step()
                    elif accelerator.scaler is not None:
                        self.optimizer.step()  # fp16's own scaler skips it and scales down
                    else:
                        parts = parts | {"loss": parts["loss"] * float("nan")}
                    self.optimizer.zero_grad()
            for name, value in parts.items():
                found[name] = found.get(name, 0) + value.detach()
        return found

    def _averaged(self):
        """Context in which the trained part has its averaged weights, where there are any."""
        return _Averaged(self.ema, self.stage.trained)

    def _validate(self, step):
        args, accelerator = self.args, self.accelerator
        purify, mapper = self.stage.networks(self.model)
        sigmas = args.validation_sigmas or [args.sigma]
        self.stage.eval()
        with self._averaged(), accelerator.autocast():
            for sigma in sigmas:
                found = validate(
                    self.tower, self.held_out, sigma, args.validation_samples, purify, mapper,
                    batch_size=min(8, args.train_batch_size),
                )  # fmt: skip
                entry = {
                    f"validation/{sigma:g}/{row}/{name}": value
                    for row, v in found.items()
                    for name, value in v.items()
                }
                accelerator.log(entry, step=step)
                if accelerator.is_main_process:
                    tqdm.write(f"step {step}, {len(self.held_out)} images held out, plug-in without confidence")
                    tqdm.write(format_rows(found, sigma))
            if accelerator.is_main_process:
                save_samples(self.folder / "samples" / f"step-{step:06d}.png", self.held_out, sigmas[0], purify)
        self.stage.train()

    def _save(self):
        args, accelerator = self.args, self.accelerator
        with self._averaged():
            trained = accelerator.get_state_dict(self.model)
        if not accelerator.is_main_process:
            return
        prefix = "purifier." if args.stage == "purifier" else "mapper."
        state = self.psm.state_dict() | {prefix + name: tensor for name, tensor in trained.items()}
        result = type(self.psm)(self.psm.config)
        result.load_state_dict(state)
        result = result.to(getattr(torch, args.weights_dtype))
        result.config.dtype = result.dtype
        unfinished = self.folder / ".unfinished-psm"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            result.save_pretrained(unfinished)
            for path in sorted(unfinished.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, self.folder / path.name)
        except (OSError, RuntimeError) as error:
            raise OSError(f"`--output_dir` {self.folder}: the PSM cannot be written: {error}") from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        if args.push_to_hub:
            result.push_to_hub(
                args.hub_model_id or self.folder.resolve().name, token=args.hub_token, private=args.hub_private_repo
            )


class _Averaged:
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


def _flat(values):
    """Settings as every tracker can take them."""
    simple = (str, int, float, bool)
    return {name: v if isinstance(v, simple) else str(v) for name, v in values.items() if v is not None}
