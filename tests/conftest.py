"""Every test runs with eight CPU devices; warnings are errors (pyproject.toml).

XLA makes its programs with LLVM's optimisations off, which come after all that the tests of costs measure: fourteen of
the laws took a fifth less of the processors' time. Flags of the environment win over these.
"""

import os

from hypothesis import HealthCheck, settings

FLAGS = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '')}"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

EXAMPLES = int(os.environ.get("JLORA_EXAMPLES", "25"))
settings.register_profile(
    "jlora",
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.large_base_example],
)
settings.load_profile("jlora")


def pytest_report_header():
    return f"hypothesis: {EXAMPLES} examples of each property, the same in every run (JLORA_EXAMPLES sets their number)"
