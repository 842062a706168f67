"""Build of the C++ data engine; everything else is declared in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("NPY_NUM_BUILD_JOBS").install()

# Without contraction no compiler fuses a * b + c: sums and draws are the same on every machine.
# Nothing looks at floating point exceptions, and without them comparisons vectorise.
FLAGS = ["-O3", "-Wall", "-Wextra", "-ffp-contract=off", "-fno-trapping-math", "-pthread"]

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_dwm._data_engine",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
