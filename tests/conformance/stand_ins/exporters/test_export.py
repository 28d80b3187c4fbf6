"""Stands in for the export mixin, which the source distribution leaves out: `ModelTesterMixin` inherits from it."""


class ExportTesterMixin:
    """No test: exports to other formats have tests of their own."""
