import copy

import pytest
import torch
from torch import nn

from hf_scratch_gpt.pretraining.optimizers import Muon, make_optimizers, orthogonalize, split_parameters

SHAPES = [(24, 24), (12, 24), (40, 24), (24, 40), (24, 24), (40, 24)]


class TinyModel(nn.Module):
    def __init__(self, tied: bool = True):
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 16)
        self.up_proj = nn.Linear(16, 32, bias=True)
        self.down_proj = nn.Linear(32, 16, bias=False)
        self.norm = nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 50, bias=False)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(ids)
        return self.lm_head(self.norm(hidden + self.down_proj(self.up_proj(hidden).relu())))


def test_muon_equals_torch_muon():
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in ours]
    optimizer = Muon(ours, lr=0.02, momentum=0.95, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, momentum=0.95, weight_decay=0.1, adjust_lr_fn="original")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        # An update is bf16: entries of about 0.2, times 0.02, five times, within bf16's rounding.
        torch.testing.assert_close(a, b, atol=5e-4, rtol=0)


def test_orthogonalized_singular_values_are_near_one():
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, 20, 50)).float())
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_cautious_decay_leaves_entries_that_the_update_grows():
    parameter = nn.Parameter(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    plain = nn.Parameter(parameter.detach().clone())
    gradient = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    for each, cautious in ((parameter, True), (plain, False)):
        each.grad = gradient.clone()
        Muon([each], lr=0.1, weight_decay=1.0, cautious=cautious).step()
    shrunk_only_by_plain = (plain - parameter).abs() > 1e-3
    # The update is subtracted: it shrinks a weight where both have the same sign.
    assert shrunk_only_by_plain.tolist() == [[False, True], [True, True]]


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"found a parameter of shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("tied", [True, False])
def test_each_parameter_is_in_exactly_one_kind(tied):
    model = TinyModel(tied)
    hidden, embeddings, vectors = split_parameters(model)
    assert {id(parameter) for parameter in hidden} == {id(model.up_proj.weight), id(model.down_proj.weight)}
    assert id(model.embed_tokens.weight) in {id(parameter) for parameter in embeddings}
    assert id(model.lm_head.weight) in {id(parameter) for parameter in embeddings}
    assert len(hidden) + len(embeddings) + len(vectors) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_norms_and_biases_are_not_decayed(name):
    model = TinyModel()
    before = copy.deepcopy(model.state_dict())
    optimizers = make_optimizers(model, name, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers.step()
    for key, value in model.state_dict().items():
        is_vector = value.ndim < 2
        assert torch.equal(value, before[key]) == is_vector, key


def test_factor_scales_every_rate_from_the_full_one():
    optimizers = make_optimizers(TinyModel(), "muon", learning_rate=1e-3, muon_learning_rate=0.02)
    optimizers.set_factor(0.1)
    optimizers.set_factor(0.5)
    assert optimizers.learning_rates == pytest.approx({"muon": 0.01, "adamw": 5e-4})


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_optimizer_states_round_trip_bitwise(name):
    torch.manual_seed(1)
    model = TinyModel()
    optimizers = make_optimizers(model, name)

    def train(model, optimizers, steps):
        for _ in range(steps):
            ids = torch.arange(20).view(2, 10)
            nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
            optimizers.step()
            optimizers.zero_grad()

    train(model, optimizers, 3)
    other = TinyModel()
    other.load_state_dict(model.state_dict())
    restored = make_optimizers(other, name)
    restored.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    train(model, optimizers, 3)
    train(other, restored, 3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
