"""Turns a bf16 checkpoint into llama.cpp's files: bf16, and Q8_0 made of that.

    python benchmarks/peers/convert.py PEERS CHECKPOINT DESTINATION

PEERS is the folder that install.py filled. A synthetic checkpoint has no tokenizer, and needs none
to be measured: it is converted with an empty vocabulary of its size.
"""

import argparse
import subprocess
import sys
from pathlib import Path

BF16, Q8_0 = "bf16.gguf", "q8_0.gguf"


def convert(source: Path, checkpoint: Path, destination: Path) -> None:
    """llama.cpp's own converter, in its own environment (this function's caller runs there)."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import convert_hf_to_gguf
    from conversion.deepseek import DeepseekV2Model

    if not any(checkpoint.glob("tokenizer*")):
        DeepseekV2Model.set_vocab = DeepseekV2Model._set_vocab_none
    arguments = [str(checkpoint), "--outtype", "bf16", "--outfile", str(destination)]
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    convert_hf_to_gguf.main()


def main() -> None:
    """Starts the converter in llama.cpp's environment, then quantizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peers", type=Path, metavar="PEERS")
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("destination", type=Path, metavar="DESTINATION")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    home = args.peers.resolve() / "llama.cpp"
    destination: Path = args.destination.resolve()
    destination.mkdir(parents=True, exist_ok=True)
    if args.here:
        convert(home / "llama.cpp", args.checkpoint.resolve(), destination / BF16)
        return
    python = home / "venv" / "bin" / "python"
    subprocess.run([str(python), __file__, *sys.argv[1:], "--here"], check=True)
    quantize = home / "llama.cpp" / "build" / "bin" / "llama-quantize"
    files = [str(destination / BF16), str(destination / Q8_0)]
    subprocess.run([str(quantize), *files, "Q8_0"], check=True)


if __name__ == "__main__":
    main()
