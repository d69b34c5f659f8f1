"""The loop of diffusers' train_unconditional.py, with a tiny UNet: the average in the place of EMAModel.

python examples/diffusers_loop.py        # works in a temporary folder
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import polyak
from polyak.integrations.accelerate import track


def main(folder: Path) -> None:
    torch.manual_seed(0)
    naming = ProjectConfiguration(folder, automatic_checkpoint_naming=True, total_limit=1)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, project_config=naming)
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=4,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    noise_scheduler = DDPMScheduler(num_train_timesteps=20)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(torch.randn(32, 1, 8, 8), 4)
    )

    # ema_model = EMAModel(model.parameters(), decay=0.9999, ...), and its save and load hooks
    average = polyak.Average(model, polyak.EMA(decay=0.9))
    average.attach(optimizer)
    track(accelerator, average)

    for clean in loader:
        with accelerator.accumulate(model):
            noise = torch.randn(clean.shape)
            steps = torch.randint(0, 20, (len(clean),))
            noisy = noise_scheduler.add_noise(clean, noise, steps)
            accelerator.backward(mse_loss(model(noisy, steps).sample, noise))
            optimizer.step()
            optimizer.zero_grad()
        # if accelerator.sync_gradients: ema_model.step(model.parameters()): the hook does it
    accelerator.save_state()  # the average in it

    # ema_model.store(...), ema_model.copy_to(...), sample and save, ema_model.restore(...)
    with average.applied():
        pipeline = DDPMPipeline(accelerator.unwrap_model(model), noise_scheduler)
        pipeline.set_progress_bar_config(disable=True)
        images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
        pipeline.save_pretrained(folder / "pipeline")

    print(f"{average.count} steps averaged, images of shape {images.shape}")
    assert average.count == 4  # of 8 batches
    saved = UNet2DModel.from_pretrained(folder / "pipeline", subfolder="unet").state_dict()
    assert all(torch.equal(t, saved[n]) for n, t in average.averaged_tensors().items())
    assert not torch.equal(model.conv_out.weight, saved["conv_out.weight"])
    average.reset()
    accelerator.load_state()
    assert average.count == 4


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
