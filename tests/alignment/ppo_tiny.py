"""Tiny policies of two foreign architectures, a word tokenizer, and rewards that can be learnt in a few steps."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)

from hf_scratch_gpt.alignment.ppo import PPOConfig, PPOTrainer

PAD, END, BEGIN = 0, 1, 2
VOCABULARY = {"<pad>": PAD, "<end>": END, "<begin>": BEGIN, **{f"w{number}": number + 3 for number in range(53)}}
CHATML = (
    "{% for m in messages %}{{ '<begin> ' + m.role + ' ' }}"
    "{% generation %}{{ m.content + ' <end>' }}{% endgeneration %}{{ ' w52 ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<begin> assistant ' }}{% endif %}"
)
PROMPTS = [{"prompt": f"w{n} w{n + 1} w{n + 2}" if n % 2 else f"w{n}", "number": n} for n in range(24)]


def make_tokenizer(chat=False):
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", bos_token="<begin>"
    )
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def llama_config(**options):
    return LlamaConfig(
        **{
            "vocab_size": 64,  # 8 rows more than the tokenizer has tokens
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32,
            "attention_dropout": 0.3,
            "pad_token_id": PAD,
            "eos_token_id": END,
            **options,
        }
    )


def make_llama(seed=0):
    set_seed(seed)
    return LlamaForCausalLM(llama_config()).eval()


def make_gpt2(seed=0):
    set_seed(seed)
    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, eos_token_id=END)
    return GPT2LMHeadModel(config).eval()


def make_reward_model(seed=1, **options):
    set_seed(seed)
    model = LlamaForSequenceClassification(llama_config(num_labels=1, **options))
    model.score.weight.data.mul_(20)
    return model.eval()


def likes_low(prompts, completions, **columns):
    """The share of a completion's words that have a number below 20."""
    words = [[int(word[1:]) for word in text.split()] for text in completions]
    return [sum(number < 20 for number in numbers) / max(1, len(numbers)) for numbers in words]


def make_trainer(folder, model=None, reward=likes_low, peft=False, rows=None, tokenizer=None, given=None, **options):
    """A trainer; `options` are settings, and `given` what `PPOTrainer` itself takes besides."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "rollout_batch_size": 16,
        "per_device_train_batch_size": 4,
        "num_ppo_epochs": 2,
        "max_steps": 8,
        "max_new_tokens": 6,
        "learning_rate": 3e-3,
        "critic": "shared",
        **options,
    }
    peft_config = None
    if peft:
        from peft import LoraConfig

        peft_config = LoraConfig(r=4, target_modules="all-linear")
    trainer = PPOTrainer(
        model if model is not None else make_llama(),
        reward,
        PPOConfig(**settings),
        PROMPTS if rows is None else rows,
        processing_class=tokenizer or make_tokenizer(),
        peft_config=peft_config,
        **(given or {}),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def parameters_of(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
