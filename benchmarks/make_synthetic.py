"""Makes a checkpoint with random weights to measure speed with.

python benchmarks/make_synthetic.py /tmp/synthetic --format w8a8_int8
python benchmarks/make_synthetic.py /tmp/v3-pair --model v3-pair --format w8a8_int8
"""

import argparse
import sys
import time
from pathlib import Path

from latentcore.models.synthetic import benchmark_config, make_synthetic, v3_pair_config
from latentcore.models.writer import FORMATS


def main() -> None:
    """Parses the command line and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write it; must be empty or absent")
    parser.add_argument("--model", choices=("benchmark", "v3-pair"), default="benchmark")
    parser.add_argument("--format", choices=sorted(FORMATS), default="w8a8_int8")
    parser.add_argument("--dense", type=int, default=10944, help="width of the dense layer's MLP")
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder.exists() and any(args.folder.iterdir()):
        parser.error(f"{args.folder}: expected an empty folder or none, found files")
    if args.model == "v3-pair":
        config = v3_pair_config(vocab=args.vocab)
    else:
        config = benchmark_config(dense=args.dense, vocab=args.vocab)
    start = time.perf_counter()

    def progress(done: int, total: int) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r{done / 1e9:.1f} of {total / 1e9:.1f} GB")

    make_synthetic(args.folder, config, args.format, args.seed, progress)
    print(f"\rwrote {args.folder} in {time.perf_counter() - start:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
