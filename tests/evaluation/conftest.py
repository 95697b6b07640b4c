"""What the tests of lm-eval share."""

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny checkpoint, its plain twin and the tasks; imported here, as lm-eval may be missing."""
    from tests.fixtures.lm_eval_tasks import write_folders

    return write_folders(tmp_path_factory.mktemp("lm_eval"))


@pytest.fixture(scope="session")
def evaluate(folders):
    """A function that runs lm-eval over `folders`."""
    from tests.fixtures.lm_eval_tasks import evaluator

    return evaluator(folders)


@pytest.fixture(scope="session")
def plain(folders, evaluate):
    """What `hf` answers with the plain twin."""
    return evaluate("hf", pretrained=str(folders / "plain"))[1]
