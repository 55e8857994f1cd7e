"""Every test runs with eight CPU devices; warnings are errors (pyproject.toml).

Programs of tests run once, and most of a test's time went into compiling them well: so they are compiled fast.
"""

import os

FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_llvm_disable_expensive_passes=true"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ.setdefault("JAX_PLATFORMS", "cpu")
