"""The main job on a real model, from an S3 server to a forward pass; `weightstream demo`."""

from pathlib import Path


def run_demo(picture: Path = Path("weightstream-demo.png"), size_bytes: int = 1 << 30) -> int:
    """Run the demo and write its timeline; return 0 when every check held, 1 when one did not."""
    from weightstream.demo.run import run_demo as run

    return run(picture, size_bytes)
