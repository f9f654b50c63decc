"""PEFT: a sparse adapter on a sparse network, trained by the Trainer of Transformers."""

import pytest
from example_cases import assert_same, expected_zeros, load, zeros_of

pytestmark = pytest.mark.apps
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def example():
    return load("peft_adapters")


def test_a_killed_run_resumes_bitwise_and_network_and_adapter_keep_their_zeros(
    example, created, tmp_path, killed_at
):
    transformers.set_seed(0)
    example.sparse_network().save_pretrained("network")
    base = created[0]
    names, expected = base.masks(), expected_zeros(base)

    def train(folder, seed=0, resume=None):
        transformers.set_seed(seed)
        network = transformers.BertForSequenceClassification.from_pretrained("network")
        trainer, sparsifier = example.make_trainer(network, folder)
        trainer.train(resume_from_checkpoint=resume)
        return sparsifier.finalize()

    whole = train("whole")
    killed_at(transformers.Trainer, "training_step", 13, lambda: train("parts"))
    resumed = train("parts", seed=1, resume=True)
    assert_same(whole, resumed)

    adapter = created[-1]
    assert adapter.step_count == example.STEPS
    assert zeros_of(adapter) == expected_zeros(adapter)
    resumed.save_pretrained("adapter")
    network = transformers.BertForSequenceClassification.from_pretrained("network")
    loaded = peft.PeftModel.from_pretrained(network, "adapter")
    assert_same(loaded, whole)
    inside = loaded.unload()  # the network, without the adapter
    assert sum(int((inside.get_parameter(name) == 0).sum()) for name in names) == expected


def test_the_example_runs(example, created, capsys):
    example.main()
    assert "network: 90.00%, adapter: 50.00%" in capsys.readouterr().out
