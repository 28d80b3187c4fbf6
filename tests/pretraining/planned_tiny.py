"""Tiny configs of every kind of layer, and what a training step of them really keeps; shared by the tests of plans."""

import torch
from torch.profiler import ProfilerActivity, profile

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.pretraining.optimizers import make_optimizers
from hf_scratch_gpt.pretraining.setup import LanguageModelLoss, use_fast_attention

TINY = {
    **{"vocab_size": 100, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4},
    **{"num_hidden_layers": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": None},
}


def tiny_config(preset, **overrides):
    grouped = {"num_key_value_heads": 2} if preset.startswith("modern") else {}
    return ScratchGPTConfig.from_preset(preset, **{**TINY, **grouped, **overrides})


def make_loss_module(config, setup):
    torch.manual_seed(0)
    model = ScratchGPTForCausalLM(config).train()
    if setup.checkpointing:
        model.activation_checkpointing_enable()
    use_fast_attention(model, setup.device)
    return LanguageModelLoss(model, setup.bf16)


def positions(setup):
    """Two documents in each sequence, or none told apart."""
    if not setup.packed:
        return None
    half = setup.sequence_length // 2
    return torch.cat([torch.arange(half), torch.arange(setup.sequence_length - half)]).repeat(setup.micro_batch, 1)


def tokens(config, setup):
    return torch.randint(config.vocab_size, (setup.micro_batch, setup.sequence_length))


def really_saved(module, config, setup):
    """Bytes that autograd keeps of a forward pass, each storage once and parameters aside."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept, alive = {}, []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and storage.nbytes() > 8:  # the count of targets is a scalar
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or a later tensor could take its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = module(tokens(config, setup), positions(setup))
    del loss
    return sum(kept.values())


def really_peaks(config, setup):
    """Bytes of tensors at the peak of the second optimizer step, as torch's allocator tells its profiler."""
    module = make_loss_module(config, setup)
    optimizers = make_optimizers(module.model, setup.optimizer)

    def step():
        for _ in range(2 if setup.accumulates else 1):
            module(tokens(config, setup), positions(setup)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizers.step()
        optimizers.zero_grad()

    step()
    states = [value for part in optimizers.parts for state in part.state.values() for value in state.values()]
    now = highest = sum(tensor.nbytes for tensor in [*module.parameters(), *states])
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest
