"""Draw how much each moment of a run counts, for every profile.

python examples/profile_shapes.py [FILE]        # profiles.png by default
"""

import sys

from matplotlib import pyplot as plt

from polyak import EMA, SWA, After, Annealed, PowerEMA, Window
from polyak.report.drawing import BLUE, style

STEPS = 1000
PROFILES = {
    "SWA()": SWA(),
    "After(750, SWA())": After(750, SWA()),
    "Window(250)": Window(250),
    "EMA.from_half_life(100)": EMA.from_half_life(100),
    "PowerEMA.from_relative_std(0.1)": PowerEMA.from_relative_std(0.1),
    'Annealed.from_shape("cosine")': Annealed.from_shape("cosine"),
}


def main(path: str) -> None:
    times = range(1, STEPS + 1)
    with style():
        figure, axes = plt.subplots(2, 3, figsize=(8.4, 3.9), sharex=True, layout="constrained")
        for ax, (name, profile) in zip(axes.flat, PROFILES.items(), strict=True):
            ax.fill_between(times, profile.weights(times) * STEPS, color=BLUE, alpha=0.7, lw=0)
            effective = profile.effective_samples(times)
            ax.set_title(f"{name}\n{effective:.0f} effective samples", fontsize=8, loc="left")
            ax.set(xlim=(0, STEPS), ylim=(0, None))
        figure.supxlabel("step at which the weights were taken, of 1000", fontsize=9)
        figure.supylabel("weight, as a multiple of 1/1000", fontsize=9)
        figure.savefig(path)
    plt.close(figure)
    print(f"drawn in {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "profiles.png")
