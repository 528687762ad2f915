"""The same 1,000 invented examples of P3 in each form: cache, Parquet, templates and raw data."""

import json
import pathlib
from collections.abc import Callable

import archives
import numpy as np

from pemoe_jax.tasks.p3 import published as published_lib

NAMES = ["Ann", "Bo", "Cy", "Dee", "Eli"]
THINGS = ["bread", "a kite", "two eggs", "the | bar", "hay", "é and ü"]
TOWNS = ["Oak", "Elm", "Ash"]

# data set, subset -> templates.yaml, as promptsource writes it
YAML = {
    ("super_glue", "rte"): """\
dataset: super_glue
subset: rte
templates:
  11111111-0000-0000-0000-000000000001: !Template
    answer_choices: Yes ||| No
    id: 11111111-0000-0000-0000-000000000001
    jinja: 'Given that {{premise}} Can we infer "{{hypothesis}}"? ||| {% if label != -1
      %}{{answer_choices[label]}}{% endif %}'
    metadata: !TemplateMetadata
      choices_in_prompt: false
      metrics:
      - Accuracy
      original_task: true
    name: can we infer
    reference: ''
  11111111-0000-0000-0000-000000000002: !Template
    answer_choices: True ||| False
    id: 11111111-0000-0000-0000-000000000002
    jinja: '{{premise}}

      Question: {{hypothesis}} True or False? ||| {{answer_choices[label]}}'
    metadata: !TemplateMetadata
      original_task: true
    name: GPT-3 style
    reference: ''
""",
    ("super_glue", "copa"): """\
dataset: super_glue
subset: copa
templates:
  22222222-0000-0000-0000-000000000001: !Template
    answer_choices: '{{choice1}} ||| {{choice2}}'
    jinja: '"{{ answer_choices[0] }}" or "{{ answer_choices[1] }}"? {{ premise }} |||
      {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      original_task: true
    name: "C1 or C2? premise, so/because\\u2026"
""",
    ("anli", ""): """\
dataset: anli
templates:
  33333333-0000-0000-0000-000000000001: !Template
    answer_choices: True ||| Neither ||| False
    jinja: '{{premise}} Question: {{hypothesis}} ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      original_task: true
    name: GPT-3 style
""",
    ("ag_news", ""): """\
dataset: ag_news
templates:
  44444444-0000-0000-0000-000000000001: !Template
    answer_choices: Politician ||| Athlete ||| Manager ||| Scientist
    jinja: 'Who would read this? {{text}} ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      original_task: true
    name: recommend
""",
}


def raw(count: int, labels: int, seed: int) -> list[dict]:
    """Returns examples with every field that a template reads."""
    rng = np.random.default_rng(seed)

    def text() -> str:
        name, thing, town = (str(rng.choice(words)) for words in (NAMES, THINGS, TOWNS))
        return f"{name} took {thing} to {town}."

    return [
        {
            "premise": text() + " ||| " * int(rng.integers(2)),
            "hypothesis": text(),
            "text": text(),
            "choice1": text(),
            "choice2": text() + " ",
            "label": int(rng.integers(labels)),
        }
        for _ in range(count)
    ]


# Rendered without jinja: the inputs and choices of each template for an example
RENDERED: dict[str, Callable[[dict], tuple[str, list[str]]]] = {
    "super_glue_rte_can_we_infer": lambda e: (
        f'Given that {e["premise"]} Can we infer "{e["hypothesis"]}"?',
        ["Yes", "No"],
    ),
    "super_glue_rte_GPT_3_style": lambda e: (
        f"{e['premise']}\nQuestion: {e['hypothesis']} True or False?",
        ["True", "False"],
    ),
    "super_glue_copa_C1_or_C2_premise_so_because_": lambda e: (
        f'"{e["choice1"].strip()}" or "{e["choice2"].strip()}"? {e["premise"]}',
        [e["choice1"].strip(), e["choice2"].strip()],
    ),
    "anli_GPT_3_style_r1": lambda e: (
        f"{e['premise']} Question: {e['hypothesis']}",
        ["True", "Neither", "False"],
    ),
    "ag_news_recommend": lambda e: (
        f"Who would read this? {e['text']}",
        ["Politician", "Athlete", "Manager", "Scientist"],
    ),
}
EVAL_SPLIT = {task: "test" if "ag_news" in task else "validation" for task in RENDERED}
LABELS = {"super_glue_rte": 2, "super_glue_copa": 2, "anli": 3, "ag_news": 4}


