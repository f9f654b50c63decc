"""Sparse training of a speech recognizer: Whisper and the Seq2SeqTrainer of Transformers.

    python examples/whisper_trainer.py

Trains a small Whisper, made from a configuration, on tones: each tone is a token.
Requires: pip install 'torch-feather[train,frameworks]'
"""

import torch
from transformers import (
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
    set_seed,
)

import torch_feather as feather

MELS, FRAMES, TOKENS = 8, 32, 4
FIRST = 3  # the first token of a tone; those before begin, end and fill a text


def small_whisper() -> WhisperForConditionalGeneration:
    """Return an untrained network that reads FRAMES frames of MELS bands."""
    config = WhisperConfig(
        vocab_size=FIRST + MELS, num_mel_bins=MELS, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=FRAMES // 2, max_target_positions=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def tones(count: int) -> list[dict]:
    """Return spectra of four tones each, with the tokens of these tones."""
    random = torch.Generator().manual_seed(0)
    heard = torch.randint(MELS, (count, TOKENS), generator=random)
    spectra = torch.nn.functional.one_hot(heard, MELS).float()
    spectra = spectra.repeat_interleave(FRAMES // TOKENS, dim=1).transpose(1, 2)
    spectra += 0.1 * torch.randn(spectra.shape, generator=random)
    return [{"input_features": x, "labels": y} for x, y in zip(spectra, heard + FIRST, strict=True)]


def make_trainer(folder: str, steps: int, **options) -> tuple[Seq2SeqTrainer, feather.Sparsifier]:
    """Return an ordinary trainer; new lines are marked."""
    args = Seq2SeqTrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=32, learning_rate=1e-2,
        save_steps=max(steps // 4, 1), report_to=[], disable_tqdm=True, use_cpu=True, **options,
    )  # fmt: skip
    model = small_whisper()
    trainer = Seq2SeqTrainer(model, args, train_dataset=tones(256))
    sparsifier = feather.sparsify(  # new
        model, trainer.create_optimizer(), sparsity=0.9, total_steps=steps,
        exclude="model.decoder.embed_*", min_density=0.02,
    )  # fmt: skip
    return trainer, sparsifier


def main(steps: int = 120) -> None:
    """Train, and let the network write what it hears."""
    set_seed(0)
    trainer, sparsifier = make_trainer("runs/whisper", steps)
    trainer.train()  # to resume: trainer.train(resume_from_checkpoint=True)
    model = sparsifier.finalize()  # new
    model.save_pretrained("runs/whisper/final")

    model = WhisperForConditionalGeneration.from_pretrained("runs/whisper/final").eval()
    data = tones(32)
    heard = model.generate(
        torch.stack([one["input_features"] for one in data]), max_new_tokens=TOKENS, do_sample=False
    )[:, -TOKENS:]
    right = (heard == torch.stack([one["labels"] for one in data])).float().mean()
    print(
        f"{right:.1%} of the tones are right, {feather.sparsity(model):.2%} of the weights are zero"
    )


if __name__ == "__main__":
    main()
