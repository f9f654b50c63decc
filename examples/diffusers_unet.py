"""Sparse training of a diffusion model with diffusers, with an average of its weights.

    python examples/diffusers_unet.py

`EMAModel` of diffusers averages effective weights, which makes them dense. `LatentAverage` gives
the same average with exact zeros. Requires: pip install 'torch-feather[train,files]' diffusers
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from sklearn.datasets import load_digits

import torch_feather as feather

BATCH = 32


def small_unet() -> UNet2DModel:
    """Return a UNet for images of 8x8 pixels."""
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=8,
        block_out_channels=(16, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def train(folder: Path, steps: int, stop: int | None = None) -> tuple[UNet2DModel, UNet2DModel]:
    """Train, from the checkpoint in `folder` if it exists; `stop` ends the run after that step.

    Returns:
        The network, and the average of its weights.
    """
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    model, noise_schedule = small_unet(), DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
    # min_density: some layers start at 0, and one threshold for all would keep them there.
    sparsifier = feather.sparsify(  # new
        model, optimizer, sparsity=0.9, total_steps=steps, min_density=0.05
    )
    average = feather.LatentAverage(sparsifier, decay=0.95)  # instead of EMAModel  # new
    file = folder / "checkpoint.pt"
    if file.exists():
        state = torch.load(file)
        for name, part in (("model", model), ("optimizer", optimizer), ("schedule", schedule)):
            part.load_state_dict(state[name])
        average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])

    while sparsifier.step_count < (steps if stop is None else stop):
        clean = images[torch.randint(len(images), (BATCH,))]
        noise, times = torch.randn_like(clean), torch.randint(100, (BATCH,))
        noisy = noise_schedule.add_noise(clean, noise, times)
        F.mse_loss(model(noisy, times).sample, noise).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.update()  # instead of ema.step(model.parameters())  # new
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    state = {name: part.state_dict() for name, part in parts.items()}
    torch.save(state | {"random": torch.get_rng_state()}, file)
    averaged = average.copy_to(UNet2DModel.from_config(model.config))  # new
    if stop is None:
        sparsifier.finalize()  # new
    return model, averaged


def main(steps: int = 60) -> None:
    """Train in two parts, save a pipeline with the average, load it and draw."""
    with TemporaryDirectory() as folder:
        train(Path(folder), steps, stop=steps // 2)
        _, averaged = train(Path(folder), steps)
        DDPMPipeline(averaged, DDPMScheduler(100)).save_pretrained(Path(folder) / "pipeline")
        pipeline = DDPMPipeline.from_pretrained(Path(folder) / "pipeline")
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(batch_size=2, num_inference_steps=4, output_type="np").images
    print(
        f"drew {len(drawn)} images, {feather.sparsity(pipeline.unet):.2%} of the weights are zero"
    )


if __name__ == "__main__":
    main()
