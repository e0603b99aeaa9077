"""The two things that pyproject.toml cannot say: which extension cffi builds, and that one wheel serves all Pythons."""

from setuptools import setup

setup(
    cffi_modules=["dist_moe/kernels/build.py:ffi"],
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
