"""Stands in for the generation mixin, which the source distribution leaves out and the model mixin asks for."""


class GenerationTesterMixin:
    """No test: `tests/model/test_model_generation.py` has ours."""
