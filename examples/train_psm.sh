#!/usr/bin/env bash
# A PSM for LLaVA's tower as in the paper: guided-diffusion purifier, then mapper.
#
#     CHECKPOINT=256x256_diffusion_uncond.pt DATA=images OUTPUT=psm-llava examples/train_psm.sh
#
# CHECKPOINT: github.com/openai/guided-diffusion. DATA: a folder with natural/, cartoon/ and medical/. Needs a GPU; not run
# where this was written, where neither a GPU nor these weights were at hand. The same two stages on two CPU cores, with a
# light U-Net and DINOv2-small: model_cards/fs-psm-dinov2-small/train.sh.
set -euo pipefail
: "${CHECKPOINT:?a guided-diffusion checkpoint}" "${DATA:?a folder of images}" "${OUTPUT:?a folder for the PSM}"

[ -d "$OUTPUT/diffusion" ] || fs-psm convert guided-diffusion --checkpoint "$CHECKPOINT" --output "$OUTPUT/diffusion"
launch=(accelerate launch --mixed_precision bf16 -m fs_psm_hf.training --preset llava-1.5 --gradient_checkpointing
  --train_data_dir "$DATA/natural" "$DATA/cartoon" "$DATA/medical" --train_data_weights 0.4 0.3 0.3
  --random_flip --resume_from_checkpoint latest)
"${launch[@]}" --stage purifier --pretrained_psm_name_or_path "$OUTPUT/diffusion" --output_dir "$OUTPUT/purifier" --train_batch_size 4
"${launch[@]}" --stage mapper --pretrained_psm_name_or_path "$OUTPUT/purifier" --output_dir "$OUTPUT/psm"
