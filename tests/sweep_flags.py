"""Flags of small sweeps."""

TINY = ["--gin_file=models/t5_1_1_tiny.gin", "--gin_file=runs/finetune.gin"]
FLAGS = [*TINY, "--evaluate=runs/evaluate.gin", "--gin.JSONL_DIR=tasks", "--gin.TRAIN_STEPS=9"]
FLAGS += ["--gin.INITIAL_CHECKPOINT_PATH=base.safetensors"]
