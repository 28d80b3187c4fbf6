"""A run tells what it took of each source, by the weights of `prepare` or its own, from the same shards."""

import json

import pytest

from hf_scratch_gpt.data import prepare
from hf_scratch_gpt.pretraining import pretrain
from hf_scratch_gpt.runs import read_metrics


@pytest.fixture(scope="module")
def mixed_folder(prepared_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    for name, count in (("small", 30), ("large", 200)):
        rows = ({"text": f"the {name} list of names and value {number} of the file " * 5} for number in range(count))
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [str(folder / "small.jsonl"), str(folder / "large.jsonl")]
    settings = {"sources": sources, "mixture": {sources[0]: 3, sources[1]: 1}, "heldout_fraction": 0.1}
    output = folder / "prepare"
    return prepare.run(prepare.Arguments(output_dir=str(output), tokenizer_dir=str(prepared_folder), **settings))


def test_the_shares_and_epochs_of_a_run_are_in_its_metrics(mixed_folder, make_arguments, tmp_path):
    manifest = json.loads((mixed_folder / "manifest.json").read_text())
    small, large = manifest["sources"]
    assert manifest["mixture"] == {small: 0.75, large: 0.25}
    ranges = {part["source"]: part for part in manifest["splits"]["train"]["sources"]}
    assert ranges[large]["start"] == ranges[small]["tokens"]
    tokens = manifest["splits"]["train"]["tokens"]
    shares = {entry.pop("source"): entry for entry in manifest["shares"]}
    assert shares[small] == {
        "tokens": ranges[small]["tokens"],
        "token_share": pytest.approx(ranges[small]["tokens"] / tokens),
        "weight": 0.75,
        "epochs_of_a_pass": pytest.approx(0.75 * tokens / ranges[small]["tokens"]),
    }
    assert sum(entry["token_share"] for entry in shares.values()) == pytest.approx(1)
    metrics = read_metrics(pretrain.run(make_arguments(dataset_dir=str(mixed_folder))))["metrics"]
    assert [entry["share"] for entry in metrics["mixture"]] == [0.75, 0.25]
    assert metrics["mixture"][0]["tokens"] == 18 * 32
    assert metrics["mixture"][0]["epochs"] == pytest.approx(18 * 32 / ranges[small]["tokens"])
    other = make_arguments(dataset_dir=str(mixed_folder), output_dir=str(tmp_path / "b"), mixture={small: 1, large: 5})
    metrics = read_metrics(pretrain.run(other))["metrics"]
    assert [entry["share"] for entry in metrics["mixture"]] == pytest.approx([1 / 6, 5 / 6])
