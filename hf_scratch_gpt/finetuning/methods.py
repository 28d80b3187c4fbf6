"""What `--peft METHOD` makes of a model: the method's PEFT config, its start, and whether it can be merged.

| method | trains | ends as |
| --- | --- | --- |
| `none` | all weights | a plain model |
| `lora`, `dora` | low-rank updates (arXiv:2106.09685), with magnitudes of their own (arXiv:2402.09353) | merged |
| `qlora` | the same on a base in 4 bits (arXiv:2305.14314) | merged into the base as it was before |
| `prefix` | keys and values before every text (arXiv:2101.00190) | an adapter folder |
| `adapter` | a bottleneck behind each sublayer (arXiv:1902.00751) | an adapter folder |
"""

import importlib.util
from typing import Any

import torch
from transformers import DynamicCache

from hf_scratch_gpt.finetuning.arguments import make_lora_config
from hf_scratch_gpt.model.cache_name import cache_argument, cache_of


def check_method(arguments: Any) -> None:
    """Refuse a method that this machine or the other settings do not allow.

    Raises:
        ValueError: naming the setting and what to do.
    """
    if arguments.peft == "qlora":
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("'peft' is 'qlora', which needs bitsandbytes: pip install bitsandbytes, or use lora")
        if arguments.use_cpu or not torch.cuda.is_available():
            raise ValueError("'peft' is 'qlora', which needs a GPU, and there is none; use lora")
    if arguments.peft == "prefix":
        if arguments.gradient_checkpointing:
            raise ValueError("'gradient_checkpointing' is on, but prefix tuning goes through the cache; turn it off")
        if arguments.lora_modules_to_save:
            raise ValueError("'lora_modules_to_save' is set, but prefix tuning trains the prefix alone; leave it out")


def make_peft_config(arguments: Any, model: Any, control_tokens: list[int]) -> Any:
    """The PEFT config of `sft`'s settings, or `None` for `peft: none`.

    `control_tokens` are rows of the embedding that are trained too; a prefix leaves the model as it is.

    Raises:
        ValueError: as `make_lora_config`, for a method's own modules too.
    """
    lora = make_lora_config(arguments, "CAUSAL_LM", model)  # checks the names of modules, whatever the method
    if arguments.peft == "prefix":
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=arguments.prefix_tokens)
    if arguments.peft == "adapter":
        from hf_scratch_gpt.model.bottleneck_adapters import RESIDUAL_PROJECTIONS, BottleneckConfig

        targets = list(arguments.lora_target_modules)
        targets = list(RESIDUAL_PROJECTIONS) if targets == ["all-linear"] else targets
        if not any(name.rpartition(".")[2] in targets for name, _ in model.named_modules()):
            raise ValueError(
                f"'lora_target_modules': the model has none of the modules {', '.join(targets)}; name those that "
                "write to its residual stream"
            )
        return BottleneckConfig(
            task_type="CAUSAL_LM",
            bottleneck_size=arguments.adapter_size,
            target_modules=targets,
            modules_to_save=lora.modules_to_save,
            trainable_token_indices=control_tokens or None,
        )
    if lora is not None:
        lora.trainable_token_indices = control_tokens or None
    return lora


def quantization_settings(arguments: Any) -> dict[str, Any]:
    """What `from_pretrained` is told for `qlora`: 4-bit NormalFloat, constants quantised too, products in bf16."""
    if arguments.peft != "qlora":
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def prepare_quantized(model: Any, arguments: Any) -> Any:
    """A model in 4 bits, with norms and embedding in fp32, whose input gets gradients where it is recomputed."""
    from peft import prepare_model_for_kbit_training

    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=bool(arguments.gradient_checkpointing))


@torch.no_grad()
def initialise_prefix(model: Any, token_ids: list[int]) -> None:
    """Let a tuned prefix start as the keys and values of real tokens, repeated until there are enough.

    Random ones cost much of what a small data set can teach (Li & Liang 2021, section 7.4).
    """
    config = model.active_peft_config
    count = config.num_virtual_tokens
    ids = torch.tensor([(token_ids * count)[:count]], device=model.device)
    base, was_training = model.get_base_model(), model.training
    base.eval()
    # Of layers with a window too PEFT's cache holds all of the prefix, so ask for a plain one.
    cache = cache_of(base(input_ids=ids, use_cache=True, **{cache_argument(base): DynamicCache()}))
    base.train(was_training)
    # PEFT's layout: (virtual tokens, layers x (key, value) x heads x head_dim)
    parts = [part[0].transpose(0, 1) for layer in cache.layers for part in (layer.keys, layer.values)]
    model.prompt_encoder[model.active_adapter].load_prompt_embeddings(torch.stack(parts, 1).reshape(count, -1).float())
