"""The one thing that pyproject.toml cannot say: which extension cffi builds."""

from setuptools import setup

setup(cffi_modules=["dist_moe/kernels/build.py:ffi"])
