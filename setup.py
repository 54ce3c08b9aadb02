"""Packaging of cachemoe: the four folders at the top of the repository are the four packages in ``cachemoe``."""

from pathlib import Path

from setuptools import setup

BUILT_IN_MODELS = ("tinymoe", "steepmoe", "coarsemoe")
PACKAGES = ("kernels", "moe", "moe.policies", "offload", "benchmarks")

HF = ["transformers>=5.17"]
BENCH = ["pytest-benchmark>=5", "matplotlib>=3.9"]
GGUF = ["gguf>=0.18"]
COMPARE = [*GGUF, "xllamacpp>=2026.10"]  # llama.cpp beside cachemoe, in `cachemoe compare`
TEST = [*HF, *BENCH, *GGUF, "pytest>=8.1", "pytest-xdist>=3.6", "hypothesis>=6.100", "ruff>=0.12", "setuptools>=77.0.3"]

README = Path(__file__).with_name("README.md")

setup(
    name="cachemoe",
    version="0.1.0",
    description="Mixture-of-Experts offloading with cache-conditional routing, in PyTorch and Triton",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    # cachemoe itself has the few names that most users want, and its folder is one of moe's.
    packages=["cachemoe", *(f"cachemoe.{name}" for name in PACKAGES)],
    package_dir={"cachemoe": "moe/public", **{f"cachemoe.{name}": name.replace(".", "/") for name in PACKAGES}},
    # One level deep on purpose: tinymoe/training stays in the repository.
    package_data={
        "cachemoe.kernels": ["*.c", "*.h"],
        "cachemoe.moe": [
            f"{model}/*.{suffix}" for model in BUILT_IN_MODELS for suffix in ("json", "safetensors", "csv")
        ],
    },
    install_requires=[
        "torch>=2.11",
        'triton>=3.6; platform_system == "Linux"',
        "safetensors>=0.4",
        "xxhash>=3.4",
        "numpy>=1.26",
        "typer>=0.12",
        "rich>=13",
    ],
    extras_require={"hf": HF, "bench": BENCH, "compare": COMPARE, "test": TEST},
    entry_points={"console_scripts": ["cachemoe = cachemoe.benchmarks.cli:main"]},
)
