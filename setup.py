"""Builds the native kernel: a plain C library, without Python's headers, so that one wheel serves every Python.

Without a C compiler the package installs all the same, and the reference serves.
"""

from __future__ import annotations

import sys

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

FLAGS = ["-std=gnu99", "-O3", "-g0", "-fopenmp-simd", "-ffp-contract=off", "-fvisibility=hidden", "-pthread"]
FLAGS += ["-fno-strict-aliasing"]  # one room for a block serves all types; measured: costs nothing


class BuildLibrary(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


class AnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


library = Extension(
    "gradlens.kernels._native",
    ["gradlens/kernels/native.c"],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
    libraries=["m"],
    optional=True,
)
setup(
    ext_modules=[] if sys.platform == "win32" else [library],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPython},
)
