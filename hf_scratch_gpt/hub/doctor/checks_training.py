"""Checks of what training rests on: the loss, its division over accumulated batches, gradients."""

import inspect

import torch

from hf_scratch_gpt.hub.doctor.outcome import Checks, Finding, Skipped, all_of, compare
from hf_scratch_gpt.hub.doctor.subject import Subject

CHECKS = Checks()


def _labels(subject: Subject) -> torch.Tensor:
    """Labels of rows of unequal length: -100 at the start of one, at the end of the other."""
    labels = subject.ids.clone()
    labels[0, :3] = -100
    labels[1, 6:] = -100
    return labels


def _summed_loss(subject: Subject, labels: torch.Tensor) -> tuple[float, int]:
    """Cross entropy of each next token, by hand: its sum in nats and the number of tokens."""
    log_probabilities = subject.reference.log_softmax(-1)[:, :-1]
    targets = labels[:, 1:]
    counted = targets != -100
    chosen = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(chosen * counted).sum().item(), int(counted.sum())


def _loss_is(actual: torch.Tensor, expected: float) -> Finding:
    error = abs(actual.item() - expected) / expected
    return Finding(error <= 1e-4, f"loss {actual.item():.4f}, by hand {expected:.4f}")


@CHECKS.add(
    "loss",
    expected="mean cross entropy of the next token in nats, -100 left out",
    remedy="use self.loss_function(logits=logits, labels=labels, vocab_size=...), which shifts by one itself",
)
def loss(subject: Subject) -> Finding:
    """Whether the loss is the shifted cross entropy over labels that are not -100."""
    findings = []
    for labels in (subject.ids, _labels(subject)):
        total, items = _summed_loss(subject, labels)
        with torch.no_grad():
            findings.append(_loss_is(subject.model(subject.ids, labels=labels).loss, total / items))
    return all_of(*findings)


@CHECKS.add(
    "loss-accumulation",
    expected="losses of unequal micro-batches with num_items_in_batch add up to the whole batch's",
    remedy="take **kwargs in forward() and pass them to self.loss_function; else Trainer averages unequal means",
)
def loss_accumulation(subject: Subject) -> Finding:
    """Whether micro-batches with `num_items_in_batch` add up to the loss of the whole batch."""
    if getattr(subject.model, "accepts_loss_kwargs", True) is False:
        raise Skipped("the model declares accepts_loss_kwargs = False, so Trainer averages the means of micro-batches")
    parameters = inspect.signature(subject.model.forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return Finding(False, "forward() takes no **kwargs, so Trainer sends no num_items_in_batch")
    labels = _labels(subject)
    total, items = _summed_loss(subject, labels)
    with torch.no_grad():
        parts = [
            subject.model(row[None], labels=label[None], num_items_in_batch=torch.tensor(items)).loss
            for row, label in zip(subject.ids, labels, strict=True)
        ]
    return _loss_is(torch.stack(parts).sum(), total / items)


def _gradients(subject: Subject) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # the same dropout
    subject.model(subject.ids, labels=subject.ids, use_cache=False).loss.backward()
    named = subject.model.named_parameters()
    gradients = {name: parameter.grad for name, parameter in named if parameter.grad is not None}
    subject.model.zero_grad(set_to_none=True)
    return gradients


@CHECKS.add(
    "gradient-checkpointing",
    expected="the same gradients with gradient checkpointing, which is really used",
    remedy="let decoder layers inherit GradientCheckpointingLayer, and pass hidden_states by position",
)
def gradient_checkpointing(subject: Subject) -> Finding:
    """Whether gradients with checkpointing equal those without."""
    model = subject.model
    if not model.supports_gradient_checkpointing:
        raise Skipped("the model does not declare supports_gradient_checkpointing")
    state = torch.get_rng_state()
    model.train()
    try:
        plain = _gradients(subject)
        model.activation_checkpointing_enable()
        calls = _count_checkpoints(model)
        checkpointed = _gradients(subject)
    finally:
        model.activation_checkpointing_disable()
        model.zero_grad()
        model.eval()
        torch.set_rng_state(state)
    if not calls:
        return Finding(False, "gradient_checkpointing_enable() checkpoints nothing")
    if plain.keys() != checkpointed.keys():
        return Finding(False, f"other parameters have gradients: {sorted(plain.keys() ^ checkpointed.keys())[:3]}")
    scale = max(gradient.abs().max().item() for gradient in plain.values())
    worst = max(plain, key=lambda name: (checkpointed[name] - plain[name]).abs().max().item())
    return compare(checkpointed[worst], plain[worst], scale, what=f"gradients of {worst}", unit="largest")


def _count_checkpoints(model: torch.nn.Module) -> list[str]:
    """A list that grows by a name with every checkpointed call."""
    calls: list[str] = []
    for name, module in model.named_modules():
        checkpoint = getattr(module, "_gradient_checkpointing_func", None)
        if checkpoint is not None:

            def counted(*arguments, _checkpoint=checkpoint, _name=name, **kwargs):
                calls.append(_name)
                return _checkpoint(*arguments, **kwargs)

            module._gradient_checkpointing_func = counted
    return calls
