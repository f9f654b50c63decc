"""Tests with many similar cases, of which the suite runs every n-th; the others are marked `more`.

`pytest -m more` runs those, as a nightly workflow does. A table, because the cases to leave out are
chosen by their time alone: `pytest -n auto --durations=50` shows which tests take long.
"""

from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

EVERY = {
    "conformance/test_capture.py": {
        "test_no_step_reads_what_the_step_before_it_allocated": 16,
        "test_replayed_and_eager_steps_can_alternate": 16,
        "test_replayed_steps_equal_hooked_steps": 12,
        "test_the_device_path_agrees_with_the_cpu_path": 3,
    },
    "conformance/test_assigned_gradients.py": {
        "test_gradients_of_torch_func_train_the_same_network": 6
    },
    "conformance/test_exactness.py": {
        "test_exact_at_every_step_of_training": 3,
        "test_exact_whatever_the_weights": 3,
    },
    "conformance/test_finalize.py": {"test_a_written_model_at_the_target_is_kept": 2},
    "conformance/test_methods.py": {
        "test_every_method_takes_every_allocation_by_name_or_as_an_object": 3
    },
    "conformance/test_models.py": {"test_a_compiled_model_is_compiled_once": 3},
    "conformance/test_patterns.py": {
        "test_every_method_that_takes_a_pattern_ends_in_it_exactly": 2,
        "test_the_pattern_holds_whatever_the_weights": 2,
    },
    "conformance/test_probmask.py": {
        "test_every_way_to_use_an_optimizer": 3,
        "test_passes_average_over_masks": 3,
    },
    "conformance/test_resume.py": {"test_every_optimizer_resumes_bitwise_from_any_step": 6},
    "conformance/test_spartan.py": {
        "test_runs_resume_bitwise_before_and_after_the_mask_is_frozen": 3,
        "test_the_mask_costs_what_the_kept_weights_cost": 3,
    },
    "conformance/test_threads.py": {
        "test_a_thread_with_the_lock_reads_the_weights_of_one_step": 2,
    },
    "conformance/test_torch_features.py": {
        "test_recomputed_activations_are_those_of_the_same_effective_weights": 2,
        "test_steps_in_backward_equal_the_plain_loop": 3,
    },
    "conformance/test_trajectory.py": {
        "test_every_method_under_compile": 5,
        "test_every_method_under_every_optimizer": 4,
        "test_every_method_under_every_recipe": 6,
        "test_every_method_with_a_frozen_layer": 2,
        "test_every_way_to_use_an_optimizer": 8,
        "test_fused_optimizers_under_a_grad_scaler": 4,
    },
    "native/test_native_operations.py": {"test_native_and_c_agree_with_pytorch": 6},
    "native/test_native_targets.py": {"test_networks": 5},
    "runtime/test_compile.py": {"test_single_samples_are_computed_correctly": 3},
    "runtime/test_networks.py": {"test_networks_for_cifar": 3, "test_networks_of_timm": 5},
    "runtime/test_resampling.py": {
        "test_interpolation_and_adaptive_pooling_stay_in_planes": 7,
        "test_several_threads_and_eight_samples": 6,
        "test_files_hold_the_taps": 3,
        "test_softmax_over_channels_stays_in_planes": 3,
    },
    "runtime/test_strides.py": {
        "test_strides_of_outputs": 3,
        "test_writes_into_the_input": 3,
    },
    "runtime/test_targets.py": {
        "test_convolutions": 3,
        "test_networks_on_several_threads": 3,
        "test_object_files_of_other_processors": 9,
    },
    "runtime/test_graphs.py": {"test_parts": 12},
    "runtime/test_layers.py": {"test_linear_layers": 3},
    "selection/test_counts.py": {"test_counts": 2},
    "selection/test_passes.py": {"test_effective_weights_have_the_bits_of_their_definition": 2},
    "studies/test_answers.py": {"test_a_page_is_complete_and_self_contained": 3},
    "studies/test_runner.py": {"test_an_interrupted_study_resumes": 2},
    "test_check_method.py": {
        "test_every_example_has_every_property": 3,
        "test_every_method_has_every_property": 7,
    },
    "test_cli.py": {"test_the_message_for_a_missing_extra_says_what_to_install": 3},
    "test_learned.py": {
        "test_tied_weights_are_counted_exactly": 3,
        "test_str_learns_any_target_sparsity_with_any_optimizer": 3,
    },
    "training/test_archive.py": {"test_a_changed_byte_gives_the_right_images_or_an_error": 3},
    "training/test_distributed.py": {"test_a_step_in_parts_equals_the_step_of_the_whole_batch": 3},
    "training/test_image_data.py": {"test_bad_files_are_a_one_line_error_that_names_them": 3},
    "training/test_initial_weights.py": {"test_every_form_of_a_file_gives_the_same_network": 2},
    "training/test_method_auto.py": {"test_a_resumed_run_keeps_its_method": 3},
    "training/test_resume_data.py": {"test_changed_images_are_refused_and_can_be_accepted": 6},
    "training/test_signals.py": {
        "test_sigterm_ends_the_process_within_an_operation_of_any_length": 2
    },
    "training/test_step.py": {"test_a_step_never_synchronizes_the_device": 6},
    "training/test_train_loop.py": {
        "test_a_run_on_an_image_folder_resumes_bitwise_identically": 2,
        "test_a_speed_switch_trains_the_same_network": 2,
        "test_after_ctrl_c_a_run_resumes_bitwise_identically": 4,
    },
    "training/test_wrong_contents.py": {
        "test_no_command_fails_on_a_wrong_file_with_another_error": 4
    },
}


def mark_further_cases(items: list[pytest.Item]) -> None:
    """Mark all but every n-th collected case of the tests in `EVERY`, slow ones apart."""
    seen: Counter[tuple[str, str, bool]] = Counter()
    for item in items:
        test = item.path.relative_to(TESTS).as_posix(), getattr(item, "originalname", item.name)
        kind = *test, item.get_closest_marker("slow") is not None
        if seen[kind] % EVERY.get(test[0], {}).get(test[1], 1):
            item.add_marker("more")
        seen[kind] += 1
