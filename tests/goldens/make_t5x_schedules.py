"""Writes t5x_schedules.json: learning rates of T5X's `create_learning_rate_scheduler`.

It has the steps, and a row for each schedule: the arguments, and the rates at the steps. The tests
read the data only. To recreate it, in the environment of make_t5x.py:

    python tests/goldens/make_t5x_schedules.py
"""

import json
import pathlib

from t5x import utils

STEPS = (0, 1, 2, 9, 10, 11, 25, 50, 51, 99, 100, 101, 149, 150, 300, 1000, 20_000, 150_000)
SCHEDULES = [
    {"factors": factors, "base_learning_rate": 0.5, "warmup_steps": 10, **settings}
    for factors, settings in [
        ("constant", {}),
        ("constant", {"base_learning_rate": 1e-9}),
        ("constant * linear_warmup", {}),
        ("constant * linear_warmup", {"step_offset": 25}),
        ("constant * linear_warmup", {"min_learning_rate": 0.1}),
        ("linear_decay", {}),
        ("linear_decay", {"decay_factor": 0.0025}),
        ("constant * linear_decay", {"decay_factor": 0.01}),
        ("constant * rsqrt_decay", {}),
        ("constant * linear_warmup * rsqrt_decay", {"warmup_steps": 100}),
        ("constant*rsqrt_normalized_decay", {}),
        ("constant * linear_warmup * rsqrt_normalized_decay", {"step_offset": 7}),
        ("constant * decay_every", {}),
        ("constant * decay_every", {"decay_factor": 0.9, "steps_per_decay": 50}),
        ("constant * cosine_decay", {}),
        ("constant * linear_warmup * cosine_decay", {"steps_per_cycle": 90}),
        ("constant * cosine_decay * decay_every", {"steps_per_cycle": 99, "step_offset": 1}),
    ]
]


def main() -> None:
    rows = []
    for settings in SCHEDULES:
        schedule = utils.create_learning_rate_scheduler(**settings)
        rows.append([settings, [float(f"{float(schedule(step)):.9g}") for step in STEPS]])
    lines = ",\n".join(map(json.dumps, rows))
    text = f'{{"steps": {[*STEPS]}, "schedules": [\n{lines}\n]}}\n'
    pathlib.Path(__file__).with_name("t5x_schedules.json").write_text(text)


if __name__ == "__main__":
    main()
