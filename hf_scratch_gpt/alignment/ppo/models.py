"""The policy and its critic as one module, so that one optimizer, one clip and one wrapper serve both."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from hf_scratch_gpt.alignment.ppo.pretraining_mix import next_token_loss
from hf_scratch_gpt.runs.loading import loading

VALUE_FOLDER = "value_model"


class ValueHead(nn.Linear):
    """A zero-initialised scalar head, so that the first values are 0 and the first advantages are the returns."""

    def __init__(self, hidden_size: int):
        super().__init__(hidden_size, 1)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class PolicyWithCritic(nn.Module):
    """A causal LM `policy` and a `critic`: a token classifier with one label, or a [`ValueHead`] on its trunk."""

    def __init__(self, policy: Any, critic: nn.Module):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.is_shared = isinstance(critic, ValueHead)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        response_length: int,
        windows: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits (B, T, V) that predict the last T = `response_length` tokens, and the values (B, T) before them.

        With `windows` of pretraining text also the policy's mean loss on them: in the same call, because wrappers for
        several processes allow one a step.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        logits, hidden = response_logits(self.policy, inputs, response_length, with_hidden=self.is_shared)
        if hidden is not None:
            values = self.critic(hidden.to(self.critic.weight.dtype)).squeeze(-1)
        else:
            values = self.critic(**inputs).logits[:, -response_length - 1 : -1, 0]
        return logits, values.float(), None if windows is None else next_token_loss(self.policy, windows)

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """What `activation_checkpointing_enable` does, under the name that models have for it."""
        self.activation_checkpointing_enable(**kwargs)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Trade time for memory in policy and critic; the Trainer calls it."""
        for model in (self.policy,) if self.is_shared else (self.policy, self.critic):
            model.activation_checkpointing_enable(**kwargs)


def keeps_logits(model: Any) -> bool:
    """Whether the model's forward can compute the logits of the last positions only."""
    import inspect

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(base.forward).parameters


def response_logits(
    policy: Any, inputs: dict[str, Tensor], response_length: int, with_hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits (B, T, V) that predict the last T tokens, and the trunk's last hidden states there, if asked for."""
    keep = {"logits_to_keep": response_length + 1} if keeps_logits(policy) else {}
    output = policy(**inputs, **keep, use_cache=False, output_hidden_states=with_hidden)
    window = slice(-response_length - 1, -1)
    return output.logits[:, window], output.hidden_states[-1][:, window] if with_hidden else None


def disable_dropout(model: nn.Module) -> None:
    """Switch off every dropout: modules, and rates that attention layers hold as plain numbers."""
    for module in model.modules():
        kind = type(module).__name__
        for name, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in name or (name == "p" and "Dropout" in kind)):
                setattr(module, name, 0.0)


def is_peft(model: Any) -> bool:
    """Whether `model` is a PEFT model, whose adapter can be switched off."""
    from peft import PeftModel

    return isinstance(model, PeftModel)


def build_critic(policy: Any, kind: str, source: Any = None) -> nn.Module:
    """A critic of the given `kind` for `policy`.

    A separate critic takes the trunk of `source` (a sequence classifier, or any model of the library) or, without
    one, of the policy as it is now.

    Raises:
        ValueError: if the library has no token classifier for the model's architecture.
    """
    base = policy.get_base_model() if is_peft(policy) else policy
    if kind == "shared":
        return ValueHead(base.get_output_embeddings().weight.shape[-1]).to(base.device)
    source = base if source is None else source
    settings = {name: value for name, value in source.config.to_dict().items() if name not in ("id2label", "label2id")}
    config = type(source.config).from_dict({**settings, "num_labels": 1})
    try:
        critic = AutoModelForTokenClassification.from_config(config)
    except ValueError as error:
        raise ValueError(
            f"no token classifier exists for {type(source).__name__}, which critic: separate needs; use shared"
        ) from error
    _copy_trunk(source, critic)
    head = [module for module in critic.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.zeros_(head.weight)
    if head.bias is not None:
        nn.init.zeros_(head.bias)
    return critic.to(source.device, source.dtype)


def _copy_trunk(source: Any, critic: Any) -> None:
    """Copy the weights of the trunk; adapter layers that wrap them are read through, at their frozen weights."""
    trunk = getattr(source, source.base_model_prefix)
    weights = {name.replace(".base_layer.", "."): value for name, value in trunk.state_dict().items()}
    target = getattr(critic, critic.base_model_prefix)
    missing = target.load_state_dict(
        {k: v for k, v in weights.items() if ".lora_" not in k}, strict=False
    ).missing_keys
    assert not missing, f"the critic's trunk has weights that {type(source).__name__} lacks: {missing[:3]}"


def save_critic(critic: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Save to `folder`: a separate critic as a token classifier of the library, a value head as one small file."""
    if not isinstance(critic, ValueHead):
        critic.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in critic.state_dict().items()}, folder / "value_head.safetensors"
    )
    description = {"critic": "shared", "hidden_size": critic.in_features}
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load_critic(critic: nn.Module, folder: Path) -> None:
    """Load what `save_critic` wrote into `critic`.

    Raises:
        ValueError: if the folder holds the other kind of critic.
    """
    is_head = (folder / "value_head.safetensors").is_file()
    if is_head != isinstance(critic, ValueHead):
        found, expected = ("shared", "separate") if is_head else ("separate", "shared")
        raise ValueError(f"{folder}: holds a {found} critic, but the settings say critic: {expected}")
    if is_head:
        critic.load_state_dict(load_file(folder / "value_head.safetensors"))
    else:
        _load_pretrained(critic, folder)


def load_value_model(value_model: Any) -> Any:
    """A critic from an object or a folder: a token classifier with one label, in fp32.

    Raises:
        OSError, ValueError: if the folder cannot be loaded, or the classifier has other labels.
    """
    if isinstance(value_model, str | Path):
        import hf_scratch_gpt.model  # noqa: F401  # registers our classes with the Auto classes

        with loading(value_model, "model"):
            value_model = AutoModelForTokenClassification.from_pretrained(
                value_model, dtype=torch.float32, use_safetensors=True
            )
    config = getattr(value_model, "config", None)
    if config is not None and config.num_labels != 1:
        raise ValueError(f"the value model has {config.num_labels} labels, expected 1 (num_labels=1)")
    return value_model


def _load_pretrained(model: Any, folder: Path) -> None:
    """Load through `from_pretrained`, which knows shards, tied weights and renamed keys."""
    saved = type(model).from_pretrained(folder, dtype=model.dtype)
    model.load_state_dict(saved.state_dict())


def load_policy(policy: Any, folder: Path) -> None:
    """Load a checkpoint's policy, or its adapter, into `policy`."""
    if not is_peft(policy):
        return _load_pretrained(policy, folder)
    from peft import load_peft_weights, set_peft_model_state_dict

    weights = load_peft_weights(str(folder), device=str(policy.device))
    result = set_peft_model_state_dict(policy, weights, adapter_name=policy.active_adapter)
    if result.unexpected_keys:
        raise ValueError(f"{folder}: not this policy's adapter (it has {result.unexpected_keys[0]})")


def load_policy_model(model: Any, peft_config: Any) -> Any:
    """The policy from an object or a folder, in fp32, with an adapter if `peft_config` asks for one."""
    if isinstance(model, str | Path):
        import hf_scratch_gpt.model  # noqa: F401  # registers our classes with the Auto classes

        with loading(model, "model"):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, use_safetensors=True)
    if peft_config is not None and not is_peft(model):
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    return model
