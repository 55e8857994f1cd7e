"""Every test runs with eight CPU devices; warnings are errors (pyproject.toml).

XLA makes its programs with LLVM's optimisations off, which come after all that the tests of costs measure: fourteen of
the laws took a fifth less of the processors' time. Flags of the environment win over these.
"""

import os

FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
