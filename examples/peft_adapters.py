"""A sparse network with a sparse adapter: PEFT and the Trainer of Transformers.

    python examples/peft_adapters.py

Trains a small BERT at 90% sparsity, freezes it, and trains a LoRA adapter of 50% sparsity on it.
PEFT stores the adapter alone. Merging it into the network would fill the network's zeros.
Requires: pip install 'torch-feather[train,frameworks]' peft
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sklearn.datasets import load_digits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

import torch_feather as feather

STEPS = 20


def digits() -> list[dict]:
    """Return images as 64 tokens each, one for each pixel's gray level."""
    x, y = load_digits(return_X_y=True)
    words = torch.tensor(x, dtype=torch.int64)
    return [{"input_ids": w, "labels": int(n)} for w, n in zip(words, y, strict=True)]


def sparse_network() -> BertForSequenceClassification:
    """Return a network that was trained at 90% sparsity."""
    config = BertConfig(
        vocab_size=17, max_position_embeddings=64, hidden_size=48, num_hidden_layers=2,
        num_attention_heads=4, intermediate_size=96, num_labels=10,
    )  # fmt: skip
    model, data = BertForSequenceClassification(config), digits()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    sparsifier = feather.sparsify(
        model, optimizer, sparsity=0.9, total_steps=STEPS, exclude="bert.embeddings.*"
    )
    for step in range(STEPS):
        batch = data[32 * step : 32 * (step + 1)]
        words = torch.stack([example["input_ids"] for example in batch])
        labels = torch.tensor([example["labels"] for example in batch])
        model(input_ids=words, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sparsifier.finalize()


def make_trainer(network, folder: Path, **options) -> tuple[Trainer, feather.Sparsifier]:
    """Return a Trainer of an adapter; new lines are marked."""
    model = get_peft_model(network, LoraConfig(r=8, target_modules=["query", "value"]))
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=32, learning_rate=1e-2,
        save_steps=STEPS // 4, report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=digits())
    # "uniform": one threshold for all weights would empty lora_B, which starts at 0.
    sparsifier = feather.sparsify(  # new
        model, trainer.create_optimizer(), sparsity=0.5, total_steps=STEPS,
        include="*lora_*", allocation="uniform",
    )  # fmt: skip
    return trainer, sparsifier


def main() -> None:
    """Train network and adapter, store both, and load them again."""
    set_seed(0)
    with TemporaryDirectory() as folder:
        path = Path(folder)
        network = sparse_network()
        network.save_pretrained(path / "network")
        trainer, sparsifier = make_trainer(network, path / "run")
        trainer.train()  # to resume: trainer.train(resume_from_checkpoint=True)
        adapted = sparsifier.finalize()  # new
        adapted.save_pretrained(path / "adapter")

        network = BertForSequenceClassification.from_pretrained(path / "network")
        model = PeftModel.from_pretrained(network, path / "adapter")
        zeros = feather.sparsity(model, include="*lora_*")
    print(f"network: {zeros_of_layers(model):.2%}, adapter: {zeros:.2%} of the weights are zero")


def zeros_of_layers(model: PeftModel) -> float:
    """Return the sparsity of the network's own weights, without adapters."""
    return feather.sparsity(model.get_base_model(), exclude=["*lora_*", "*.embeddings.*"])


if __name__ == "__main__":
    main()
