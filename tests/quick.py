"""The choice of `pytest -m quick`, the inner loop: every part once, in under 60 seconds in all.

Quick is the first case of every test not marked `slow`, `more`, `gpu` or `apps`, except as listed
here and in `not_quick.txt`. A new test is quick unless it is added.
`pytest -m quick --durations=20` shows which ones take long.
"""

from pathlib import Path

import pytest
from thinned import mark_further_cases

TESTS = Path(__file__).parent

# All cases are quick, not only the first: each is about another file.
EVERY_CASE = ["test_doctests.py"]

# Not quick: no test of these files.
NONE = [
    "examples/test_accelerate.py",
    "examples/test_diffusers.py",
    "examples/test_keras.py",
    "examples/test_lightning.py",
    "examples/test_lightning_gan.py",
    "examples/test_loops.py",
    "examples/test_messages.py",
    "examples/test_peft.py",
    "examples/test_seq2seq.py",
    "examples/test_skorch.py",
    "examples/test_timm.py",
    "examples/test_transformers.py",
    "examples/test_ultralytics.py",
    "export/test_run_files.py",
    "native/test_native_library.py",
    "native/test_native_operations.py",
    "native/test_native_targets.py",
    "native/test_web.py",
    "runtime/test_compile.py",
    "runtime/test_graphs.py",
    "runtime/test_networks.py",
    "studies/test_latency.py",
    "studies/test_runner.py",
    "test_check_method.py",
    "training/test_distributed.py",
    "training/test_init.py",
    "training/test_initial_weights.py",
    "training/test_mistakes.py",
    "training/test_own_method.py",
    "training/test_predict.py",
]

# Only these tests of files in which most tests train or compile a network.
ONLY = {
    "test_cli.py": [
        "test_a_mistake_is_a_one_line_error",
    ],
    "training/test_finetune.py": [
        "test_batch_and_learning_rate_follow_the_size_of_the_data",
        "test_a_mistake_is_one_line_and_leaves_no_folder",
    ],
    "training/test_finetune_page.py": [
        "test_the_table_of_the_page_is_that_of_the_recipe",
    ],
    "training/test_train_loop.py": [
        "test_a_run_directory_has_all_its_files",
    ],
}

# Not quick, because they took 0.1 s or longer (of test_doctests.py, 0.25 s): FILE::TEST, or one
# case, FILE::TEST[CASE].
SLOWER = set((TESTS / "not_quick.txt").read_text().splitlines())


APPS = "pytestmark = pytest.mark.apps"  # every test of the file trains within another library


def listed() -> list[tuple[str, str]]:
    """File and test of every entry, so that it can be checked; "" is the whole file."""
    tests = [(file, name) for file in ONLY for name in ONLY[file]]
    for entry in sorted(SLOWER):
        file, _, name = entry.partition("[")[0].partition("::")
        tests.append((file, name))
    return [(file, "") for file in EVERY_CASE + NONE] + tests


def is_quick(file: str, test: str) -> bool:
    if file in NONE or f"{file}::{test}" in SLOWER:
        return False
    return file not in ONLY or test in ONLY[file]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_further_cases(items)
    seen = set()
    for item in items:
        file = item.path.relative_to(TESTS).as_posix()
        test = getattr(item, "originalname", item.name)
        other = any(map(item.get_closest_marker, ("slow", "more", "gpu", "apps")))
        if other or f"{file}::{item.name}" in SLOWER or not is_quick(file, test):
            continue
        if (file, test) not in seen or file in EVERY_CASE:
            seen.add((file, test))
            item.add_marker(pytest.mark.quick)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import files without a test that is wanted: other libraries take long to load."""
    if collection_path.suffix != ".py" or not collection_path.is_relative_to(TESTS):
        return None
    wanted = config.option.markexpr
    none_quick = wanted == "quick" and collection_path.relative_to(TESTS).as_posix() in NONE
    none_at_all = "not apps" in wanted and APPS in collection_path.read_text().splitlines()
    return True if none_quick or none_at_all else None
