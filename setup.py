"""Installs `wtn_pretrain`. Versions that decide what runs where are pinned; see CONTRIBUTING.md before moving one."""

from pathlib import Path

from setuptools import find_packages, setup

about: dict[str, str] = {}
exec(Path(__file__).with_name("wtn_pretrain").joinpath("version.py").read_text(), about)

setup(
    name="wtn_pretrain",
    version=about["__version__"],
    description="Go Wide, Then Narrow: train a deep thin network that is as good as a far larger one",
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["wtn_pretrain", "wtn_pretrain.*"]),
    package_data={"wtn_pretrain": ["py.typed", "report/*.html"]},
    install_requires=[
        "torch==2.13.0",
        "deepspeed==0.19.8",
        "ninja",  # DeepSpeed compiles its communication op at first use
        "numpy>=2.0",
        "pydantic>=2.12",
        "pyyaml>=6.0",
        "xxhash>=3.4",
        "safetensors>=0.7",
        "tqdm>=4.66",
        "tensorboard>=2.20",
        "transformers==5.23.0",
        "tokenizers==0.23.3",
        "sentencepiece>=0.2.1",
        "datasets==5.2.0",
        "pyarrow>=21.0",  # Parquet and .zst
        "pillow>=11.0",
        "scipy>=1.11",  # the inverse of the beta distribution, for mixup
        "scikit-learn>=1.7",  # the digits that the quickstart trains on
        "onnx==1.23.2",
        "onnxscript==0.7.2",
        "onnxruntime==1.31.1",
        "matplotlib>=3.10",
        "jinja2>=3.1",
    ],
    extras_require={
        "kernels": ["triton==3.7.1", "liger-kernel>=0.6"],  # for GPUs; torch's CUDA builds bring Triton
        "test": ["pytest==9.2.0", "pytest-xdist>=3.8", "hypothesis>=6.150", "accelerate==1.15.0"],
        "dev": [
            "pytest==9.2.0",
            "pytest-xdist>=3.8",
            "hypothesis>=6.150",
            "accelerate==1.15.0",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "types-PyYAML",
            "types-tqdm",
            "pre-commit>=4.0",
        ],
    },
)
