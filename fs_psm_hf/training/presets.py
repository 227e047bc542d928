"""What the paper uses: its towers, and its values for each stage (sections 5.1, S.2 and S.8)."""

# Which feature each host reads: LLaVA and OpenFlamingo patch tokens, zero-shot CLIP the projected embedding.
PRESETS = {
    "llava-1.5": {
        "pretrained_model_name_or_path": "openai/clip-vit-large-patch14-336",
        "feature": "tokens",
        "feature_layer": -2,
        "first_token": 1,
    },
    "openflamingo": {
        "pretrained_model_name_or_path": "openai/clip-vit-large-patch14",
        "feature": "tokens",
        "post_layernorm": True,
    },
    "clip-vit-large-patch14": {
        "pretrained_model_name_or_path": "openai/clip-vit-large-patch14",
        "feature": "pooled",
    },
    "clip-vit-base-patch16": {
        "pretrained_model_name_or_path": "openai/clip-vit-base-patch16",
        "feature": "pooled",
    },
}
# The paper states no batch size and no schedule for the purifier.
STAGE_DEFAULTS = {
    "purifier": {
        "purifier": "unet",
        "lambda_rb": 0.25,
        "learning_rate": 5e-5,
        "max_train_steps": 12_000,
        "lr_scheduler": "constant",
        "use_ema": True,
    },
    "mapper": {
        "lambda_rb": 1.0,
        "learning_rate": 2e-4,
        "num_train_epochs": 8,
        "lr_scheduler": "cosine",
        "use_ema": False,
    },
}
