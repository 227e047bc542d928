#!/usr/bin/env bash
# What made these weights, on two CPU cores. DINOV2: folder of DINOv2-small with its image processor; DATA: 5,000 images of
# mixed domains (natural, cartoon, art, sketch, medical); OUTPUT: where everything goes. Each step goes on where it stopped.
set -euo pipefail
: "${DINOV2:?folder of DINOv2-small}" "${DATA:?folder of images}" "${OUTPUT:?folder for the PSM}"
export ACCELERATE_USE_CPU=true

unet='{"in_channels": 12, "out_channels": 12, "layers_per_block": 1, "block_out_channels": [32, 64, 128, 224],
  "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D", "DownBlock2D"],
  "up_block_types": ["UpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"], "resnet_time_scale_shift": "scale_shift",
  "norm_num_groups": 8, "attn_norm_num_groups": 8, "attention_head_dim": 32}'
common=(--pretrained_model_name_or_path "$DINOV2" --train_data_dir "$DATA" --feature cls --sigma_min 0.2 --sigma_max 0.5
  --random_flip --mixed_precision bf16 --lr_scheduler cosine --num_validation_images 8 --validation_samples 1
  --validation_sigmas 0.25 0.5 --checkpointing_steps 50 --checkpoints_total_limit 2 --resume_from_checkpoint latest)

# 1. A denoiser from scratch: the diffusion loss alone, without the tower.
fs-psm train --stage purifier "${common[@]}" --output_dir "$OUTPUT/denoise" --purifier_config "$unet" --train_batch_size 8 \
  --lambda_rb 0 --lambda_mse 0 --max_train_steps 1000 --learning_rate 1e-3 --lr_warmup_steps 50
# 2. More steps on small crops, which is what a denoiser needs most.
fs-psm train --stage purifier "${common[@]}" --output_dir "$OUTPUT/denoise2" --pretrained_psm_name_or_path "$OUTPUT/denoise" \
  --resolution 112 --random_resize --train_batch_size 8 --lambda_rb 0 --lambda_mse 0 \
  --max_train_steps 7000 --learning_rate 1e-3 --lr_warmup_steps 100
# 3. The purifier: through the frozen tower. The diffusion loss, a third of the time, is left out.
fs-psm train --stage purifier "${common[@]}" --output_dir "$OUTPUT/purifier" --pretrained_psm_name_or_path "$OUTPUT/denoise2" \
  --train_batch_size 8 --num_samples 1 --lambda_diff 0 --lambda_rb 1 --lambda_mse 1 \
  --max_train_steps 1000 --learning_rate 5e-4 --lr_warmup_steps 30
# 4. The mapper behind it: one pass over the images at the paper's learning rate. (Before, 500 steps at 1e-3 made one that lost
# at σ = 0.25: results/table5.json of commit 5b6226a.)
fs-psm train --stage mapper "${common[@]}" --output_dir "$OUTPUT/psm" --pretrained_psm_name_or_path "$OUTPUT/purifier" \
  --train_batch_size 16 --num_samples 1 --max_train_steps 300 --learning_rate 2e-4 --lr_warmup_steps 20 --weights_dtype bfloat16
# 5. A mapper without a purifier, for the row FS+M.
fs-psm train --stage mapper "${common[@]}" --output_dir "$OUTPUT/mapper_only" --purifier none \
  --train_batch_size 16 --num_samples 1 --max_train_steps 300 --learning_rate 2e-4 --lr_warmup_steps 20 --weights_dtype bfloat16
# 6. What is published: step 4 in pieces of at most 15 MB, and the tower by its id on the Hub.
python - "$OUTPUT/psm" model_cards/fs-psm-dinov2-small <<'PY'
import sys

from fs_psm_hf import PSMModel

psm = PSMModel.from_pretrained(sys.argv[1])
psm.config.base_model_name_or_path = "facebook/dinov2-small"
psm.save_pretrained(sys.argv[2], max_shard_size="15MB")
PY
