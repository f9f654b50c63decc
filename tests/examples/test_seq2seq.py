"""Whisper in the Seq2SeqTrainer of Transformers."""

import pytest
from example_cases import assert_same, expected_zeros, load, zeros_of
from transformers import Seq2SeqTrainer, WhisperForConditionalGeneration, set_seed

pytestmark = pytest.mark.apps
example = load("whisper_trainer")
STEPS = 8


def test_a_killed_run_resumes_bitwise_and_delivers_exact_zeros(created, tmp_path, killed_at):
    def train(folder, seed=0, resume=None):
        set_seed(seed)
        trainer, sparsifier = example.make_trainer(folder, STEPS)
        trainer.train(resume_from_checkpoint=resume)
        return sparsifier.finalize()

    whole = train("whole")
    killed_at(Seq2SeqTrainer, "training_step", 6, lambda: train("parts"))
    resumed = train("parts", seed=1, resume=True)
    assert_same(whole, resumed)
    assert created[-1].step_count == STEPS
    resumed.save_pretrained("final")
    delivered = WhisperForConditionalGeneration.from_pretrained("final")
    assert zeros_of(created[-1], delivered) == expected_zeros(created[-1])
    assert delivered.proj_out.weight is delivered.model.decoder.embed_tokens.weight


def test_the_example_runs(created, capsys):
    example.main(STEPS)
    assert "90.00% of the weights are zero" in capsys.readouterr().out
