"""`scratch-gpt doctor --template`: each planted fault fails its own line and no other; good templates pass."""

import json

import pytest
from doctor_tiny import make_tokenizer, names
from template_faults import FAULTS, earlier_answers_shortened

from hf_scratch_gpt.cli import main
from hf_scratch_gpt.hub.doctor import checks_chat
from hf_scratch_gpt.hub.doctor.main import examine_template
from hf_scratch_gpt.hub.doctor.template import CHECKS, TemplateSubject

# ChatML as many models on the Hub have it: no marks and no tools, and a system message only if there is one.
PLAIN_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def outcomes_of(tokenizer):
    outcomes = examine_template(TemplateSubject(tokenizer, {tokenizer.eos_token_id}))
    return {outcome.name: outcome for outcome in outcomes}


def test_our_template_passes_every_check():
    outcomes = outcomes_of(make_tokenizer())
    assert list(outcomes) == [check.name for check in CHECKS]
    assert names(outcomes, "fail") == set(), outcomes
    assert names(outcomes, "skip") == {"chat-bos"}


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_fails_its_own_line_and_no_other(plant):
    tokenizer = make_tokenizer()
    plant(tokenizer)
    outcomes = outcomes_of(tokenizer)
    assert names(outcomes, "fail") == {FAULTS[plant]}, [outcomes[name] for name in names(outcomes, "fail")]
    assert outcomes[FAULTS[plant]].remedy


def test_there_are_at_least_eight_kinds_and_every_check_finds_one():
    by_the_encoder = "chat-control-tokens"  # whatever the template: the next test plants a fault in the encoder
    assert set(FAULTS.values()) | {by_the_encoder} == {check.name for check in CHECKS}
    assert len(FAULTS) >= 8


def test_an_encoder_that_trusts_the_user_is_seen(monkeypatch):
    def encode_rendered_text(tokenizer, messages, **settings):
        encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **settings)
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    monkeypatch.setattr(checks_chat, "encode_conversation", encode_rendered_text)
    assert names(outcomes_of(make_tokenizer()), "fail") == {"chat-control-tokens"}


def test_answers_that_change_when_the_conversation_goes_on_are_shown():
    tokenizer = make_tokenizer()
    earlier_answers_shortened(tokenizer)
    told = outcomes_of(tokenizer)["chat-prefix-stable"]
    assert told.status == "fail"
    assert "of 3 messages becomes" in told.measured


def test_what_a_template_writes_before_the_answer_itself_may_be_trained_but_not_the_prompt():
    """TRL's training templates: Qwen3's has an empty thought there, Qwen2.5's the line break that ends the prompt."""
    tokenizer = make_tokenizer()
    opening = "{{ '<|im_start|>assistant\\n' }}\n{%- generation -%}"
    assert tokenizer.chat_template.count(opening) == 1
    usual = tokenizer.chat_template
    tokenizer.chat_template = usual.replace(opening, opening + "{{ '<think></think>' -}}")
    assert names(outcomes_of(tokenizer), "fail") == set()
    tokenizer.chat_template = usual.replace(opening, "{{ '<|im_start|>assistant' }}\n{%- generation -%}{{ '\\n' -}}")
    outcomes = outcomes_of(tokenizer)
    assert names(outcomes, "fail") == {"chat-trained-mask"}
    assert outcomes["chat-trained-mask"].measured == "trained before the answer: '\\n'"


def test_a_template_that_takes_arguments_as_text_passes():
    tokenizer = make_tokenizer()
    old = "(call.arguments if call.arguments is string else call.arguments | tojson)"
    assert old in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(old, "call.arguments")
    assert names(outcomes_of(tokenizer), "fail") == set()


def test_a_template_without_marks_or_tools_lacks_only_the_marks():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = PLAIN_CHATML
    outcomes = outcomes_of(tokenizer)
    assert names(outcomes, "fail") == {"chat-mask-not-empty"}
    marks = {"chat-trained-mask", "chat-every-turn", "chat-user-untrained"}
    assert names(outcomes, "skip") == {"chat-bos", "chat-tools"} | marks


def test_a_folder_and_a_file_are_checked_from_the_command_line(tmp_path, capsys):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "good")
    assert main(["doctor", "--template", str(tmp_path / "good")]) == 0
    *lines, summary = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == [check.name for check in CHECKS]
    assert f"{tmp_path / 'good'}: {len(CHECKS) - 1} passed, 0 failed, 1 skipped" in summary

    (tmp_path / "plain.jinja").write_text(PLAIN_CHATML, encoding="utf-8")
    file = ["--template", str(tmp_path / "plain.jinja"), "--tokenizer", str(tmp_path / "good")]
    assert main(["doctor", *file, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["model"], report["fail"]) == (str(tmp_path / "plain.jinja"), 1)
    assert main(["doctor", "--template", str(tmp_path / "good" / "chat_template.jinja")]) == 0


def test_generation_may_stop_elsewhere_than_at_the_tokenizers_end(tmp_path, capsys):
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [0]}', encoding="utf-8")
    assert main(["doctor", "--template", str(tmp_path)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert [line.split()[1] for line in failed] == ["chat-end-token"]


def write_cases(folder):
    make_tokenizer().save_pretrained(folder / "good")
    bare = make_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(folder / "bare")
    (folder / "nothing").mkdir()
    (folder / "alone.jinja").write_text(PLAIN_CHATML, encoding="utf-8")
    (folder / "broken.jinja").write_text("{{ messages }}\n{% if %}", encoding="utf-8")
    (folder / "latin.jinja").write_bytes(b"caf\xe9")


MISTAKES = {
    ("--template", "bare"): "bare: the tokenizer has no chat template",
    ("--template", "nothing"): "nothing: has no fast tokenizer",
    ("--template", "./nowhere"): "./nowhere: no such folder",
    ("--template", "nowhere.jinja", "--tokenizer", "good"): "nowhere.jinja: no such file",
    ("--template", "alone.jinja"): "alone.jinja: no tokenizer beside it; name one with --tokenizer FOLDER",
    ("--template", "alone.jinja", "--tokenizer", "latin.jinja"): "latin.jinja: expected the folder of a tokenizer",
    ("--template", "broken.jinja", "--tokenizer", "good"): "broken.jinja, line 2 of the chat template: Expected an",
    ("--template", "latin.jinja", "--tokenizer", "good"): "latin.jinja: not UTF-8 at byte 3",
    ("--template", "good", "--tokenizer", "good"): "good: a folder has its own tokenizer",
    ("good", "--tokenizer", "good"): "--tokenizer goes with --template",
    ("good", "--template", "good"): "name one thing to check",
    (): "name one thing to check",
}


@pytest.mark.parametrize("arguments", MISTAKES, ids=lambda arguments: " ".join(arguments) or "nothing")
def test_what_cannot_be_checked_is_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments):
    write_cases(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert MISTAKES[arguments] in line
