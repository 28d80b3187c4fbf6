"""Copies of custom code go to a folder of the test run, not to the user's cache."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def _own_module_cache(tmp_path_factory):
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield
