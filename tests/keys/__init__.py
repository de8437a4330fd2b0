import pytest

pytest.register_assert_rewrite(*(f"tests.keys.{name}" for name in (
    "adapter", "data", "lab", "run", "step")))
