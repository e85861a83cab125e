"""How long a recipe would train on a GPU, at an assumed utilisation: python -m bench.gpu_budget"""

from pathlib import Path
from typing import NamedTuple

from bench.tables import table
from engine.cost import training_memory
from train_diffusion import count_crop, parse

UTILISATION = 0.3  # of the peak below; bench/RESULTS.md has 0.47 of a matrix product on a CPU


class Machine(NamedTuple):
    """The maker's dense bfloat16 products with float32 sums, and memory."""

    name: str
    cards: int
    flops: float  # per second
    memory: float  # bytes


MACHINES = {
    "x4_gpu": Machine("one RTX 4090", 1, 165e12, 24e9),
    "x4_node": Machine("eight A100, 80 GB", 8, 312e12, 80e9),
}


def budget(recipe: Path, machine: Machine) -> list[str]:
    """Recipe, machine, M parameters, crops per step, TFLOP per step, GB per card, hours."""
    settings, _ = parse([f"@{recipe}"])
    training = settings.training
    parameters, cost = count_crop(settings)
    crops = training.batch_size * training.accumulation_steps * machine.cards
    memory = training_memory(parameters, cost, training.batch_size, training.optimizer, half_precision=True)
    assert training.max_steps is not None, f"{recipe} does not say how many steps"
    hours = training.max_steps * crops * cost.flops / (machine.cards * machine.flops * UTILISATION) / 3600
    assert memory < machine.memory, f"{recipe} needs {memory / 1e9:.1f} GB"
    numbers = (f"{parameters / 1e6:.1f}", str(crops), f"{crops * cost.flops / 1e12:.1f}")
    return [recipe.stem, machine.name, *numbers, f"{memory / 1e9:.1f}", f"{hours:.1f}"]


def main() -> None:
    """Print the table."""
    headings = [
        "recipe",
        "machine",
        "M parameters",
        "crops per step",
        "TFLOP per step",
        "GB per card",
        "hours",
    ]
    rows = [budget(Path("recipes") / f"{name}.args", machine) for name, machine in MACHINES.items()]
    print("\n".join(table(headings, rows)), end="")


if __name__ == "__main__":
    main()
