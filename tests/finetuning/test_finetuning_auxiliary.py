"""The auxiliary loss is GPT-1's: L2 + λ L1, as computed by hand from the two models' own outputs."""

import pytest
import torch
from classify_tiny import make_bert, make_llama, make_texts, write_recipe, write_texts
from finetuning_tiny import make_base
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from hf_scratch_gpt.finetuning import auxiliary, classify
from hf_scratch_gpt.finetuning.auxiliary import AuxiliaryLanguageModel
from hf_scratch_gpt.runs import parse_arguments

MAKERS = {"tied": make_base, "untied": make_llama}
ROWS = [[5, 9, 7, 8, 3], [6, 4], [9, 9, 9, 2, 7, 8, 11], [12]]
LABELS = [0, 1, 1, 0]


@pytest.fixture(scope="module", params=MAKERS)
def base(request, tmp_path_factory):
    return MAKERS[request.param](tmp_path_factory.mktemp("models") / request.param)


def make_trainer(base, folder, weight, **settings):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    model.config.pad_token_id = AutoTokenizer.from_pretrained(base).pad_token_id
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-1, 1, model.score.weight.numel()).view_as(model.score.weight))
    import datasets

    data = datasets.Dataset.from_dict({"input_ids": ROWS, "labels": LABELS, "length": [len(row) for row in ROWS]})
    return classify.ClassificationTrainer(
        model=model,
        args=TrainingArguments(str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **settings),
        train_dataset=data,
        data_collator=lambda rows: classify.collate(rows, model.config.pad_token_id),
        auxiliary=AuxiliaryLanguageModel(model, str(base)) if weight else None,
        aux_lm_weight=weight,
    )


def batch_of(trainer, rows=range(4)):
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])


@pytest.mark.parametrize("chunk", [1024, 3])
def test_the_loss_is_the_sum_by_hand_of_both_models_on_each_text_alone(base, tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(auxiliary, "_CHUNK_TOKENS", chunk)
    trainer = make_trainer(base, tmp_path, 0.5)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch_of(trainer))
    language_model = AutoModelForCausalLM.from_pretrained(base)
    by_hand = 0.0
    for row, label in zip(ROWS, LABELS, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            by_hand -= trainer.model(input_ids=ids).logits.log_softmax(-1)[0, label].item()
            log_probabilities = language_model(input_ids=ids).logits.log_softmax(-1)
        told = [-log_probabilities[0, place, row[place + 1]].item() for place in range(len(row) - 1)]
        by_hand += 0.5 * sum(told) / max(len(told), 1)
    assert loss.item() == pytest.approx(by_hand / len(ROWS), rel=1e-5)


def test_without_weight_and_outside_of_training_it_is_the_models_own_loss(base, tmp_path):
    for weight in (0.0, 0.5):
        trainer = make_trainer(base, tmp_path, weight)
        trainer.model.train(weight == 0)
        batch = batch_of(trainer)
        assert torch.allclose(trainer.compute_loss(trainer.model, dict(batch)), trainer.model(**batch).loss)


def test_its_gradients_are_those_of_the_sum(base, tmp_path):
    trainer = make_trainer(base, tmp_path, 0.5)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch_of(trainer)).backward()
    found = trainer.model.model.layers[0].mlp.up_proj.weight.grad
    plain = make_trainer(base, tmp_path, 0.0)
    plain.compute_loss(plain.model.train(), batch_of(plain)).backward()
    language_model = AutoModelForCausalLM.from_pretrained(base)
    for row in ROWS[:3]:
        ids = torch.tensor([row])
        (language_model(input_ids=ids, labels=ids).loss * 0.5 / len(ROWS)).backward()
    expected = (
        plain.model.model.layers[0].mlp.up_proj.weight.grad + language_model.model.layers[0].mlp.up_proj.weight.grad
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_four_batches_of_one_make_the_gradient_of_one_batch_of_four(base, tmp_path):
    weights = []
    for size in (4, 1):
        folder = tmp_path / str(size)
        trainer = make_trainer(
            base,
            folder,
            0.5,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_steps=2,
            learning_rate=0.1,
            optim="sgd",
            save_strategy="no",
        )
        trainer.train()
        weights.append({name: value.detach() for name, value in trainer.model.named_parameters()})
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6)


def test_the_head_is_trained_beside_the_classifier_and_saved_nowhere(base, tmp_path):
    data = write_texts(tmp_path / "a.tsv", make_texts(30))
    folders = {}
    for weight in (0.0, 0.5):
        recipe = write_recipe(tmp_path / f"run-{weight}", base, data, max_steps=3, aux_lm_weight=weight)
        folders[weight] = load_file(classify.run(parse_arguments(classify.Arguments, [recipe])) / "model.safetensors")
    assert folders[0.0].keys() == folders[0.5].keys()
    assert not any("auxiliary" in name or "lm_head" in name for name in folders[0.5])
    assert not torch.equal(folders[0.0]["model.embed_tokens.weight"], folders[0.5]["model.embed_tokens.weight"])


def test_beside_adapters_the_head_stays_as_it_is(base, tmp_path):
    data = write_texts(tmp_path / "a.tsv", make_texts(30))
    recipe = write_recipe(tmp_path / "run", base, data, max_steps=2, aux_lm_weight=0.5, peft="lora", lora_r=4)
    folder = classify.run(parse_arguments(classify.Arguments, [recipe]))
    old, new = load_file(base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert torch.equal(old["model.embed_tokens.weight"], new["model.embed_tokens.weight"])
    assert not torch.equal(old["model.layers.0.mlp.up_proj.weight"], new["model.layers.0.mlp.up_proj.weight"])


def test_models_without_a_language_models_head_are_refused(tmp_path):
    data = write_texts(tmp_path / "a.tsv", make_texts(30))

    def train(name, base, **settings):
        recipe = write_recipe(tmp_path / name, base, data, max_steps=1, **settings)
        return classify.run(parse_arguments(classify.Arguments, [recipe]))

    bert = make_bert(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"aux_lm_weight needs a causal language model: .*BertForMaskedLM"):
        train("bert-run", bert, aux_lm_weight=0.5)
    classifier = train("first", make_llama(tmp_path / "llama"))
    with pytest.raises(ValueError, match=r"needs a causal language model: .*first: is a LlamaForSequenceClass"):
        train("second", classifier, aux_lm_weight=0.5)
