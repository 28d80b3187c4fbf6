"""`scratch-gpt doctor`: its report, its exit status, and what users get wrong."""

import json
import shutil

import pytest
import torch
from doctor_tiny import make_tokenizer, names, outcomes_of, shrunk, write, write_with_code

from hf_scratch_gpt.cli import main
from hf_scratch_gpt.hub.doctor.checks_forward import trl_logit_scale
from hf_scratch_gpt.hub.doctor.checks_tokenizer import random_texts
from hf_scratch_gpt.hub.doctor.main import CHECKS
from hf_scratch_gpt.hub.doctor.outcome import TOLERANCE, Check, Finding, Skipped, compare


@pytest.fixture
def _in_this_process(monkeypatch):
    """The saved copy is loaded by a call, which another test shows to be what a fresh process runs."""
    from hf_scratch_gpt.hub.doctor import reload, subject

    def reload_here(folders, trust_remote_code=False):
        for folder in folders:
            reload.reload(folder, trust_remote_code)

    monkeypatch.setattr(subject, "reload_in_fresh_process", reload_here)


@pytest.mark.usefixtures("_in_this_process")
def test_one_line_a_check_and_status_0_where_nothing_fails(tmp_path, capsys):
    write(shrunk("modern-5m"), tmp_path, make_tokenizer())
    assert main(["doctor", str(tmp_path)]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [check.name for check in CHECKS]
    assert {line.split()[0] for line in lines} == {"pass", "skip"}
    assert f"{tmp_path}: {len(CHECKS) - 1} passed, 0 failed, 1 skipped" in summary


@pytest.mark.usefixtures("_in_this_process")
def test_a_failure_is_status_1_and_json_tells_what_to_do(tmp_path, capsys):
    model = shrunk("modern-5m")
    model.generation_config.pad_token_id = model.generation_config.eos_token_id
    write(model, tmp_path)
    assert main(["doctor", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    failed = [check for check in report["checks"] if check["status"] == "fail"]
    assert report["fail"] == len(failed) == 1
    assert report["pass"] + report["skip"] == len(CHECKS) - 1
    assert failed[0]["name"] == "generation-config"
    assert "is an end token" in failed[0]["measured"]
    assert failed[0]["remedy"]
    assert main(["doctor", str(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert "Remedy: " in line


def test_without_tokenizer_or_template_the_rest_is_skipped_with_the_reason(tmp_path):
    write(shrunk("gpt2-124m"), tmp_path)
    outcomes = outcomes_of(tmp_path)
    assert names(outcomes, "fail") == set()
    chat = {check.name for check in CHECKS if check.name.startswith("chat-")}
    tokens = {"tokenizer-loads", "tokenizer-round-trip", "token-ids", "special-tokens"}
    assert names(outcomes, "skip") == chat | tokens
    assert {outcomes[name].measured for name in chat | tokens} == {"the folder has no tokenizer"}

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    outcomes = outcomes_of(tmp_path)
    assert names(outcomes, "fail") == set()
    assert names(outcomes, "skip") == chat
    assert {outcomes[name].measured for name in chat} == {"the tokenizer has no chat template"}


def _model(folder):
    return write(shrunk("modern-5m"), folder)


def _nothing(folder):
    return folder / "missing"


def _file(folder):
    path = folder / "notes.txt"
    path.write_text("x", encoding="utf-8")
    return path


def _adapter(folder):
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    return folder


def _custom_code(folder):
    return write_with_code(folder / "model", {})


def _encoder(folder):
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return write(BertForMaskedLM(BertConfig(vocab_size=32, **sizes)), folder)


def _encoder_decoder(folder):
    (folder / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    return folder


def _other_head(folder):
    _model(folder)
    config = folder / "config.json"
    renamed = config.read_text(encoding="utf-8").replace('ForCausalLM"\n', 'ForSequenceClassification"\n')
    config.write_text(renamed, encoding="utf-8")
    return folder


def _cut_weights(folder):
    path = _model(folder) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return folder


MISTAKES = {
    _nothing: "no such model folder",
    _file: "expected a model folder, found a file",
    lambda folder: folder: "not a model folder (it has no config.json)",
    _adapter: "scratch-gpt merge",
    _custom_code: "give --trust-remote-code",
    _encoder: "holds BertForMaskedLM, expected a causal language model",
    _encoder_decoder: "T5ForConditionalGeneration is no causal language model",
    _other_head: "holds ScratchGPTForSequenceClassification, expected a causal language model",
    _cut_weights: "its weights are damaged",
}


@pytest.mark.parametrize("make", MISTAKES)
def test_what_is_no_model_to_check_is_one_line_with_status_2(make, tmp_path, capsys):
    path = make(tmp_path)
    capsys.readouterr()
    assert main(["doctor", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if "model shards" not in line]
    assert line.startswith(f"scratch-gpt: error: {path}")
    assert MISTAKES[make] in line


def test_the_folder_that_is_checked_stays_as_it_is(tmp_path):
    write(shrunk("modern-5m"), tmp_path / "model", make_tokenizer())
    shutil.copytree(tmp_path / "model", tmp_path / "before")
    outcomes_of(tmp_path / "model")
    for before in (tmp_path / "before").iterdir():
        assert (tmp_path / "model" / before.name).read_bytes() == before.read_bytes()
    assert len(list((tmp_path / "model").iterdir())) == len(list((tmp_path / "before").iterdir()))


def test_the_contract_is_what_trl_itself_computes(tmp_path):
    """TRL's patched forward, on a model with scale and cap under the names that the check reads."""
    from trl.trainer.utils import add_fused_lm_head

    model = shrunk("modern-5m", final_logit_softcapping=0.5).eval()
    input_ids = torch.randint(4, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    expected = {}
    for name, factor in {"logit_scale": 2.0, "logits_scaling": 0.25, "lm_head_multiplier": 3.0}.items():
        setattr(model.config, name, factor)
        scale = trl_logit_scale(model.config)
        expected[name] = scale
        add_fused_lm_head(model)
        with torch.no_grad():
            fused = model(input_ids, labels=input_ids, fused_lm_head=True).log_probs
            hidden = model.base_model(input_ids).last_hidden_state
            logits = 0.5 * torch.tanh(model.get_output_embeddings()(hidden) * scale / 0.5)
        by_hand = logits.log_softmax(-1)[:, :-1].gather(-1, input_ids[:, 1:, None])[..., 0]
        torch.testing.assert_close(fused, by_hand, atol=1e-5, rtol=1e-5)
        del model.forward
        setattr(model.config, name, None)
    assert expected == {"logit_scale": 2.0, "logits_scaling": 4.0, "lm_head_multiplier": 3.0}


def test_a_comparison_knows_shape_numbers_and_scale():
    values = torch.arange(6.0).reshape(2, 3)
    assert compare(values, values, 1.0).passed
    assert compare(values + 0.9 * TOLERANCE * 5, values, 5.0).passed
    assert not compare(values + 1.1 * TOLERANCE * 5, values, 5.0).passed
    assert not compare(values[:, :2], values, 1.0).passed
    assert not compare(values / 0, values, 1.0).passed


def test_what_a_models_code_raises_is_a_failure_and_what_does_not_apply_a_skip():
    def outcome_of(function):
        return Check("name", function, "expected", "remedy").run(None)

    def broken(subject):
        raise KeyError("deep inside\nwith a second line")

    def inapplicable(subject):
        raise Skipped("declares nothing")

    assert outcome_of(broken).status == "fail"
    assert "KeyError" in outcome_of(broken).measured
    assert (outcome_of(inapplicable).status, outcome_of(inapplicable).measured) == ("skip", "declares nothing")
    assert outcome_of(lambda subject: Finding(False, "3 of 4")).measured == "3 of 4"


def test_a_model_whose_forward_breaks_is_reported_and_not_a_traceback(tmp_path):
    folder = write_with_code(
        tmp_path / "model", {"self.dropout(hidden_states)\n        for": "hidden_states[:, 1:]\n        for"}
    )
    outcomes = outcomes_of(folder, trust_remote_code=True)
    assert {"looks-back", "round-trip", "loss", "generate-greedy"} <= names(outcomes, "fail")
    assert "RuntimeError" in outcomes["looks-back"].measured
    assert {"checkpoint-complete", "residual-init"} <= names(outcomes, "pass")


def test_random_texts_are_seeded_and_cover_all_of_unicode():
    assert random_texts() == random_texts()
    characters = set("".join(random_texts()))
    assert not any(0xD800 <= ord(character) <= 0xDFFF for character in characters)
    for low, high in (
        (0, 0x1F),
        (0x20, 0x7E),
        (0x300, 0x36F),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1FAFF),
        (0xE000, 0x10FFFF),
    ):
        assert any(low <= ord(character) <= high for character in characters)
