"""Sparse training with the Trainer of Transformers: call sparsify before train().

    python examples/transformers_trainer.py

Trains a small vision transformer on scikit-learn's digits at 90% sparsity, with gradient
accumulation, and loads the best checkpoint. Any model of the Trainer can be trained in this way; a
small BERT is included. Requires: pip install 'torch-feather[train,frameworks]'
"""

import math
from functools import partial

import torch
from sklearn.datasets import load_digits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

import torch_feather as feather

WIDTH = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 96, "num_labels": 10}  # fmt: skip


def vision_transformer() -> tuple[PreTrainedModel, list, list]:
    """Return a ViT with patches of 2x2 pixels, and training and validation images of 8x8 pixels."""
    x, y = load_digits(return_X_y=True)
    images = torch.tensor(x, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    examples = [{"pixel_values": i, "labels": int(n)} for i, n in zip(images, y, strict=True)]
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, **WIDTH)
    return ViTForImageClassification(config), examples[:1400], examples[1400:]


def bert() -> tuple[PreTrainedModel, list, list]:
    """Return a BERT that reads the same images as 64 tokens, one for each pixel's gray level."""
    x, y = load_digits(return_X_y=True)
    words = torch.tensor(x, dtype=torch.int64)
    examples = [{"input_ids": w, "labels": int(n)} for w, n in zip(words, y, strict=True)]
    config = BertConfig(vocab_size=17, max_position_embeddings=64, **WIDTH)
    return BertForSequenceClassification(config), examples[:1400], examples[1400:]


def make_trainer(
    model: PreTrainedModel, train: list, validation: list, folder: str, epochs: int, **options
) -> tuple[Trainer, feather.Sparsifier]:
    """Return an ordinary Trainer; new lines are marked."""
    accumulate, batch = 2, 32
    args = TrainingArguments(
        folder, num_train_epochs=epochs, per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate, learning_rate=3e-3, warmup_steps=10,
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=2,
        load_best_model_at_end=True, metric_for_best_model="final_accuracy",
        logging_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip

    def measure(prediction) -> dict[str, float]:
        accuracy = float((prediction.predictions.argmax(1) == prediction.label_ids).mean())
        # Checkpoints before the final sparsity are denser and must not be chosen.
        return {"accuracy": accuracy, "final_accuracy": accuracy * sparsifier.at_target}  # new

    # Transformers 5 saves some models, such as ViT, with older parameter names, which its Trainer
    # does not recognize when it loads a checkpoint. This keeps the names.
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False)
    trainer = Trainer(
        model, args, train_dataset=train, eval_dataset=validation, compute_metrics=measure
    )
    steps = epochs * math.ceil(len(trainer.get_train_dataloader()) / accumulate)
    sparsifier = feather.sparsify(  # new
        model, trainer.create_optimizer(), sparsity=0.9, total_steps=steps
    )
    return trainer, sparsifier


def main(epochs: int = 8) -> None:
    """Train, then evaluate the best checkpoint at the final sparsity."""
    set_seed(0)
    model, train, validation = vision_transformer()
    trainer, sparsifier = make_trainer(model, train, validation, "runs/transformers", epochs)
    trainer.train()  # to resume: trainer.train(resume_from_checkpoint=True)
    sparsifier.finalize()  # new
    accuracy = trainer.evaluate()["eval_accuracy"]
    print(f"{accuracy:.1%} accuracy, {feather.sparsity(model):.2%} of the weights are zero")


if __name__ == "__main__":
    main()
