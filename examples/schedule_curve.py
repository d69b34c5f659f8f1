"""Draw SWA's cyclic schedule, and the curve that torch's schedulers are often combined into instead.

python examples/schedule_curve.py [FILE]        # schedule.png by default
"""

import sys

from matplotlib import pyplot as plt

import polyak
from polyak.report.drawing import style

BEFORE = ((50, polyak.schedules.Constant(0.1)), (50, polyak.schedules.Cosine(0.1, 0.01)))
# The paper's cycles: each ends at its lowest rate, where the weights are averaged.
PAPER = polyak.schedules.chain(
    *BEFORE, (40, polyak.schedules.CyclicLinear(high=0.05, low=0.01, cycle=10))
)
# SequentialLR([ConstantLR, CosineAnnealingLR, CyclicLR]) is lowest in the first step of each cycle.
TORCH = polyak.schedules.chain(
    *BEFORE, (41, polyak.schedules.Sawtooth(high=0.05, low=0.01, cycle=10))
)


def main(path: str) -> None:
    with style():
        figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5.6), layout="constrained")
        polyak.plot_schedule(PAPER, above).set_title("the paper's cycles", loc="left")
        polyak.plot_schedule(TORCH, below).set_title("the sawtooth of torch's CyclicLR", loc="left")
        figure.savefig(path)
    plt.close(figure)
    print(f"averaged after {PAPER.averaging_points()} completed steps,")
    print(f"with the sawtooth after {TORCH.averaging_points()}; drawn in {path}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "schedule.png")
