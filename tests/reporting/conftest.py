"""A whole road, all stages finished, for the reporting tests."""

import pytest
from reporting_road import write_evaluation, write_training


@pytest.fixture
def road(tmp_path):
    """Folder of a whole road, all stages finished."""
    write_training(tmp_path)
    write_evaluation(tmp_path)
    return tmp_path