def raw_splits(task: str) -> dict[str, list[dict]]:
    """Split -> the dataset's examples; 1,000 prompted rows over the five tasks."""
    dataset = published_lib.tasks()[task].dataset_name
    seed, labels = sorted(LABELS).index(dataset), LABELS[dataset]
    return {"train": raw(150, labels, seed), EVAL_SPLIT[task]: raw(50, labels, seed + 100)}


def plain_rows(task: str, split: str) -> list[dict]:
    """The published rows of a split, text only."""
    rows = []
    for example in raw_splits(task)[split]:
        inputs, choices = RENDERED[task](example)
        target = choices[example["label"]]
        rows.append(
            {"inputs_pretokenized": inputs.strip(), "targets_pretokenized": target}
            | {"answer_choices": choices}
        )
    return rows


def score_rows(task: str, split: str) -> list[dict]:
    """The published rows of a split of the `_score_eval` task, text only."""
    return [
        {
            **row,
            "targets_pretokenized": choice,
            "idx": [number, position],
            "is_correct": choice == row["targets_pretokenized"],
            "weight": 1.0,
        }
        for number, row in enumerate(plain_rows(task, split))
        for position, choice in enumerate(row["answer_choices"])
    ]


def all_rows() -> dict[tuple[str, str], list[dict]]:
    """(published task, split) -> rows, text only."""
    rows = {}
    for task in RENDERED:
        for split in ("train", EVAL_SPLIT[task]):
            rows[task, split] = plain_rows(task, split)
            if published_lib.tasks()[task].has_score_eval:
                rows[f"{task}_score_eval", split] = score_rows(task, split)
    return rows


def with_ids(row: dict, encode: Callable[[str], list[int]], inputs_eos: bool) -> dict:
    """Returns the row with ids: EOS on targets, and on inputs with `inputs_eos`."""
    return row | {
        "inputs": encode(row["inputs_pretokenized"]) + [1] * inputs_eos,
        "targets": [*encode(row["targets_pretokenized"]), 1],
    }


def write_parquet(folder: pathlib.Path, encode: Callable[[str], list[int]]) -> None:
    """Form (b), with EOS on inputs, in row groups of 40 and two files of one split."""
    import pyarrow
    from pyarrow import parquet

    for (task, split), rows in all_rows().items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        rows = [with_ids(row, encode, True) for row in rows]
        parts = [rows[:70], rows[70:]] if split == "train" else [rows]
        for number, part in enumerate(parts):
            path = folder / task / f"{split}-{number:05d}-of-{len(parts):05d}.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(part), path, row_group_size=40)


def write_yaml(folder: pathlib.Path) -> None:
    """The templates, without examples."""
    for (dataset, subset), yaml in YAML.items():
        home = folder / "templates" / dataset / subset
        home.mkdir(parents=True)
        (home / "templates.yaml").write_text(yaml, encoding="utf-8")


def write_datasets(folder: pathlib.Path) -> None:
    """Form (c) over files of Hugging Face's `datasets`: its cache, and save_to_disk."""
    write_yaml(folder)
    archives.unpack("datasets", folder)


def write_tfds(folder: pathlib.Path) -> None:
    """Form (c) over prepared tensorflow-datasets, with the builders' own names and fields."""
    import tensorflow_datasets as tfds

    write_yaml(folder)
    text, label = tfds.features.Text, tfds.features.ClassLabel

    def news(row: dict) -> dict:
        title, _, description = row["text"].partition(" ")
        return {"title": title, "description": description, "label": row["label"]}

    def rename(**kinds: str):
        return lambda row: {new: row[old] for new, old in kinds.items()}

    nli = {"premise": "premise", "hypothesis": "hypothesis", "label": "label"}
    for task, name, config, convert in (
        ("super_glue_rte_GPT_3_style", "super_glue", "rte", rename(**nli)),
        (
            "super_glue_copa_C1_or_C2_premise_so_because_",
            "super_glue",
            "copa",
            rename(premise="premise", choice1="choice1", choice2="choice2", label="label"),
        ),
        (
            "anli_GPT_3_style_r1",
            "anli",
            "r1",
            rename(context="premise", hypothesis="hypothesis", label="label"),
        ),
        ("ag_news_recommend", "ag_news_subset", None, news),
    ):
        splits = {split: list(map(convert, rows)) for split, rows in raw_splits(task).items()}
        labels = LABELS[published_lib.tasks()[task].dataset_name]
        kinds = {
            key: label(num_classes=labels) if key == "label" else text()
            for key in next(iter(splits.values()))[0]
        }
        prepare(folder / "tfds", name, config, tfds.features.FeaturesDict(kinds), splits)


