"""The choice of `pytest -m quick`, the inner loop: every part once, in under 60 seconds in all.

Quick is the first case of every test not marked `slow`, `more`, `gpu` or `apps`, except as listed
here. A new test is quick unless it is added. `pytest -m quick --durations=20` shows which ones take
long.
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
    "native/test_native_operations.py",
    "native/test_native_targets.py",
    "runtime/test_graphs.py",
    "runtime/test_networks.py",
    "studies/test_latency.py",
    "training/test_distributed.py",
]

# Only these tests of files in which most tests train or compile a network.
ONLY = {
    "native/test_native_library.py": ["test_the_digits_network_on_new_inputs"],
    "runtime/test_compile.py": ["test_layers_are_timed", "test_models_that_cannot_be_captured"],
    "studies/test_runner.py": ["test_a_run_in_the_rows_of_an_earlier_study_is_not_trained"],
    "test_check_method.py": ["test_every_method_has_every_property"],
    "test_cli.py": ["test_a_mistake_is_a_one_line_error"],
    "training/test_finetune.py": [
        "test_batch_and_learning_rate_follow_the_size_of_the_data",
        "test_a_mistake_is_one_line_and_leaves_no_folder",
    ],
    "training/test_finetune_page.py": ["test_the_table_of_the_page_is_that_of_the_recipe"],
    "training/test_init.py": ["test_a_run_starts_from_the_given_weights_and_their_sparsity"],
    "training/test_initial_weights.py": [
        "test_pretrained_loads_timms_weights_and_replaces_the_head",
        "test_what_does_not_fit_is_listed",
    ],
    "training/test_own_method.py": ["test_an_own_method_trains_with_its_options"],
    "training/test_predict.py": ["test_the_accuracy_of_the_answers_is_that_of_the_report"],
    "training/test_train_loop.py": ["test_a_run_directory_has_all_its_files"],
}

# All tests of a file but these.
EXCEPT = {
    "analysis/test_stability.py": [
        "test_an_interrupted_and_resumed_run_records_the_same_masks",
        "test_the_figure_of_masks_requires_masks",
    ],
    "conformance/test_methods.py": ["test_st3_finds_the_type_of_a_compiled_layer"],
    "conformance/test_models.py": ["test_a_compiled_optimizer_step_is_sparse_too"],
    "conformance/test_patterns.py": ["test_a_compiled_model_takes_the_same_steps"],
    "conformance/test_probmask.py": ["test_it_finds_the_weights_that_matter"],
    "conformance/test_torch_features.py": [
        "test_a_step_that_is_compiled_whole_takes_the_plain_steps",
        "test_forward_and_loss_compile_to_one_graph_that_stays",
    ],
    "export/test_run_files.py": ["test_the_onnx_file_computes_the_logits_for_any_batch_size"],
    "fuzz/test_fuzz.py": [
        "test_a_run_is_continued_and_its_table_has_the_sums",
        "test_time_of_an_input_is_bounded",
    ],
    "runtime/test_costs.py": ["test_a_shared_weight_has_one_cost"],
    "runtime/test_memory.py": ["test_memory_is_freed_with_its_batch_size"],
    "training/test_weights.py": ["test_a_small_file_cannot_ask_for_much_memory_at_any_door"],
    "selection/test_selection_shards.py": ["test_shards_find_the_global_cutoff"],
    "selection/test_selection_triton.py": [
        "test_kernels_compile_without_a_device",
    ],
    "studies/test_answers.py": ["test_the_same_runs_give_the_same_files"],
    "studies/test_plans.py": [
        "test_masks_are_recorded_by_the_stability_study_only",
        "test_no_two_recipes_share_a_run",
        "test_studies_share_the_runs_that_they_have_in_common",
    ],
    "test_benchmarks.py": [
        "test_a_run_records_every_contestant",
        "test_both_implementations_use_the_same_trainer",
    ],
    "test_learned.py": [
        "test_more_decay_is_more_sparsity_and_nothing_follows_the_target",
        "test_published_str_is_kept_if_training_stops_before_the_exact_count",
        "test_published_str_without_an_exact_count_ends_at_its_learned_sparsity",
        "test_str_controls_half_precision_within_its_ties",
        "test_str_follows_its_schedule_at_every_step",
        "test_str_learns_any_target_sparsity_with_any_optimizer",
        "test_str_controls_the_total_and_the_loss_decides_between_layers",
    ],
    "test_version_0_1.py": [
        "test_a_finished_run_serves_as_start_and_teacher_of_another",
        "test_resuming_a_finished_run_changes_none_of_its_files",
    ],
    "training/test_demo.py": [
        "test_ctrl_c_ends_the_command_cleanly",
        "test_the_sparse_network_is_compiled_and_compared_with_the_dense_baseline",
    ],
    "training/test_deprecated_names.py": ["test_train_accepts_a_watch"],
    "training/test_mistakes.py": [
        "test_held_out_images_are_used_if_there_are_any",
        "test_the_accuracy_is_that_of_evaluate_and_the_json_has_every_image",
    ],
    "training/test_distillation.py": [
        "test_a_resumed_run_is_bitwise_identical_if_its_teacher_has_moved",
        "test_a_run_does_not_resume_with_another_teacher",
        "test_weight_0_is_bitwise_identical_to_training_without_a_teacher",
    ],
}


APPS = "pytestmark = pytest.mark.apps"  # every test of the file trains within another library


def listed() -> list[tuple[str, str]]:
    """File and test of every entry, so that it can be checked; "" is the whole file."""
    tests = [(file, name) for table in (ONLY, EXCEPT) for file in table for name in table[file]]
    return [(file, "") for file in EVERY_CASE + NONE] + tests


def is_quick(file: str, test: str) -> bool:
    if file in NONE or test in EXCEPT.get(file, []):
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
        if other or not is_quick(file, test):
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
