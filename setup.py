"""Installation. Torch comes first and separately where a CPU or CUDA build must be chosen (see Makefile)."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (HERE / "srde_ds/__init__.py").read_text()).group(1)

setup(
    name="srde-ds",
    version=version,
    description="Sparse Routed Delta Experts on a frozen language model, trained with DeepSpeed",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="The srde_ds developers",
    license="MIT",
    license_files=["LICENSE"],
    keywords=[
        "mixture of experts",
        "parameter-efficient fine-tuning",
        "sparse fine-tuning",
        "DeepSpeed",
        "Muon",
        "transformers",
    ],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["srde_ds", "srde_ds.*"]),
    package_data={"srde_ds": ["py.typed"], "srde_ds.data.sources": ["registry.yaml"], "srde_ds.pages": ["templates/*"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed==0.19.8",
        "transformers>=5.17",
        "charset-normalizer>=3.5",  # names the encoding of a file that is not UTF-8
        "accelerate>=1.10",  # transformers needs it to load a base sharded
        "datasets>=4.0",
        "math-verify>=0.9",
        "packaging>=24.2",
        "pydantic>=2.10",  # schemas of other people's files; deepspeed brings it
        "rensa>=0.5",  # MinHash
        "safetensors>=0.8",
        "scikit-learn>=1.6",
        "scipy>=1.14.1",
        "tabulate>=0.9",
        "pyyaml>=6.0.2",
        "tqdm>=4.67.1",
    ],
    extras_require={
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.12",
            "mypy>=1.15",
            "types-psutil",
            "types-PyYAML",
            "types-tabulate",
            "tensorboard",
            "markdown-it-py>=3.0",
            "playwright>=1.50",  # drives the browser of the distribution
        ],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.6", "mkdocstrings[python]>=1.0"],
        "quickstart": ["gguf>=0.17", "reasoning-gym>=0.1.20", "periodictable>=2.0", "matplotlib>=3.9", "plotly>=6"],
        "kernels": ["triton>=3.9; platform_system == 'Linux'"],  # its interpreter; torch for CUDA brings its own
        "quantized": ["bitsandbytes>=0.50.2"],  # bases in 4 and 8 bits
        "lm-eval": ["lm_eval>=0.4.13"],  # lm-evaluation-harness
        "tracking": ["tensorboard", "wandb", "trackio"],
        "mpi": ["mpi4py>=4.0"],
        "peft": ["peft>=0.21"],  # SRDE as a PEFT method
        "trl": ["trl>=1.16", "peft>=0.21"],  # SFTTrainer, DPOTrainer, GRPOTrainer
        "pages": ["matplotlib>=3.9", "plotly>=6", "gradio>=6"],  # reports, `srde-ds chat`
        "benchmarks": ["peft>=0.21"],  # besides quickstart
    },
    entry_points={"console_scripts": ["srde-ds = srde_ds.cli.main:entry_point"]},
)
