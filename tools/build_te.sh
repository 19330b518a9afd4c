#!/usr/bin/env bash
# Builds wheels of Transformer Engine for torch 2.11+cu130 on a machine without a GPU or a CUDA toolkit.
#
#   PYTHON=/path/to/python3.12 tools/build_te.sh OUT
#
# Leaves in OUT the wheels `transformer_engine`, `transformer_engine_cu13` (both as the package index has them) and
# `transformer_engine_torch`, which the index has as sources only. Those are C++ alone: the kernels are in
# `transformer_engine_cu13`, so nvcc is only asked for its version, and headers come from the wheels torch brings along.
#
# PYTHON must be the version that will run it, with its headers (Python.h); g++ must know C++17. BUILD is where the
# environment is made, a new folder under /tmp by default, which may be removed afterwards. MAX_JOBS compilers run at
# once.
#
# Run with Python 3.12.1 and g++ 12.2: 10 minutes for all of it with one compiler on a shared machine. The wheel wants
# glibc 2.34, and imports with torch 2.11.0+cu130 and with Megatron-core 0.16.1. Nothing of it was run on a GPU.
set -euo pipefail

OUT=$(realpath -m "${1:?usage: PYTHON=/path/to/python3.12 tools/build_te.sh OUT}")
BUILD=${BUILD:-$(mktemp -d /tmp/build_te.XXXXXX)}
TE=2.11.0
export MAX_JOBS=${MAX_JOBS:-1}

"${PYTHON:-python3.12}" -m venv "$BUILD/venv"
PY="$BUILD/venv/bin/python"
"$PY" -m pip install --quiet torch==2.11.0 nvidia-cuda-nvcc==13.0.88 nvidia-cuda-cccl==13.0.85 \
    "setuptools<81" wheel packaging pybind11 ninja
"$PY" -c 'import torch; assert torch.version.cuda == "13.0", f"torch {torch.__version__} is not of CUDA 13.0"'

NVIDIA=$("$PY" -c 'import nvidia; print(nvidia.__path__[0])')
export CUDA_HOME="$NVIDIA/cu13"
# CUDA's C++ library lies in a folder of its own; cuDNN and NCCL are packages of their own.
export CPATH="$CUDA_HOME/include/cccl:$NVIDIA/cudnn/include:$NVIDIA/nccl/include"
# Otherwise setup.py looks for a wheel at GitHub's first.
export NVTE_PYTORCH_FORCE_BUILD=TRUE

mkdir -p "$OUT"
"$PY" -m pip wheel --no-deps --no-build-isolation --wheel-dir "$OUT" "transformer_engine_torch==$TE"
"$PY" -m pip download --no-deps --only-binary=:all: --dest "$OUT" \
    "transformer_engine==$TE" "transformer_engine_cu13==$TE"
