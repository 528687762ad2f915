"""Writes datasets.tar.gz: the examples of p3_forms.py in the formats of Hugging Face `datasets`.

The tests read the archive only. To recreate it:

    pip install datasets==5.2.0
    PYTHONPATH=.:tests python tests/goldens/make_datasets.py

huggingface/   RTE and ANLI, as in the cache of load_dataset (RTE's train split in two files)
raw/           COPA (in two files) and AG News, by save_to_disk
odd/indices    a selection of rows of a Dataset
odd/single     a Dataset without a DatasetDict
odd/nested     nested fields, empty lists, null
"""

import gzip
import json
import os
import pathlib
import tarfile
import tempfile

import datasets
import p3_forms
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

HERE = pathlib.Path(__file__).parent
TEXTS = ("premise", "hypothesis", "text", "choice1", "choice2")


def features(labels: int) -> Features:
    names = [f"label {number}" for number in range(labels)]
    return Features({**{key: Value("string") for key in TEXTS}, "label": ClassLabel(names=names)})


def builder(task: str, name: str, config: str, labels: int, cache: pathlib.Path, repo_id=None):
    """Returns a builder of examples, whose cache has the layout of the Hub's datasets."""
    splits = {
        p3_forms.p3_table.tasks()[task].source_split(split): rows
        for split, rows in p3_forms.raw_splits(task).items()
    }

    class Builder(datasets.GeneratorBasedBuilder):
        VERSION = datasets.Version("1.0.3")
        BUILDER_CONFIGS = [datasets.BuilderConfig(name=config, version=VERSION)]

        def _info(self):
            return datasets.DatasetInfo(features=features(labels))

        def _split_generators(self, dl_manager):
            return [
                datasets.SplitGenerator(name=split, gen_kwargs={"rows": rows})
                for split, rows in splits.items()
            ]

        def _generate_examples(self, rows):
            yield from enumerate(rows)

    return Builder(
        cache_dir=str(cache),
        config_name=config,
        dataset_name=name,
        repo_id=repo_id,
        hash="0123456789abcdef",
        writer_batch_size=40,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        root = pathlib.Path(temporary)
        hub = root / "huggingface"
        rte = builder("super_glue_rte_GPT_3_style", "super_glue", "rte", 2, hub)
        rte.download_and_prepare(max_shard_size=8000)
        anli = builder("anli_GPT_3_style_r1", "anli", "plain_text", 3, hub, "facebook/anli")
        anli.download_and_prepare()
        for task, home, labels, shards in (
            ("super_glue_copa_C1_or_C2_premise_so_because_", "super_glue/copa", 2, 2),
            ("ag_news_recommend", "ag_news", 4, 1),
        ):
            splits = p3_forms.raw_splits(task)
            saved = DatasetDict(
                {
                    split: Dataset.from_list(rows, features=features(labels))
                    for split, rows in splits.items()
                }
            )
            saved.save_to_disk(str(root / "raw" / home), num_shards=dict.fromkeys(saved, shards))
        whole = Dataset.from_dict({"n": list(range(10))}, split="test")
        whole.save_to_disk(str(root / "odd" / "single"))
        whole.select([7, 3, 5]).save_to_disk(str(root / "odd" / "indices"))
        nested = Features(
            {
                "choices": {"text": List(Value("string")), "label": List(Value("string"))},
                "pairs": List({"a": Value("int32"), "b": List(Value("string"))}),
                "none": Value("string"),
                "yes": Value("bool"),
            }
        )
        rows = [
            {"choices": {"text": [], "label": []}, "pairs": [], "none": None, "yes": True},
            {
                "choices": {"text": ["é", "b"], "label": ["A", "B"]},
                "pairs": [{"a": 1, "b": ["x"]}, {"a": 2, "b": []}],
                "none": "not",
                "yes": False,
            },
        ]
        Dataset.from_list(rows, features=nested).save_to_disk(str(root / "odd" / "nested"))
        (root / "odd" / "nested.json").write_text(json.dumps(rows))
        for lock in root.rglob("*.lock"):
            lock.unlink()
        # Without times and owners, so that equal files make an equal archive.
        with (
            open(HERE / "datasets.tar.gz", "wb") as out,
            gzip.GzipFile(fileobj=out, mode="wb", mtime=0, filename="") as zipped,
            tarfile.open(fileobj=zipped, mode="w") as tar,
        ):
            for path in sorted(root.rglob("*")):
                if path.is_file():
                    info = tar.gettarinfo(path, str(path.relative_to(root)))
                    info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
                    with open(path, "rb") as file:
                        tar.addfile(info, file)


if __name__ == "__main__":
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    main()
