"""The doctor finds nothing wrong with our presets, nor with transformers' own Llama, Qwen3 and GPT-2."""

from pathlib import Path

import pytest
from doctor_tiny import foreign, make_tokenizer, names, shrunk, write

from hf_scratch_gpt.hub.doctor.loading import load_subject
from hf_scratch_gpt.hub.doctor.main import CHECKS, examine
from hf_scratch_gpt.hub.doctor.reload import reload_in_fresh_process
from hf_scratch_gpt.model.presets import PRESETS

FOREIGN = ("llama", "qwen3", "gpt2")
NO_BEGINNING = {"chat-bos"}
# What these do not declare, so that it cannot be checked.
SKIPPED = {
    "llama": NO_BEGINNING | {"residual-init"},
    "qwen3": NO_BEGINNING | {"residual-init"},
    "gpt1": NO_BEGINNING | {"residual-init"},
    "gpt2": NO_BEGINNING | {"flex-attention"},
}


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """Every model, loaded here and, from its saved copy, in one fresh process for all."""
    loaded = {}
    for name in (*PRESETS, *FOREIGN):
        model = foreign(name) if name in FOREIGN else shrunk(name)
        folder = write(model, tmp_path_factory.mktemp(name), make_tokenizer())
        loaded[name] = load_subject(str(folder))
    reload_in_fresh_process([subject.saved for subject in loaded.values()])
    return loaded


@pytest.mark.parametrize("name", [*PRESETS, *FOREIGN])
def test_nothing_fails_and_only_what_is_not_declared_is_skipped(subjects, name):
    assert Path(subjects[name].folder.name, "record.json").is_file()
    outcomes = {outcome.name: outcome for outcome in examine(subjects[name])}
    assert list(outcomes) == [check.name for check in CHECKS]
    assert names(outcomes, "fail") == set(), [outcomes[name] for name in names(outcomes, "fail")]
    assert names(outcomes, "skip") == SKIPPED.get(name, NO_BEGINNING)
    assert not Path(subjects[name].folder.name).exists()
