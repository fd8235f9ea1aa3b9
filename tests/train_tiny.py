"""`examples/train_on_a_mesh.py`, with a model so small that a run takes seconds."""

import sys
from pathlib import Path

SIZES = {
    "vocabulary": 299,  # which the devices do not divide
    "files": 8,
    "width": 16,
    "depth": 1,
    "heads": 2,
    "context": 32,
    "steps": 60,
    "evaluations": 2,
    "validation_batches": 2,
}

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

    import train_language_model as language
    import train_on_a_mesh

    language.QUICK = language.Config(**SIZES)
    train_on_a_mesh.main()
