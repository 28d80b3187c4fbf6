"""Stands in for the generation mixin, which the source distribution leaves out: the model mixin asks for it by name."""


class GenerationTesterMixin:
    """No test: `tests/model/test_model_generation.py` has ours."""