def prepare(
    data_dir: pathlib.Path, dataset: str, config: str | None, features: object, splits: dict
) -> None:
    """Writes examples with tensorflow-datasets, as one of its builders."""
    import tensorflow_datasets as tfds

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = dataset
        VERSION = tfds.core.Version("1.0.2")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config, version="1.0.2")] * bool(config)

        def _info(self) -> tfds.core.DatasetInfo:
            # in the order of the other forms
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, manager: object) -> dict:
            return {split: enumerate(rows) for split, rows in splits.items()}

        def _generate_examples(self) -> None:
            raise NotImplementedError

    Builder(data_dir=str(data_dir), config=config).download_and_prepare()


def write_templates(folder: pathlib.Path) -> None:
    """Form (c): templates.yaml, and the examples in its folder or in raw/, one as Parquet."""
    import pyarrow
    from pyarrow import parquet

    write_yaml(folder)
    for task in RENDERED:
        published = published_lib.tasks()[task]
        where = "templates" if task.startswith("ag_news") else "raw"
        home = folder / where / published.dataset / published.subset
        home.mkdir(parents=True, exist_ok=True)
        for split, examples in raw_splits(task).items():
            name = published.source_split(split)
            if "copa" in task:
                table = pyarrow.Table.from_pylist(examples)
                parquet.write_table(table, home / f"{name}-00000-of-00001.parquet")
            else:
                lines = "".join(json.dumps(example) + "\n" for example in examples)
                (home / f"{name}.jsonl").write_text(lines)


def write_cache_split(folder: pathlib.Path, split: str, rows: list[dict], shards: int = 1) -> None:
    """tfrecords, info and stats of a split, with TensorFlow alone."""
    import tensorflow as tf

    kinds = {
        "inputs": ([None], "int32"),
        "targets": ([None], "int32"),
        "inputs_pretokenized": ([], "string"),
        "targets_pretokenized": ([], "string"),
        "answer_choices": ([None], "string"),
        "idx": ([2], "int32"),
        "is_correct": ([], "bool"),
        "weight": ([], "float32"),
    }

    def feature(key: str, value: object) -> tf.train.Feature:
        values = value if isinstance(value, list) else [value]
        if kinds[key][1] == "string":
            texts = [text.encode() for text in values]
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=texts))
        if kinds[key][1] == "float32":
            return tf.train.Feature(float_list=tf.train.FloatList(value=values))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=map(int, values)))

    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"{split}.tfrecord-{shard:05d}-of-{shards:05d}"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for row in rows[shard * len(rows) // shards : (shard + 1) * len(rows) // shards]:
                features = {key: feature(key, value) for key, value in row.items()}
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
    described = {key: {"shape": kinds[key][0], "dtype": kinds[key][1]} for key in rows[0]}
    info = {"num_shards": shards, "features": described, "seqio_version": "0.0.6"}
    (folder / f"info.{split}.json").write_text(json.dumps(info))
    (folder / f"stats.{split}.json").write_text(json.dumps({"examples": len(rows)}))


def write_cache(folder: pathlib.Path, encode: Callable[[str], list[int]]) -> None:
    """Form (a): without EOS on inputs, `_score_eval` rows shuffled as by seqio's cache_tasks."""
    for (task, split), rows in all_rows().items():
        rows = [with_ids(row, encode, False) for row in rows]
        if task.endswith("_score_eval"):
            rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
        write_cache_split(folder / task, split, rows, shards=2 if split == "train" else 1)
        (folder / task / "COMPLETED").touch()
