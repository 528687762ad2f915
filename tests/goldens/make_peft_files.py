"""Writes peft_files.tar.gz: adapters saved by PEFT, and the logits of the adapted models.

    base.npz                          config/<field>, params/<our path>, <tokens>, base/logits
    <case>/adapter_config.json        by PEFT's `save_pretrained`, with
    <case>/adapter_model.safetensors  (or .bin)
    <case>/logits.npy                 [B, L, V]; only compared at targets that are not padding

The tests read the archive only. To recreate it, with the packages of make_goldens.py (equal except
for the order of target_modules, which PEFT keeps in sets):

    python tests/goldens/make_peft_files.py
"""

import pathlib
import tempfile

import numpy as np
import peft
import torch
from make_goldens import CONFIG, SEED, batch, build, forward, our_array, our_name
from make_hf_files import pack

HERE = pathlib.Path(__file__).parent
TASK = "SEQ_2_SEQ_LM"
ATTENTION = ["q", "k", "v", "o"]

CASES = {
    "ia3": peft.IA3Config(
        target_modules=["k", "v", "wo"], feedforward_modules=["wo"], task_type=TASK
    ),
    # Without feedforward modules the output of wo is scaled.
    "ia3_outputs": peft.IA3Config(
        target_modules=[*ATTENTION, "wi_0", "wi_1", "wo"], feedforward_modules=[], task_type=TASK
    ),
    "lora_all": peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, lora_dropout=0.1, task_type=TASK,
        target_modules=[*ATTENTION, "wi_0", "wi_1", "wo"],
    ),
    "lora_paper": peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=[*ATTENTION, "wi_0", "wo"], task_type=TASK
    ),
    "lora_patterns": peft.LoraConfig(
        r=2, lora_alpha=8, target_modules=["q", "v", "wo"], task_type=TASK,
        rank_pattern={"q": 1, "wo": 5}, alpha_pattern={"v": 24},
    ),
}  # fmt: skip
PICKLED = "ia3"  # also saved as a .bin


def base() -> torch.nn.Module:
    """Returns the T5 of make_goldens.py, with the weights of hf_t5.npz."""
    torch.manual_seed(SEED)
    return build()


def trained(config: peft.PeftConfig) -> peft.PeftModel:
    """Returns the base with an adapter that is far from the identity."""
    torch.manual_seed(SEED)
    wrapped = peft.get_peft_model(base(), config).eval()
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if p.requires_grad:
                noise = torch.randn_like(p)
                p.copy_(1 + 0.3 * noise if "ia3_l" in name else 0.2 * noise)
    return wrapped


def logits(model: torch.nn.Module, data: dict[str, np.ndarray]) -> np.ndarray:
    with torch.no_grad():
        return forward(model, data)[0].numpy()


def save(model: peft.PeftModel, folder: pathlib.Path, result: np.ndarray, safe: bool) -> None:
    model.save_pretrained(folder, safe_serialization=safe)
    (folder / "README.md").unlink(missing_ok=True)
    np.save(folder / "logits.npy", result)


def main() -> None:
    torch.set_num_threads(1)
    data = batch(np.random.default_rng(SEED), [9, 5, 2], [7, 4, 1])
    model = base()
    plain = logits(model, data)
    arrays = {f"config/{k}": np.asarray(v) for k, v in CONFIG.items()} | data
    for name, p in model.named_parameters():
        arrays[f"params/{our_name(name)}"] = our_array(our_name(name), p)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        np.savez_compressed(folder / "base.npz", **arrays, **{"base/logits": plain})
        for case, config in CASES.items():
            adapted = trained(config)
            result = logits(adapted, data)
            save(adapted, folder / case, result, safe=True)
            if case == PICKLED:
                save(adapted, folder / f"{case}_bin", result, safe=False)
            moved = np.abs(result - plain).max() / np.abs(plain).max()
            print(f"{case}: logits move by {moved:.2f} of the largest")
        pack(folder, HERE / "peft_files.tar.gz")


if __name__ == "__main__":
    main()
